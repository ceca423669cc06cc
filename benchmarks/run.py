"""`make bench`: measures Holdfast and its peers side by side, part by part."""

import importlib
import sys
from pathlib import Path
from typing import Final

# Run as a script, this folder's parent is not where Python looks.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# One module each, with `measure() -> Report`.
PARTS: Final = ("api", "loading", "crypto", "privacy", "backup", "retention")


def main(wanted: str) -> int:
    """Measure one part, or `all`; exit code 2 for a name that is none."""
    if wanted not in ("all", *PARTS):
        print(f"bench: WHAT is one of all, {', '.join(PARTS)}", file=sys.stderr)
        return 2
    for part in PARTS if wanted == "all" else (wanted,):
        report = importlib.import_module(f"benchmarks.{part}").measure()
        print(report.write(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "all"))
