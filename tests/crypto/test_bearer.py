"""Bearer tokens: one shape passes, and whatever else is answered with the same words."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import count
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any, Final, Self

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jose import jwt

from backend.crypto import bearer
from backend.crypto.bearer import Claims, SignIn, TokenKeys
from backend.errors import UnauthenticatedError
from tests.conftest import JWT_SECRET

NOW: Final = datetime.now(UTC).replace(microsecond=0)
SECOND: Final = int(NOW.timestamp())
# Longer than any suite takes: every refusal has its own reason to the end.
LIFETIME: Final = timedelta(days=1)
END: Final = SECOND + int(LIFETIME.total_seconds())
KEYS: Final = TokenKeys(JWT_SECRET)
HEADER: Final[dict[str, Any]] = {"alg": "HS256", "typ": "at+jwt", "kid": KEYS.key_id}
SIGN_IN: Final = SignIn(7, "a-sign-in", NOW)
CLAIMS: Final[dict[str, Any]] = {
    "sub": "7",
    "iss": "holdfast",
    "aud": "holdfast-api",
    "iat": SECOND,
    "nbf": SECOND,
    "exp": END,
    "jti": "a-random-number",
    "sid": "a-sign-in",
    "auth_time": SECOND,
}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def sign(head: str, body: str, secret: str = JWT_SECRET, digest: str = "sha256") -> str:
    """Sign by hand, so that tokens which no library would issue carry a valid signature."""
    signature = hmac.digest(secret.encode(), f"{head}.{body}".encode(), digest)
    return f"{head}.{body}.{b64(signature)}"


def token(header: object = HEADER, **changed: Any) -> str:
    """A token of ours but for *changed* claims; `...` leaves one out."""
    claims = {name: value for name, value in (CLAIMS | changed).items() if value is not ...}
    return sign(b64(json.dumps(header).encode()), b64(json.dumps(claims).encode()))


def raw(header: bytes, claims: bytes) -> str:
    return sign(b64(header), b64(claims))


def refused(text: str) -> None:
    with pytest.raises(UnauthenticatedError) as refusal:
        KEYS.verify(text)
    assert type(refusal.value) is UnauthenticatedError
    assert refusal.value.detail == "the bearer token is not valid"
    assert refusal.value.extra == {}
    # Nothing of the cause is shown where an error is printed.
    assert refusal.value.__suppress_context__


def test_an_issued_token_passes_and_says_whose_it_is() -> None:
    text = KEYS.issue(SIGN_IN, lifetime=LIFETIME, now=NOW)
    claims = KEYS.verify(text)
    assert (claims.sign_in, claims.issued_at) == (SIGN_IN, NOW)
    assert claims.expires_at == NOW + LIFETIME
    again = KEYS.issue(SIGN_IN, lifetime=LIFETIME, now=NOW)
    assert KEYS.verify(again).token_id != claims.token_id
    assert len(claims.token_id) >= 20


def test_a_token_made_by_hand_passes_so_each_refusal_below_has_one_reason() -> None:
    assert KEYS.verify(token()) == Claims(SIGN_IN, "a-random-number", NOW, NOW + LIFETIME)
    assert len(token(sub="1" + "0" * 17)) < bearer.MAX_TOKEN_CHARS


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_token_without_one_of_the_claims_is_refused(claim: str) -> None:
    refused(token(**{claim: ...}))
    refused(token(**{claim: None}))


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("aud", "another-api"),
        ("aud", ["holdfast-api"]),
        ("aud", ["holdfast-api", "another-api"]),
        ("aud", {"holdfast-api": 1}),
        ("aud", ""),
        ("iss", "another"),
        ("iss", ["holdfast"]),
        ("iss", ""),
        ("sub", 7),
        ("sub", ""),
        ("sub", "0"),
        ("sub", "-7"),
        ("sub", "07"),
        ("sub", "7 "),
        ("sub", "7\n"),
        ("sub", "7.0"),
        ("sub", "\u0667"),
        ("sub", "9" * 19),
        ("sub", ["7"]),
        ("sub", True),
        ("jti", ""),
        ("jti", 7),
        ("jti", ["a"]),
        ("sid", ""),
        ("sid", 7),
        ("sid", ["a"]),
        ("auth_time", str(SECOND)),
        ("auth_time", float(SECOND)),
        ("auth_time", True),
        ("auth_time", 10**30),
        ("exp", str(END)),
        ("exp", END + 0.5),
        ("exp", True),
        ("exp", 10**30),
        ("exp", 10**13),
        ("exp", {}),
        ("iat", str(SECOND)),
        ("iat", float(SECOND)),
        ("iat", True),
        ("iat", []),
        ("iat", -(10**30)),
        ("nbf", "soon"),
        ("nbf", []),
        ("nbf", 10**30),
    ],
    # By number: the time is in some of them, and workers must agree on the names.
    ids=map(str, count()),
)
def test_a_claim_of_the_wrong_value_or_type_is_refused(claim: str, value: object) -> None:
    refused(token(**{claim: value}))


class Stopped(datetime):
    """A clock that stands while seconds are counted."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls.fromtimestamp(SECOND, tz)


