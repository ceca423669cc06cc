"""
Ask for known weaknesses of what is locked, with pip-audit, and say plainly what could not be asked.

Exit code 0: all were asked about and none is known; 1: some are known; 3: not all could be asked.
"""  # noqa: INP001 - a script

import json
import subprocess
import sys
from typing import Any

CLEAN, WEAK, UNASKED = 0, 1, 3


def ask(lock: str) -> list[dict[str, Any]] | None:
    """Return what is known of each package in the file *lock*; `None` if nobody answers."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "-r", lock]
    quietly = ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, *quietly], capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None
    return packages


def judge(lock: str, packages: list[dict[str, Any]] | None) -> tuple[int, str]:
    """Put what was found about the file *lock* in words, with its exit code."""
    if packages is None:
        return UNASKED, f"{lock}: NOT AUDITED, the list of weaknesses cannot be reached from here"
    weak = [f"{p['name']} {p['version']}: {_names(p)}" for p in packages if p.get("vulns")]
    unasked = sum("skip_reason" in p for p in packages)
    if weak:
        return WEAK, "\n  ".join([f"{lock}: {len(weak)} with known weaknesses", *weak])
    if unasked:
        return UNASKED, f"{lock}: {unasked} of {len(packages)} packages NOT AUDITED, not known here"
    return CLEAN, f"{lock}: {len(packages)} packages, no weakness known"


def _names(package: dict[str, Any]) -> str:
    return ", ".join(weakness["id"] for weakness in package["vulns"])


def main(locks: list[str]) -> int:
    """Audit every file; a weakness outweighs what could not be asked."""
    found = [judge(lock, ask(lock)) for lock in locks]
    sys.stdout.write("".join(f"{words}\n" for _code, words in found))
    codes = {code for code, _words in found}
    return WEAK if WEAK in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
