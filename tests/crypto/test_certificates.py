"""Certificates: what was signed verifies in any layout, and nothing else does, offline."""

import base64
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.crypto import certificates, signing
from backend.crypto.certificates import CertificateRefusedError, canonical, issue, verify
from backend.errors import KeyFormatError, RefusedError

PRIVATE: Final = bytes(range(32))
PUBLIC: Final = signing.public_key_of(PRIVATE)
OTHER: Final = bytes(range(1, 33))
STATEMENT: Final[dict[str, Any]] = {
    "erasure": "5f0c7a4e",
    "erased_at": "2026-03-01T12:00:00Z",
    "tables": [{"table": "guests", "deleted": 1}, {"table": "invoices", "retained": 2}],
    "scan": {"complete": True, "found": 0, "note": "Größe \u20ac\n\u000f\u007f\U0001f5dd"},
    "backups_until": None,
}
DOCUMENT: Final = issue(STATEMENT, PRIVATE)

# Made with the key 00 01 … 1f. Certificates outlive releases: this one must pass in each.
OLD: Final = """{
  "format": "holdfast-erasure-certificate",
  "version": 1,
  "statement": {
    "rows": 3,
    "note": "Größe"
  },
  "signature": {
    "algorithm": "Ed25519",
    "public_key": "ed25519:A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg",
    "value": "@@"
  }
}
""".replace(
    "@@",
    "-SamxnPJoEpzIcBoCB4rfKPwJFvs2tu5OgDnklBn1btUaM7BegnDnxMavjRNJtetEoyn7kMvtRyT5SWpFCgTCw",
)


def refusal(document: bytes, public_key: bytes = PUBLIC) -> str:
    with pytest.raises(CertificateRefusedError) as refused:
        verify(document, public_key)
    assert isinstance(refused.value, RefusedError)
    assert (refused.value.status, refused.value.code) == (422, "certificate_refused")
    assert "\n" not in refused.value.detail
    return refused.value.detail


def parts(document: bytes = DOCUMENT) -> dict[str, Any]:
    return dict(json.loads(document))


def packed(document: Any) -> bytes:
    return json.dumps(document).encode()


def reordered(value: Any) -> Any:
    """The same content, with the members of every object in the opposite order."""
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


# The canonical form


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # cyberphone/json-canonicalization (named by RFC 8785, appendix F), testdata/output, the
        # parts that hold no fraction and no name beyond ASCII: arrays, structures (its 56.0 as
        # 56), unicode, values, weird.
        ([56, {"d": True, "10": None, "1": []}], '[56,{"1":[],"10":null,"d":true}]'),
        (
            {"1": {"f": {"f": "hi", "F": 5}, "\n": 56}, "10": {}, "": "empty", "a": {},
             "111": [{"e": "yes", "E": "no"}], "A": {}},
            """{"":"empty","1":{"\\n":56,"f":{"F":5,"f":"hi"}},"10":{},\
"111":[{"E":"no","e":"yes"}],"A":{},"a":{}}""",
        ),
        ({"Unnormalized Unicode": "A\u030a"}, '{"Unnormalized Unicode":"A\u030a"}'),
        (
            {"string": "\u20ac$\u000f\nA'\u0042\"\\\\\"/", "literals": [None, True, False]},
            '{"literals":[null,true,false],"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}',
        ),
        (
            {"\r": "Carriage Return", "\n": "Newline", "1": "One", "</script>": "\u0080\u007f"},
            '{"\\n":"Newline","\\r":"Carriage Return","1":"One","</script>":"\u0080\u007f"}',
        ),
        # RFC 8785, 3.2.2.2: five escapes by letter, the other controls in lower case, no more.
        ("\b\t\n\f\r\0\x1f\u2028\ufeff", '"\\b\\t\\n\\f\\r\\u0000\\u001f\u2028\ufeff"'),
        # RFC 8785, appendix B: zero, and the largest exact integers.
        ([0, -0, 2**53 - 1, -(2**53) + 1], "[0,0,9007199254740991,-9007199254740991]"),
    ],
)  # fmt: skip
def test_the_canonical_form_is_that_of_rfc_8785(value: Any, expected: str) -> None:
    assert canonical(value).decode() == expected