def test_a_token_passes_between_its_times_only_give_or_take_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (jwt, bearer):
        monkeypatch.setattr(module, "datetime", Stopped)
    for passes in ({"exp": SECOND - 5}, {"nbf": SECOND + 5}, {"iat": SECOND + 5}):
        KEYS.verify(token(**passes))
    for late_or_early in (
        {"exp": SECOND - 6},
        {"exp": 0},
        {"exp": -1},
        {"nbf": SECOND + 6},
        {"iat": SECOND + 6},
        # An age that a clock set back would give.
        {"iat": SECOND + 3600, "exp": SECOND + 7200},
    ):
        refused(token(**late_or_early))


@pytest.mark.parametrize(
    "header",
    [
        {name: HEADER[name] for name in ("alg", "kid")},
        {name: HEADER[name] for name in ("typ", "kid")},
        {name: HEADER[name] for name in ("alg", "typ")},
        HEADER | {"typ": "JWT"},
        HEADER | {"typ": "AT+JWT"},
        HEADER | {"typ": ["at+jwt"]},
        HEADER | {"alg": "hs256"},
        HEADER | {"alg": "none"},
        HEADER | {"alg": None},
        HEADER | {"kid": HEADER["kid"].upper() + " "},
        HEADER | {"kid": [HEADER["kid"]]},
        HEADER | {"kid": None},
        HEADER | {"kid": 7},
        HEADER | {"kid": "0" * 16},
        HEADER | {"crit": ["exp"]},
        HEADER | {"crit": []},
        HEADER | {"kid": "../../dev/null"},
        HEADER | {"jwk": {"kty": "oct", "k": b64(JWT_SECRET.encode())}},
        HEADER | {"zip": "DEF"},
        [HEADER],
        "HS256",
        None,
        {},
    ],
)
def test_any_other_header_is_refused_although_the_signature_is_right(header: object) -> None:
    refused(token(header))


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_another_algorithm_is_refused_though_the_secret_is_known(algorithm: str) -> None:
    refused(
        jwt.encode(CLAIMS, JWT_SECRET, algorithm=algorithm, headers=HEADER | {"alg": algorithm})
    )
    head, body = (b64(json.dumps(part).encode()) for part in (HEADER, CLAIMS))
    refused(sign(head, body, digest=algorithm.replace("HS", "sha")))


def test_a_token_without_a_signature_or_of_another_key_is_refused() -> None:
    head, body, signature = token().split(".")
    none = b64(json.dumps(HEADER | {"alg": "none"}).encode())
    for text in (f"{none}.{body}.", f"{none}.{body}.{signature}", f"{head}.{body}."):
        refused(text)
    refused(sign(head, body, secret=JWT_SECRET + "x"))
    refused(sign(head, body, secret=""))
    refused(f"{head}.{body}.{b64(hashlib.sha256(f'{head}.{body}'.encode()).digest())}")
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    refused(jwt.encode(CLAIMS, pem, algorithm="RS256", headers=HEADER | {"alg": "RS256"}))


def test_a_changed_part_is_refused() -> None:
    text = token()
    head, _, signature = text.split(".")
    mine = b64(json.dumps(CLAIMS | {"sub": "1"}).encode())
    refused(f"{head}.{mine}.{signature}")
    for at, letter in enumerate(text):
        refused(text[:at] + ("A" if letter != "A" else "B") + text[at + 1 :])


