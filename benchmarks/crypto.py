"""Encryption beside the bare call and the peers: values, cells through the ORM, files, rotation."""

from typing import Final

from benchmarks import crypto_cells, crypto_files, crypto_rotation, crypto_values
from benchmarks.report import Report

_ROTATIONS: Final = ", ".join(map(str, crypto_rotation.SIZES.values()))
_NOTES: Final = (
    (
        "the bare call is one AESGCM object with one nonce, which no product may do; text is held "
        "to the bare call with base64, as base64 alone costs more than the cipher"
    ),
    (
        "ours, Tink and the AWS Encryption SDK bind a value to its context; Fernet and "
        "SQLAlchemy-Utils cannot"
    ),
    (
        f"cells hold {crypto_cells.PLAINTEXT_CHARACTERS} characters and are read from a SQLite "
        f"file as mapped objects, {crypto_cells.BATCH:,} rows at a time"
    ),
    (
        "each file goes through each tool in a process of its own; the plain copy and Tink read "
        "blocks of 256 KiB, with which they were fastest"
    ),
    (
        "a rotation goes through all encrypted columns and blind indexes of generated bookings in "
        "a SQLite file on disk, 500 cells a transaction; beside it, the same reads and updates "
        "with executemany, without a cipher"
    ),
)


def measure() -> Report:
    """Measure each kind of encryption in rounds in which all contestants take turns."""
    figures, notes = [], []
    for part in (crypto_values, crypto_cells, crypto_files, crypto_rotation):
        found, told = part.measure()
        figures += found
        # A peer that is missing is missing in more than one part.
        notes += [note for note in told if note not in notes]
    return Report(
        part="crypto",
        title="Encryption beside its limits and peers",
        peer="the peer named",
        figures=figures,
        method=(
            f"CPU time, in rounds in which all take turns: {crypto_values.ROUNDS} for values, "
            f"{crypto_cells.ROUNDS} for cells, {crypto_files.ROUNDS} for files, after one that "
            f"warms up; {_ROTATIONS} for rotations, from the smallest; the same plaintexts for all"
        ),
        notes=[*_NOTES, *notes],
    )