def nest(depth: int) -> Any:
    return [nest(depth - 1)] if depth > 1 else []


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        (1.0, 1), (0.5, 5), (float("nan"), None), (float("inf"), 0), (2**53, 2**53 - 1),
        (-(2**53), 1 - 2**53), (b"bytes", "text"), ({1}, [1]), (object(), {}),
        (nest(16), nest(15)), ({"p\u00e9ch\u00e9": 1}, {"peche": "p\u00e9ch\u00e9"}),
        ({1: "a"}, {"1": "a"}), ({None: 1}, {"": 1}), ("\ud83d", "\U0001f5dd"),
        (["a\udfff"], ["a\uffff"]),
    ],
)  # fmt: skip
def test_what_implementations_spell_differently_is_not_signed(value: Any, fine: Any) -> None:
    assert verify(issue({"here": fine}, PRIVATE), PUBLIC) == {"here": fine}
    for inside in ({"here": value}, {"here": {"there": [value]}}):
        with pytest.raises(CertificateRefusedError):
            issue(inside, PRIVATE)


def test_a_key_that_is_none_signs_nothing() -> None:
    with pytest.raises(KeyFormatError):
        issue(STATEMENT, PRIVATE[:31])


# What passes


def test_a_certificate_reads_as_written_and_gives_its_statement_back() -> None:
    assert verify(DOCUMENT, PUBLIC) == STATEMENT
    assert DOCUMENT.endswith(b"}\n")
    assert '  "erasure": "5f0c7a4e",\n' in DOCUMENT.decode()
    assert list(parts()) == ["format", "version", "statement", "signature"]
    assert list(parts()["statement"]) == list(STATEMENT)


def test_a_certificate_of_the_first_release_passes() -> None:
    assert verify(OLD.encode(), PUBLIC) == {"rows": 3, "note": "Größe"}
    assert issue({"rows": 3, "note": "Größe"}, PRIVATE) == OLD.encode()
    assert certificates.signed_bytes(OLD.encode()).decode() == (
        "holdfast-erasure-certificate/1\n"
        '{"format":"holdfast-erasure-certificate","statement":{"note":"Größe","rows":3},'
        '"version":1}'
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abAB_1\n\x7f", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
statements = st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), values, max_size=4)
layouts: Final[tuple[Mapping[str, Any], ...]] = (
    {"indent": None, "separators": (",", ":")},
    {"indent": "\t", "ensure_ascii": False},
    {"indent": 7, "sort_keys": True},
)


@settings(max_examples=60)
@given(statement=statements)
@example(statement=STATEMENT)
@example(statement={})
def test_any_statement_verifies_in_any_layout_and_order_of_members(
    statement: dict[str, Any],
) -> None:
    document = issue(statement, PRIVATE)
    assert verify(document, PUBLIC) == statement
    signed = certificates.signed_bytes(document)
    for layout in layouts:
        for content in (parts(document), reordered(parts(document))):
            other = json.dumps(content, **layout).replace("\n", "\r\n").encode()
            assert verify(other, PUBLIC) == statement
            assert certificates.signed_bytes(other) == signed


# What does not


def content(document: bytes) -> str | None:
    """What a lenient reader finds in *document*; nothing if it is no JSON in UTF-8."""
    try:
        return json.dumps(json.loads(document.decode()), sort_keys=True)
    except ValueError:
        return None


def check_changed(changed: bytes) -> None:
    """It passes if it says the same in other letters, and is refused otherwise."""
    if content(changed) == content(DOCUMENT):
        assert verify(changed, PUBLIC) == STATEMENT
    else:
        refusal(changed)


def test_no_bit_of_a_certificate_can_be_flipped() -> None:
    for at in range(len(DOCUMENT)):
        for bit in range(8):
            check_changed(DOCUMENT[:at] + bytes([DOCUMENT[at] ^ 1 << bit]) + DOCUMENT[at + 1 :])


@settings(max_examples=200)
@given(
    at=st.integers(0, len(DOCUMENT)),
    cut=st.integers(0, 3),
    put=st.binary(max_size=3)
    | st.text(' \n",:0123456789{}[]truefals\\', max_size=3).map(str.encode),
)
@example(at=0, cut=0, put=b"\xef\xbb\xbf")
@example(at=1, cut=0, put=b" \t\r")
@example(at=len(DOCUMENT), cut=0, put=b"{}")
@example(at=len(DOCUMENT) - 1, cut=1, put=b"")
def test_no_change_of_what_a_certificate_says_passes(at: int, cut: int, put: bytes) -> None:
    check_changed(DOCUMENT[:at] + put + DOCUMENT[at + cut :])


