"""A chart as SVG: one bar per figure, as a ratio to the peer, with the aim marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 860
_LEFT: Final = 250
_RIGHT: Final = 640
_TOP: Final = 84
_ROW: Final = 38
_BAR: Final = 18
# Rows that stand together under one heading.
_CLOSE_ROW: Final = 22
_CLOSE_BAR: Final = 12
_HEADING: Final = 34
_BOTTOM: Final = 58
_INK, _FAINT, _PEER = "#24292f", "#6e7781", "#8c959f"
_MET, _NOT_MET, _NEUTRAL = "#1a7f64", "#bc4c00", "#54749c"


@dataclass(frozen=True)
class Bar:
    """
    One figure: its ratio, the least and most of any round, and both values in words.

    Bars that follow each other with the same *section* share one heading.
    """

    label: str
    ratio: float
    low: float
    high: float
    values: str
    aim: float | None
    met: bool | None
    section: str = ""

    @property
    def colour(self) -> str:
        return {True: _MET, False: _NOT_MET, None: _NEUTRAL}[self.met]


def draw(title: str, peer: str, bars: Sequence[Bar]) -> str:
    """Return the chart; the peer is the line at 1."""
    largest = max(1.0, *(max(bar.high, bar.aim or 0) for bar in bars)) * 1.08
    scale = (_RIGHT - _LEFT) / largest
    rows, bottom = _rows(bars, scale)
    height = bottom + _BOTTOM
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        # Its own ground: the page behind it may be dark.
        f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(24, 34, title, size=18, weight=600),
        _text(24, 56, f"Ratio to {peer} (1); Holdfast : peer on the right", colour=_FAINT),
        *_peer_line(scale, height),
        *rows,
        *_legend(height),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _rows(bars: Sequence[Bar], scale: float) -> tuple[list[str], int]:
    """Draw the bars under their headings; also return where the last one ends."""
    parts: list[str] = []
    top, section = _TOP, ""
    for bar in bars:
        if bar.section != section:
            section = bar.section
            parts.append(_ground(top - 2, _HEADING + 2))
            parts.append(_text(24, top + _HEADING - 10, section, weight=600))
            top += _HEADING
        row, thickness = (_CLOSE_ROW, _CLOSE_BAR) if section else (_ROW, _BAR)
        parts += _row(bar, scale, top + row / 2, thickness)
        top += row
    return parts, top


def _row(bar: Bar, scale: float, middle: float, thickness: int) -> Iterator[str]:
    top = middle - thickness / 2
    yield _text(_LEFT - 12, middle + 4.5, bar.label, anchor="end")
    yield (
        f'<rect x="{_LEFT}" y="{top:.1f}" width="{bar.ratio * scale:.1f}" height="{thickness}" '
        f'rx="2" fill="{bar.colour}"/>'
    )
    yield _line(_LEFT + bar.low * scale, middle, _LEFT + bar.high * scale, middle, _INK, 1.2)
    if bar.aim is not None:
        at = _LEFT + bar.aim * scale
        yield _line(at, top - 4, at, top + thickness + 4, _INK, 2, dash="3 2")
    yield _text(_RIGHT + 14, middle + 4.5, f"{bar.ratio:.2f}", weight=600)
    yield _text(_RIGHT + 52, middle + 4.5, bar.values, colour=_FAINT, size=12)


def _ground(top: float, height: float) -> str:
    """Cover the peer's line where a heading stands."""
    return f'<rect x="1" y="{top}" width="{_WIDTH - 2}" height="{height}" fill="#ffffff"/>'


def _peer_line(scale: float, height: float) -> Iterator[str]:
    at = _LEFT + scale
    yield _line(at, _TOP - 4, at, height - _BOTTOM + 4, _PEER, 1.2)
    yield _line(_LEFT, _TOP - 4, _LEFT, height - _BOTTOM + 4, _PEER, 1.2)


def _legend(height: float) -> Iterator[str]:
    y = height - 20
    x = 24
    for colour, words in ((_MET, "aim met"), (_NOT_MET, "aim not met"), (_NEUTRAL, "no aim")):
        yield f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 18, y, words, colour=_FAINT, size=12)
        x += 106
    yield _line(x, y - 11, x, y + 3, _INK, 2, dash="3 2")
    yield _text(x + 10, y, "aim", colour=_FAINT, size=12)
    yield _line(x + 60, y - 4, x + 84, y - 4, _INK, 1.2)
    yield _text(x + 92, y, "least to most of the rounds", colour=_FAINT, size=12)


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, dash: str = ""
) -> str:
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"{style}/>'
    )


def _text(
    x: float,
    y: float,
    words: str,
    *,
    colour: str = _INK,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(words)}</text>'
    )
