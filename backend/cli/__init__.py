"""Arguments in, lines out: parse, call one service method, show the answer."""

from typing import Final

# Exit codes, beside 0: done.
FAILED: Final = 1
REFUSED: Final = 2