@settings(max_examples=60)
@given(one=statements, other=statements)
@example(one={"a": 1}, other={"a": True})
@example(one={"a": 1}, other={"a": "1"})
@example(one={"a": None}, other={})
@example(one={"a": {"b": 1}}, other={"a": {}, "b": 1})
def test_a_signature_is_for_one_statement_only(one: dict[str, Any], other: dict[str, Any]) -> None:
    swapped = parts(issue(one, PRIVATE)) | {"statement": other}
    if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
        assert verify(packed(swapped), PUBLIC) == one
    else:
        assert "changed" in refusal(packed(swapped))


def test_another_key_is_refused_by_name_and_the_one_inside_is_not_trusted() -> None:
    theirs = signing.public_key_of(OTHER)
    document = issue(STATEMENT, OTHER)
    assert verify(document, theirs) == STATEMENT
    ids = [signing.key_id(theirs), signing.key_id(PUBLIC)]
    assert [name for name in refusal(document).replace(",", "").split() if name in ids] == ids
    # Their signature under our name, and ours under theirs.
    ours, forged = parts(), parts(document)
    forged["signature"]["public_key"] = ours["signature"]["public_key"]
    assert "changed" in refusal(packed(forged))
    ours["signature"]["public_key"] = signing.spell_public_key(theirs)
    assert ids[0] in refusal(packed(ours))


def test_a_key_in_whose_name_anyone_can_sign_checks_nothing() -> None:
    # The point of order 1: this signature fits every message under it, to the library.
    key, signature = b"\1" + bytes(31), b"\1" + bytes(63)
    Ed25519PublicKey.from_public_bytes(key).verify(signature, certificates.signed_bytes(DOCUMENT))
    forged = parts()
    forged["signature"]["public_key"] = "ed25519:" + signing.to_base64url(key)
    forged["signature"]["value"] = signing.to_base64url(signature)
    with pytest.raises(signing.PublicKeyRefusedError):
        verify(packed(forged), key)
    assert 'begins with "ed25519:"' in refusal(packed(forged))


def test_a_signature_for_another_purpose_is_no_certificates() -> None:
    bare = certificates.signed_bytes(DOCUMENT).removeprefix(certificates.CONTEXT)
    assert json.loads(bare)["statement"] == STATEMENT
    for context, passes in ((certificates.CONTEXT, True), (b"", False), (b"other/1\n", False)):
        made = parts()
        value = signing.to_base64url(signing.sign(context + bare, PRIVATE))
        made["signature"]["value"] = value
        if passes:
            assert verify(packed(made), PUBLIC) == STATEMENT
        else:
            assert "changed" in refusal(packed(made))


