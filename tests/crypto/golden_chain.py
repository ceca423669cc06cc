"""A chain and a checkpoint that were made once, to be made again byte by byte."""

from datetime import UTC, datetime
from typing import Final

from backend.crypto.chain import Event

REFERENCE_KEY: Final = bytes(range(32))
EVENTS: Final = [
    Event(
        1, datetime(2026, 11, 24, 1, 2, 3, 4, tzinfo=UTC), "audit_chain_begun", "done", "service",
        None, None, '{"rows":0,"last":0,"digest":""}',
    ),
    Event(
        2, datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), "export", "done",
        "5f4dcc3b5aa765d61d8327deb882cf99", "0cc175b9c0f1b6a831c399e269772661",
        "8c1f0e0f3c9d4f0e", '{"format":"json","note":"Größe, 文\\n"}',
    ),
    Event(3, datetime(1969, 7, 20, 20, 17, tzinfo=UTC), "", "", "", "", None, ""),
]  # fmt: skip
LINKS: Final = [
    "e1174409c984ce2ce7e9a729df4c15edde549700115b021308df4feea8eb9200",
    "b31fdf1651f4a306f25ad0b15a86219df345076593ccdf327530cbb35f85a32b",
    "a45391ad6f81e5d1dc3443f05b98eeb592bd3bcd220baab899b1cfc8523aeae6",
]
CHECKPOINT: Final = """\
{
 "format": "holdfast-audit-checkpoint",
 "version": 1,
 "statement": {
  "chain_id": "746bc7e21c4f6292",
  "event_id": 3,
  "link": "a45391ad6f81e5d1dc3443f05b98eeb592bd3bcd220baab899b1cfc8523aeae6",
  "at": "2026-11-24T02:00:00+00:00",
  "previous": {
   "event_id": 2,
   "at": "2026-11-23T02:00:00+00:00",
   "digest": "0000000000000000000000000000000000000000000000000000000000000000"
  }
 },
 "signature": {
  "algorithm": "Ed25519",
  "public_key": "ed25519:qdm49zsanWL_bj5j3o8Rv9VJYH3Hd5MPZ2SSU8K_5Ds",
  "value": "Dhh3ljTy_e167p8hSx9buTOhiBtuUkg_KJW8_iWiSyLwmOviIxIekwuvnJrAcDfqkD7C07fMTfrAShgGOo95Cw"
 }
}
"""