def test_another_spelling_of_a_valid_token_is_refused() -> None:
    """A token is revoked by its `jti`, and still two spellings of one are one too many."""
    text = token()
    head, body, signature = text.split(".")
    # 32 bytes take 43 characters, and two bits of the last are unused.
    alphabet = f"{ascii_uppercase}{ascii_lowercase}{digits}-_"
    for bits in (1, 2, 3):
        respelt = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ bits]
        padded = [value + "=" for value in (respelt, signature)]
        assert len({base64.urlsafe_b64decode(value) for value in padded}) == 1
        refused(f"{head}.{body}.{respelt}")
    for other in (
        f"{head}.{body}.{signature}=",
        f"{head}=.{body}.{signature}",
        f"{text}\n",
        f" {text}",
        f"{text}.",
        f".{text}",
        f"{head}.{body}.{signature[:20]}!{signature[20:]}",
        f"{head}.{body}.{signature[:20]} {signature[20:]}",
        sign(f"{head}==", body),
        sign(head, f"{body[:10]}\n{body[10:]}"),
    ):
        refused(other)


def test_a_header_or_body_nested_so_deep_that_json_gives_up_is_refused() -> None:
    deep = b"[" * 1300
    with pytest.raises(RecursionError):
        json.loads(deep)
    # Short enough to get as far as being parsed.
    for text in (raw(deep, b"{}"), raw(json.dumps(HEADER).encode(), deep)):
        assert len(text) <= bearer.MAX_TOKEN_CHARS
        refused(text)
    refused(raw(b'{"a":' * 4000 + b"1" + b"}" * 4000, b"{}"))


def test_a_token_longer_than_the_limit_is_refused_and_one_below_it_passes() -> None:
    room = bearer.MAX_TOKEN_CHARS - len(token(extra=""))
    KEYS.verify(token(extra="x" * (room * 3 // 4 - 4)))
    refused(token(extra="x" * room))
    refused("A" * 10_000_000)


@settings(max_examples=150)
@given(st.one_of(st.text(max_size=80), st.from_regex(r"[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]*){0,4}")))
@example("")
@example("..")
@example("...")
@example("null.null.null")
@example("bnVsbA.bnVsbA.bnVsbA")
@example("é.é.é")
@example("\ud800.a.a")
@example("_w._w._w")
def test_whatever_text_comes_is_refused_with_the_same_words(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(
    "claims",
    [b"null", b"[]", b'"sub"', b"7", b"{", b"\xff\xfe", b"{}", b'{"exp": NaN}', b"1" * 900],
)
def test_a_signed_body_that_is_no_set_of_claims_is_refused(claims: bytes) -> None:
    refused(raw(json.dumps(HEADER).encode(), claims))


def test_over_http_every_refusal_is_the_same_401(client: TestClient, admin: dict[str, str]) -> None:
    assert client.get("/auth/me", headers=admin).status_code == 200
    answers = set()
    for text in (
        token(exp=SECOND - 60),
        token(aud=...),
        token({"alg": "none", "typ": "at+jwt"}),
        raw(b"[" * 1000, b"{}"),
        "A" * 4000,
        "nonsense",
        # Valid, and of nobody.
        token(sub="999"),
    ):
        answer = client.get("/auth/me", headers={"Authorization": f"Bearer {text}"})
        body = answer.json()
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        answers.add((answer.status_code, body["code"], body["detail"], len(body)))
    assert answers == {(401, "unauthenticated", "the bearer token is not valid", 6)}


def test_a_key_that_was_replaced_still_opens_and_signs_nothing_and_a_third_opens_nothing() -> None:
    old, new, third = (
        TokenKeys("o1d" * 20),
        TokenKeys("n3w" * 20, ["o1d" * 20]),
        TokenKeys("x" * 40),
    )
    lifetime = timedelta(minutes=5)
    # The suite may have been imported long ago.
    now = datetime.now(UTC)
    before, after = (keys.issue(SIGN_IN, lifetime=lifetime, now=now) for keys in (old, new))
    assert new.verify(before).sign_in == new.verify(after).sign_in == SIGN_IN
    assert len({old.key_id, new.key_id, third.key_id}) == 3
    for keys, text in ((old, after), (third, before), (third, after)):
        with pytest.raises(UnauthenticatedError):
            keys.verify(text)


def test_a_token_that_names_another_key_of_the_list_than_signed_it_is_refused() -> None:
    keys = TokenKeys("n3w" * 20, ["o1d" * 20])
    old = TokenKeys("o1d" * 20)
    head = b64(json.dumps(HEADER | {"kid": old.key_id}).encode())
    body = b64(json.dumps(CLAIMS).encode())
    assert keys.verify(sign(head, body, secret="o1d" * 20)).sign_in == SIGN_IN
    with pytest.raises(UnauthenticatedError):
        keys.verify(sign(head, body, secret="n3w" * 20))


def test_the_keys_do_not_print() -> None:
    assert JWT_SECRET not in repr(KEYS)
    assert KEYS.key_id in repr(KEYS)