SPELLED: Final = signing.spell_public_key(PUBLIC)
VALUE: Final = parts()["signature"]["value"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "holdfast-erasure-certificat"}, "format"),
        ({"format": None}, "format"),
        ({"version": 2}, "version 1"),
        ({"version": True}, "version 1"),
        ({"version": "1"}, "version 1"),
        ({"version": None}, "version 1"),
        ({"statement": [STATEMENT]}, "and nothing else"),
        ({"statement": None}, "and nothing else"),
        ({"comment": "fine"}, "and nothing else"),
        ({"signature": None}, "signature"),
        ({"signature": []}, "signature"),
        ({"signature": ["algorithm", "public_key", "value"]}, "signature"),
        ({"signature": {"algorithm": "Ed25519", "public_key": SPELLED}}, "signature"),
    ],
)
def test_a_document_of_another_shape_is_refused(change: dict[str, Any], words: str) -> None:
    assert verify(packed(parts()), PUBLIC) == STATEMENT
    assert words in refusal(packed(parts() | change))
    for name in change:
        refusal(packed({key: value for key, value in parts().items() if key != name} | {"x": 1}))


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "ed25519"}, {"algorithm": "none"}, {"algorithm": None}, {"kid": "1"},
        {"public_key": signing.public_key_pem(PUBLIC)}, {"public_key": SPELLED + " "},
        {"public_key": SPELLED[:-1]}, {"public_key": 7}, {"public_key": None},
        {"value": VALUE + "=="}, {"value": VALUE[:-1]}, {"value": VALUE + "A"}, {"value": ""},
        {"value": VALUE[:-1] + chr(ord(VALUE[-1]) + 1)}, {"value": "\u00e9" * 86},
        {"value": "\ud800"}, {"value": 1}, {"value": [VALUE]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_signature_spelled_otherwise_is_refused(change: dict[str, Any]) -> None:
    certificate = parts()
    assert verify(packed(certificate), PUBLIC) == STATEMENT
    certificate["signature"] |= change
    assert "the signature of a certificate has" in refusal(packed(certificate))


def text_with(member: str) -> bytes:
    """A certificate whose statement has *member* besides, as it stands."""
    return DOCUMENT.replace(b'"statement": {', b'"statement": {' + member.encode() + b",")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (DOCUMENT.decode().encode("utf-16"), "not JSON"),
        (DOCUMENT + DOCUMENT, "not JSON"),
        (b"[]", "format"),
        (b'"holdfast-erasure-certificate"', "format"),
        (text_with('"erasure": "other"'), "two members"),
        (text_with('"x": {"y": 1, "\\u0079": 2}'), "two members"),
        (DOCUMENT.replace(b"{", b'{"version": 1,', 1), "two members"),
        (text_with('"x": 1.0'), "integers"),
        (text_with('"x": 1e2'), "integers"),
        (text_with('"x": NaN'), "integers"),
        (text_with('"x": -Infinity'), "integers"),
        (text_with('"x": 9007199254740992'), "integers"),
        (text_with('"x": 99999999999999999'), "integers"),
        (text_with('"x": ' + "9" * 1_000_000), "integers"),
        (text_with('"\u00e9": 1'), "ASCII"),
        (text_with('"x": "\\ud800"'), "surrogate"),
        (text_with('"x": ' + "[" * 16 + "]" * 16), "16 deep"),
        (text_with('"x": ' + "[" * 400_000), "16 deep"),
        (text_with('"x": ' + '{"a":' * 150_000), "16 deep"),
        (b"[" * 2**20, "16 deep"),
        (DOCUMENT + b" " * (2**20 + 1 - len(DOCUMENT)), "at most 1048576 bytes"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_is_no_plain_json_is_refused(document: bytes, words: str) -> None:
    # The same places with what is allowed there get as far as the signature.
    assert "changed" in refusal(text_with('"x": ' + "[" * 15 + "9007199254740991" + "]" * 15))
    assert verify(DOCUMENT + b" " * (2**20 - len(DOCUMENT)), PUBLIC) == STATEMENT
    assert words in refusal(document)


def test_a_refusal_does_not_show_what_the_document_says() -> None:
    for document in (DOCUMENT[:-9], text_with('"canary": 1.5'), text_with('"canary": "canary"')):
        assert "canary" not in refusal(document)
        assert "5f0c7a4e" not in refusal(document)


def test_more_than_can_be_read_again_is_not_issued() -> None:
    assert verify(issue({"x": "a" * 1_000_000}, PRIVATE), PUBLIC)
    with pytest.raises(CertificateRefusedError, match="at most 1048576 bytes"):
        issue({"x": "a" * 2**20}, PRIVATE)


# Nothing of ours is needed


def test_openssl_verifies_the_signed_bytes(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("this machine lacks openssl")
    (tmp_path / "pub.pem").write_text(signing.public_key_pem(PUBLIC))
    # The message as an auditor makes it, from the format's description alone.
    signed = {name: member for name, member in parts().items() if name != "signature"}
    line = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    message = f"holdfast-erasure-certificate/1\n{line}".encode()
    assert message == certificates.signed_bytes(DOCUMENT)
    (tmp_path / "sig").write_bytes(base64.urlsafe_b64decode(VALUE + "=="))
    command = "openssl pkeyutl -verify -pubin -inkey pub.pem -rawin -in message -sigfile sig"
    for text, code in ((message, 0), (message.replace(b"5f0c", b"5f0d"), 1)):
        (tmp_path / "message").write_bytes(text)
        run = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=False)
        assert run.returncode == code, run.stderr
