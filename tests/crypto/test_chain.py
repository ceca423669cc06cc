"""The chain's bytes: what a link is made over has one spelling, and stays as it is."""

import hashlib
import hmac
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from backend.crypto.chain import START, Event, canonical, chain_keys, link
from backend.crypto.checkpoints import (
    Checkpoint,
    CheckpointRefusedError,
    ForeignCheckpointError,
    read_checkpoint,
)
from backend.crypto.signing import new_signing_key, public_key_of
from tests.crypto.golden_chain import CHECKPOINT, EVENTS, LINKS, REFERENCE_KEY

KEYS = chain_keys(REFERENCE_KEY)
PUBLIC = public_key_of(KEYS.signing)
MADE = Checkpoint(
    KEYS.chain_id, 3, LINKS[-1], datetime(2026, 11, 24, 2, tzinfo=UTC),
    {"event_id": 2, "at": "2026-11-23T02:00:00+00:00", "digest": "0" * 64},
)  # fmt: skip

# From few letters, so that texts which run into each other come about.
texts = st.text("ab\0\xff", max_size=3)
events = st.builds(
    Event, st.integers(0, 2), st.sampled_from([e.at for e in EVENTS]), texts, texts, texts,
    st.none() | texts, st.none() | texts, st.none() | texts,
)  # fmt: skip


def test_fixed_events_under_a_fixed_key_have_fixed_links() -> None:
    previous, made = START, []
    for each in EVENTS:
        previous = link(KEYS.link, previous, canonical(each))
        made.append(previous.hex())
    assert made == LINKS


def test_a_link_can_be_made_from_what_is_written_about_it() -> None:
    second = EVENTS[1]
    microseconds = (second.at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    message = bytes.fromhex(LINKS[0])
    message += (2).to_bytes(8, "big") + microseconds.to_bytes(8, "big")
    for text in second[2:]:
        if text is None:
            message += b"\xff" * 4
        else:
            message += len(text.encode()).to_bytes(4, "big") + text.encode()
    assert hmac.new(KEYS.link, message, hashlib.sha256).hexdigest() == LINKS[1]


@given(events, events)
def test_two_events_have_the_same_bytes_only_if_they_are_the_same(one: Event, other: Event) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)


@given(st.lists(events, min_size=1, max_size=3), st.lists(events, min_size=1, max_size=3))
def test_two_trails_have_the_same_bytes_only_if_they_are_the_same(
    one: list[Event], other: list[Event]
) -> None:
    assume(one != other)
    assert b"".join(map(canonical, one)) != b"".join(map(canonical, other))


def test_a_moment_is_the_same_in_every_zone_and_another_a_microsecond_later() -> None:
    first = EVENTS[0]
    elsewhere = first._replace(at=first.at.astimezone(timezone(timedelta(hours=5))))
    assert canonical(elsewhere) == canonical(first)
    later = first._replace(at=first.at + timedelta(microseconds=1))
    assert canonical(later) != canonical(first)


@pytest.mark.parametrize(
    "event",
    [
        EVENTS[0]._replace(id=2**63),
        EVENTS[0]._replace(action="\ud800"),
        EVENTS[0]._replace(detail="\udfff"),
    ],
)
def test_what_no_event_can_be_has_no_bytes(event: Event) -> None:
    with pytest.raises(ValueError, match=r"number|surrogates"):
        canonical(event)


def test_each_purpose_and_each_installation_has_keys_of_its_own() -> None:
    other = chain_keys(bytes(32))
    each = [KEYS.link, KEYS.older, KEYS.signing, other.link, other.older, other.signing]
    assert len({*each, REFERENCE_KEY}) == 7
    assert KEYS.chain_id != other.chain_id
    for shown in (repr(KEYS), str(KEYS)):
        assert not any(key.hex() in shown or repr(key) in shown for key in each)


def test_a_checkpoint_has_fixed_bytes_and_says_what_it_was_made_of() -> None:
    assert MADE.document(KEYS.signing) == CHECKPOINT.encode()
    assert read_checkpoint(CHECKPOINT.encode(), PUBLIC) == MADE


def test_a_checkpoint_of_another_key_is_told_from_a_changed_one() -> None:
    with pytest.raises(ForeignCheckpointError):
        read_checkpoint(MADE.document(new_signing_key()), PUBLIC)
    for old, new in (('"event_id": 3', '"event_id": 4'), ("T02", "T03"), ('n": 1', 'n": 2')):
        changed = CHECKPOINT.replace(old, new)
        assert changed != CHECKPOINT
        with pytest.raises(CheckpointRefusedError) as refused:
            read_checkpoint(changed.encode(), PUBLIC)
        assert not isinstance(refused.value, ForeignCheckpointError)


@given(st.binary(max_size=200) | st.sampled_from([b"{}", b"[]", b"1", b'{"statement": 1.5}']))
def test_what_is_no_checkpoint_is_refused(document: bytes) -> None:
    with pytest.raises(CheckpointRefusedError):
        read_checkpoint(document, PUBLIC)


@given(st.integers(0, len(CHECKPOINT) - 1), st.integers(1, 127))
def test_a_checkpoint_with_one_byte_changed_says_the_same_or_nothing(at: int, by: int) -> None:
    document = bytearray(CHECKPOINT.encode())
    document[at] ^= by
    try:
        read = read_checkpoint(bytes(document), PUBLIC)
    except CheckpointRefusedError:
        return
    assert read == MADE
