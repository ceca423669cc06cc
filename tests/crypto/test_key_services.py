"""Wrapped keys: what opens them, and what does not; with the real services of `conftest`."""

import base64
import os
import subprocess
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Final

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from backend.crypto.key_services import KeyService, KeyServices, is_wrapped, unwrap, wrap
from backend.errors import KeyFormatError
from tests.conftest import KEY
from tests.crypto.conftest import RAW, TOKEN, Keeper, bao_program, refusal, vault_client

VAULT_FORM: Final = f"vault:v1:{base64.b64encode(bytes(60)).decode()}"


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(key=st.binary(min_size=32, max_size=32))
def test_a_key_opens_to_what_was_wrapped(keeper: Keeper, key: bytes) -> None:
    assume(len(set(key)) >= 8)
    wrapped = wrap(key, keeper.service, keeper.services)
    assert wrapped.startswith(f"{keeper.service}:")
    assert is_wrapped(wrapped)
    assert unwrap(f' "{wrapped}"\n', keeper.services) == key
    assert wrap(key, keeper.service, keeper.services) != wrapped


def test_what_the_command_of_openbao_prints_for_a_key_opens(vault: Keeper) -> None:
    path = f"transit/encrypt/{vault.services.vault_transit_key}"
    done = subprocess.run(
        [bao_program(), "write", "-field=ciphertext", path, f"plaintext={KEY}"],
        env={"BAO_ADDR": str(vault.services.vault_addr), "BAO_TOKEN": TOKEN},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert unwrap(done.stdout, vault.services) == RAW


def test_a_data_key_that_the_service_made_opens(vault: Keeper, kms: Keeper) -> None:
    transit = vault.client.secrets.transit
    made = transit.generate_data_key(vault.services.vault_transit_key, key_type="plaintext")["data"]
    opened = unwrap(made["ciphertext"], vault.services)
    assert opened == base64.b64decode(made["plaintext"])
    made = kms.client.generate_data_key(
        KeyId=kms.services.aws_kms_key_id, KeySpec="AES_256",
        EncryptionContext={"purpose": "holdfast"},
    )  # fmt: skip
    wrapped = f"aws-kms:{base64.b64encode(made['CiphertextBlob']).decode()}"
    assert unwrap(wrapped, kms.services) == made["Plaintext"]


def test_a_wrapped_key_opens_after_the_transit_key_was_rotated_and_until_it_is_retired(
    vault: Keeper,
) -> None:
    transit, name = vault.client.secrets.transit, vault.services.vault_transit_key
    old = wrap(RAW, KeyService.VAULT, vault.services)
    transit.rotate_key(name)
    new = wrap(RAW, KeyService.VAULT, vault.services)
    assert (old[:9], new[:9]) == ("vault:v1:", "vault:v2:")
    assert unwrap(old, vault.services) == unwrap(new, vault.services) == RAW
    transit.update_key_configuration(name, min_decryption_version=2)
    assert "too old" in refusal(partial(unwrap, old, vault.services))
    assert unwrap(new, vault.services) == RAW


def test_a_wrapped_key_that_is_damaged_does_not_open(keeper: Keeper) -> None:
    wrapped = wrap(RAW, keeper.service, keeper.services)
    start = wrapped.rindex(":") + 1
    for place in (start, start + 20, (start + len(wrapped)) // 2, len(wrapped) - 5):
        other = "A" if wrapped[place] != "A" else "B"
        damaged = wrapped[:place] + other + wrapped[place + 1 :]
        # moto reads the id of its key from the blob: there it is an unknown key, or none.
        refusal(partial(unwrap, damaged, keeper.services))
    refusal(partial(unwrap, wrapped[:-8], keeper.services))
    assert unwrap(wrapped, keeper.services) == RAW


def test_a_key_wrapped_by_another_key_of_the_service_does_not_open(
    vault: Keeper, kms: Keeper
) -> None:
    vault.client.secrets.transit.create_key("another")
    another = replace(vault.services, vault_transit_key="another")
    said = refusal(partial(unwrap, wrap(RAW, KeyService.VAULT, vault.services), another))
    assert "VAULT_TRANSIT_KEY" in said
    key_id = kms.client.create_key()["KeyMetadata"]["KeyId"]
    another = replace(kms.services, aws_kms_key_id=key_id)
    said = refusal(partial(unwrap, wrap(RAW, KeyService.AWS_KMS, kms.services), another))
    assert "AWS_KMS_KEY_ID" in said


def test_a_key_wrapped_for_another_purpose_does_not_open(kms: Keeper) -> None:
    for context in ({}, {"purpose": "else"}, {"purpose": "holdfast", "more": "1"}):
        blob = kms.client.encrypt(
            KeyId=kms.services.aws_kms_key_id, Plaintext=RAW, EncryptionContext=context
        )["CiphertextBlob"]
        wrapped = f"aws-kms:{base64.b64encode(blob).decode()}"
        assert "purpose=holdfast" in refusal(partial(unwrap, wrapped, kms.services))
    assert unwrap(kms.seal(RAW), kms.services) == RAW


@pytest.mark.parametrize("size", [1, 16, 31, 33, 44, 64])
def test_what_is_no_key_is_neither_opened_nor_wrapped(keeper: Keeper, size: int) -> None:
    said = refusal(partial(unwrap, keeper.seal(os.urandom(size)), keeper.services))
    assert f"holds {size}" in said
    with pytest.raises(KeyFormatError, match=f"has {size}"):
        wrap(bytes(size), keeper.service, keeper.services)


def test_a_wrapped_key_that_is_not_random_is_refused_as_a_bare_one_is(keeper: Keeper) -> None:
    with pytest.raises(KeyFormatError, match="random"):
        unwrap(keeper.seal(bytes(32)), keeper.services)


def test_an_unknown_key_is_named_by_its_variable_and_not_made(vault: Keeper, kms: Keeper) -> None:
    unknown = replace(vault.services, vault_transit_key="mistyped")
    for ask in (partial(unwrap, VAULT_FORM), partial(wrap, RAW, KeyService.VAULT)):
        assert "VAULT_TRANSIT_KEY names no key" in refusal(partial(ask, unknown))
    assert "mistyped" not in vault.client.secrets.transit.list_keys()["data"]["keys"]
    nowhere = replace(vault.services, vault_transit_mount="nowhere")
    assert "VAULT_TRANSIT_MOUNT" in refusal(partial(unwrap, VAULT_FORM, nowhere))
    unknown = replace(kms.services, aws_kms_key_id="alias/mistyped")
    for ask in (partial(unwrap, kms.seal(RAW)), partial(wrap, RAW, KeyService.AWS_KMS)):
        assert "AWS_KMS_KEY_ID" in refusal(partial(ask, unknown))


def test_a_token_does_what_its_policy_allows_and_a_wrong_one_nothing(vault: Keeper) -> None:
    name, wrapped = vault.services.vault_transit_key, vault.seal(RAW)

    def may(verb: str) -> KeyServices:
        rule = f'path "transit/{verb}/{name}" {{ capabilities = ["update"] }}'
        vault.client.sys.create_or_update_policy(f"{verb}-{name}", rule)
        made = vault.client.auth.token.create(policies=[f"{verb}-{name}"], no_default_policy=True)
        return replace(vault.services, vault_token=made["auth"]["client_token"])

    opener, sealer = may("decrypt"), may("encrypt")
    assert unwrap(wrapped, opener) == RAW
    assert "VAULT_TOKEN" in refusal(partial(wrap, RAW, KeyService.VAULT, opener))
    assert unwrap(wrap(RAW, KeyService.VAULT, sealer), opener) == RAW
    assert "VAULT_TOKEN" in refusal(partial(unwrap, wrapped, sealer))
    for wrong in ("canary", "canary\nX-Vault-Token: canary", "canary\u20ac"):
        told = refusal(partial(unwrap, wrapped, replace(vault.services, vault_token=wrong)))
        assert "VAULT_TOKEN" in told


def test_a_key_in_a_namespace_opens_there_only(vault: Keeper) -> None:
    vault.client.adapter.post("/v1/sys/namespaces/team")
    services = replace(vault.services, vault_namespace="team")
    with closing(vault_client(str(services.vault_addr), "team").adapter) as adapter:
        adapter.post("/v1/sys/mounts/transit", json={"type": "transit"})
        adapter.post(f"/v1/transit/keys/{services.vault_transit_key}")
    wrapped = wrap(RAW, KeyService.VAULT, services)
    assert unwrap(wrapped, services) == RAW
    refusal(partial(unwrap, wrapped, vault.services))
    nowhere = replace(services, vault_namespace="nowhere")
    assert "VAULT_NAMESPACE" in refusal(partial(unwrap, wrapped, nowhere))


def test_wrong_missing_and_unsigned_credentials_of_aws_are_refused(
    kms: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    wrapped = kms.seal(RAW)
    switch = f"{kms.services.aws_endpoint_url}/moto-api/reset-auth"
    requests.post(switch, data="0", timeout=60)
    try:
        assert "AWS credentials" in refusal(partial(unwrap, wrapped, kms.services))
    finally:
        requests.post(switch, data="inf", timeout=60)
    assert unwrap(wrapped, kms.services) == RAW
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS credentials" in refusal(partial(unwrap, wrapped, kms.services))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS credentials" in refusal(partial(unwrap, wrapped, kms.services))
