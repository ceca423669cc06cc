"""Addresses that this service calls come from its settings alone, and some are refused there."""

from typing import Final

import pytest

from backend.errors import ConfigurationError
from backend.settings import get_settings, load_settings
from tests.conftest import Run

# Put into what is refused; it must not come back.
CANARY: Final = "kanarienvogel"
SERVICES: Final = ("VAULT_ADDR", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254",
        f"http://169.254.169.254/latest/{CANARY}",
        "https://169.254.169.254:443/",
        "http://169.254.170.2/v2/credentials",
        "http://169.254.169.254./",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:a9fe:a9fe]:80/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fd00:ec2::254]/",
        "http://[fd00:0ec2:0:0:0:0:0:0254]/",
        "http://[fd00:ec2::23]/",
        "http://[fd20:ce::254]/",
        "http://[fd00:c1::a9fe:a9fe]/",
        "http://[fd00:42::42]/",
        "http://100.100.100.200/",
        "http://1684301000/",
        "http://192.0.0.192/",
        "http://168.63.129.16/",
        # As IPv6 carries addresses of IPv4.
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[::169.254.169.254]/",
        "http://[::ffff:0:169.254.169.254]/",
        "http://[2002:a9fe:a9fe::]/",
        "http://[::ffff:100.100.100.200]/",
        # As the resolver reads what is no ASCII.
        "http://\uff11\uff16\uff19.254.169.254/",
        "http://169\u3002254\u3002169\u3002254/",
        "http://169\uff0e254\uff61169.254/",
        "http://\u2460\u2465\u2468.254.169.254/",
        "http://\U0001fbf1\U0001fbf6\U0001fbf9.254.169.254/",
        "http://169.2\u00ad54.169.254/",
        "http://169.254.169.254\u3002/",
        f"https://{CANARY}@minio.example.com",
        f"https://user:{CANARY}@minio.example.com",
        f"file:///{CANARY}",
        f"ftp://{CANARY}.example.com",
        f"gopher://{CANARY}.example.com",
        f"{CANARY}.example.com:9000",
        f"//{CANARY}.example.com",
        f"http:///{CANARY}",
        f"http://{CANARY}.example.com:0",
        f"http://{CANARY}.example.com:99999",
        f"http://[::1/{CANARY}",
    ],
)
def test_a_service_is_at_no_metadata_address_and_no_odd_one(name: str, address: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as refusal:
        load_settings(**{name.lower(): address})
    assert CANARY not in refusal.value.detail


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize(
    "address",
    [
        "https://vault.example.com",
        "https://s3.eu-central-1.amazonaws.com",
        "http://127.0.0.1:8200",
        "http://localhost:9000",
        "http://minio:9000",
        "http://10.0.0.5:9000",
        "http://192.168.1.20:8200/",
        "https://172.16.0.9",
        "http://[fd12:3456:789a::1]:9000",
        "http://[::1]:9000",
        "http://[64:ff9b::c000:201]:9000",
        "http://100.100.100.201:9000",
        "https://m\u00fcnchen.example.com",
        f"https://{'x' * 64}.example.com",
    ],
)
def test_a_service_may_be_in_a_private_network(name: str, address: str) -> None:
    assert getattr(load_settings(**{name.lower(): address}), name.lower()) == address


def test_a_refused_address_stops_the_start_by_its_name(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://169.254.169.254/{CANARY}")
    get_settings.cache_clear()
    answer = run("retention", "status")
    assert answer.code == 2
    assert "AWS_ENDPOINT_URL_S3" in answer.err
    assert CANARY not in answer.out + answer.err
