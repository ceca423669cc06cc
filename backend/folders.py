"""Folders for the service's own files: for its owner alone, and never made by looking."""

import tempfile
from pathlib import Path


def make_private_folder(path: Path) -> None:
    """Make *path*, and what is missing above it, with mode 0700 whatever the umask."""
    for folder in reversed([above for above in path.parents if not above.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def may_be_folder(path: Path) -> bool:
    """Say whether *path* is, or can be made, a folder that we may write; leave nothing there."""
    there = next(above for above in (path, *path.parents) if above.exists())
    try:
        # Rights alone do not tell: a file system may be read-only, or take no files at all.
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False
