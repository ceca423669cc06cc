"""
Certificates: a statement that anyone with the public key can check, years later and offline.

A certificate is one JSON document:

    {"format": "holdfast-erasure-certificate", "version": 1, "statement": {...},
     "signature": {"algorithm": "Ed25519", "public_key": "ed25519:...", "value": BASE64URL}}

What is signed: the line `holdfast-erasure-certificate/1` and a line feed, then the canonical form
(RFC 8785) of the object of `format`, `version` and `statement`; so white space and the order of
members do not matter. The line keeps a signature by the same key for another purpose from passing
for a certificate. The public key inside is a note to the reader, and never what is trusted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from backend.crypto import signing
from backend.errors import RefusedError

FORMAT: Final = "holdfast-erasure-certificate"
VERSION: Final = 1
CONTEXT: Final = f"{FORMAT}/{VERSION}\n".encode()
MAX_BYTES: Final = 2**20
MAX_DEPTH: Final = 16
# RFC 7493, 2.2: beyond it readers whose numbers are doubles no longer see the same integer.
MAX_INTEGER: Final = 2**53 - 1
_MEMBERS: Final = {"format", "version", "statement", "signature"}


class CertificateRefusedError(RefusedError):
    """The certificate is none, was changed, or is not by the key that is trusted."""

    code, title = "certificate_refused", "The certificate was refused"


@dataclass(frozen=True, slots=True)
class _Certificate:
    statement: dict[str, Any]
    signer: bytes
    signature: bytes


def issue(statement: Mapping[str, Any], private_key: bytes) -> bytes:
    """
    Sign *statement* and return the certificate: indented JSON that ends with a line feed.

    Args:
        statement: What `canonical` takes, with no personal data: a certificate is kept for ever.

    Raises:
        CertificateRefusedError: It holds something else, or makes more than 1 MiB.
        KeyFormatError: The key is not 32 bytes.
    """
    plain = _plain(statement)
    signature = signing.sign(_signed(plain), private_key)
    certificate = {
        "format": FORMAT,
        "version": VERSION,
        "statement": plain,
        "signature": {
            "algorithm": "Ed25519",
            "public_key": signing.spell_public_key(signing.public_key_of(private_key)),
            "value": signing.to_base64url(signature),
        },
    }
    document = json.dumps(certificate, indent=2, ensure_ascii=False).encode() + b"\n"
    _check_size(document)
    return document


def verify(document: bytes, public_key: bytes) -> Mapping[str, Any]:
    """
    Return the statement of a certificate that was signed with the private half of *public_key*.

    Raises:
        CertificateRefusedError: It is no certificate, by another key, or changed.
        PublicKeyRefusedError: Signatures by *public_key* would prove nothing.
    """
    expected = signing.key_id(public_key)
    certificate = _read(document)
    if certificate.signer != public_key:
        raise CertificateRefusedError(
            f"the certificate is by key {signing.key_id(certificate.signer)}, "
            f"and the key to check it with is {expected}"
        )
    try:
        signing.verify(_signed(certificate.statement), certificate.signature, public_key)
    except signing.SignatureRefusedError:
        raise CertificateRefusedError(
            f"the certificate was changed after key {expected} signed it, or never signed by it"
        ) from None
    return certificate.statement


def signed_bytes(document: bytes) -> bytes:
    """
    Return what the signature in *document* is over, for a check with openssl or any other tool.

    It says nothing about whether the signature fits.

    Raises:
        CertificateRefusedError: It is no certificate.
    """
    return _signed(_read(document).statement)


def canonical(value: Any) -> bytes:
    """
    Write *value* in the canonical form of RFC 8785.

    Args:
        value: Text, integers below 2**53, booleans, null, lists, and objects with ASCII names, at
            most 16 deep. Numbers with a fraction are refused: their spelling is where
            implementations differ. Among ASCII names every order by code units is the same.

    Raises:
        CertificateRefusedError: It holds something else.
    """
    return _compact(_plain(value))


def _compact(plain: Any) -> bytes:
    text = json.dumps(plain, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode()


def _signed(plain: dict[str, Any]) -> bytes:
    return CONTEXT + _compact({"format": FORMAT, "version": VERSION, "statement": plain})


def _read(document: bytes) -> _Certificate:
    _check_size(document)
    certificate = _parse(document)
    if not isinstance(certificate, dict) or certificate.get("format") != FORMAT:
        raise CertificateRefusedError(f'this is no certificate: its format is not "{FORMAT}"')
    version = certificate.get("version")
    # `True == 1` in Python.
    if isinstance(version, bool) or version != VERSION:
        raise CertificateRefusedError(f"only certificates of version {VERSION} can be read here")
    statement, signature = certificate.get("statement"), certificate.get("signature")
    if set(certificate) != _MEMBERS or not isinstance(statement, dict):
        raise CertificateRefusedError(
            "a certificate has format, version, statement and signature, and nothing else"
        )
    return _Certificate(_plain(statement), *_read_signature(signature))


def _read_signature(signature: Any) -> tuple[bytes, bytes]:
    """Return who is said to have signed, and the signature."""
    match signature:
        case {"algorithm": "Ed25519", "public_key": str(spelled), "value": str(value), **rest} if (
            not rest
        ):
            try:
                signer = signing.parse_public_key(spelled)
                raw = signing.from_base64url(value, signing.SIGNATURE_BYTES)
            except (ValueError, signing.PublicKeyRefusedError):
                pass
            else:
                # A certificate has one spelling of the key, not those of a file for openssl.
                if signing.spell_public_key(signer) == spelled:
                    return signer, raw
    raise CertificateRefusedError(
        'the signature of a certificate has algorithm "Ed25519", a public_key that begins with '
        f'"{signing.PUBLIC_KEY_PREFIX}" and a value of 86 characters, and nothing else'
    )


def _parse(document: bytes) -> Any:
    """Read JSON with `json`: `orjson` keeps the last of two equal names, and rounds integers."""
    try:
        # `json` itself would take other encodings, and halves of surrogate pairs.
        return json.loads(
            document.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except ValueError:
        # `from None`: the error holds the document.
        raise CertificateRefusedError("the certificate is not JSON in UTF-8") from None
    except RecursionError:
        raise _too_deep() from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise CertificateRefusedError("an object in the certificate has two members of one name")
    return members


def _integer(digits: str) -> int:
    # By length first: reading a million digits takes long.
    if len(digits) > len(str(-MAX_INTEGER)):
        _refuse_number(digits)
    return int(digits)


def _refuse_number(_: str) -> NoReturn:
    raise CertificateRefusedError("a certificate holds no numbers but integers below 2**53")


def _plain(value: Any, depth: int = 1) -> Any:
    """Copy *value* as what JSON knows, and refuse the rest."""
    match value:
        case dict() | list() | tuple() | Mapping() if depth > MAX_DEPTH:
            raise _too_deep()
        case Mapping():
            return {_name(name): _plain(member, depth + 1) for name, member in value.items()}
        case list() | tuple():
            return [_plain(item, depth + 1) for item in value]
        case str():
            return _text(value)
        case None | bool():
            return value
        case int():
            return value if abs(value) <= MAX_INTEGER else _refuse_number("")
    raise CertificateRefusedError(f"a certificate cannot hold a {type(value).__name__}")


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.isascii():
        raise CertificateRefusedError("names in a certificate are ASCII text")
    return name


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CertificateRefusedError("text in a certificate has half a surrogate pair") from None
    return text


def _too_deep() -> CertificateRefusedError:
    return CertificateRefusedError(f"a certificate nests at most {MAX_DEPTH} deep")


def _check_size(document: bytes) -> None:
    if len(document) > MAX_BYTES:
        raise CertificateRefusedError(
            f"a certificate has at most {MAX_BYTES} bytes, and this {len(document)}"
        )
