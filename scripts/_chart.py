"""A bar chart as SVG text.

Written here, and not with a plotting library: the same figures must give the same bytes on every
machine, so that scripts/_docs.py can tell whether the picture is up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABELS, RIGHT = 860, 330, 90
ROW, GAP, TOP = 16, 12, 56
COLOURS = ("#9aa5b1", "#2f6db5")


@dataclass(frozen=True)
class Bar:
    """One label with a bar for each series; ``shown`` is written at the end of the last."""

    label: str
    values: tuple[float, ...]
    shown: str


def bars(title: str, series: Sequence[str], rows: Sequence[Bar], mark: float | None = None) -> str:
    """Horizontal bars, one group a row, all on one scale that begins at 0.

    Args:
        title: above the chart.
        series: names of the bars of a group, for the legend; at most two.
        rows: the groups.
        mark: a value to draw a line at, for instance 1 for "as fast as without".
    """
    if not 1 <= len(series) <= len(COLOURS):
        raise ValueError(f"one or two series, got {len(series)}")
    if any(len(row.values) != len(series) for row in rows):
        raise ValueError(f"every row needs {len(series)} values")
    if any(value < 0 for row in rows for value in row.values):
        raise ValueError("bars begin at 0; negative values cannot be drawn")
    largest = max([value for row in rows for value in row.values] + [mark or 0.0], default=0.0)
    room = WIDTH - LABELS - RIGHT
    scale = room / largest if largest else 0.0
    step = len(series) * ROW + GAP
    height = TOP + len(rows) * step + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    at = 12
    for colour, name in zip(COLOURS[-len(series) :], series, strict=True):
        lines.append(f'<rect x="{at}" y="31" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{at + 17}" y="41">{escape(name)}</text>')
        at += 32 + 8 * len(name)
    for number, row in enumerate(rows):
        top = TOP + number * step
        middle = top + len(series) * ROW / 2 + 4
        lines.append(
            f'<text x="{LABELS - 8}" y="{middle:g}" text-anchor="end">{escape(row.label)}</text>'
        )
        for place, (colour, value) in enumerate(
            zip(COLOURS[-len(series) :], row.values, strict=True)
        ):
            lines.append(
                f'<rect x="{LABELS}" y="{top + place * ROW}" width="{value * scale:.1f}" '
                f'height="{ROW - 2}" fill="{colour}"/>'
            )
        end = LABELS + max(row.values) * scale + 6
        lines.append(f'<text x="{end:.1f}" y="{middle:g}">{escape(row.shown)}</text>')
    if mark is not None:
        x = LABELS + mark * scale
        lines.append(
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - GAP}" '
            'stroke="#c0392b" stroke-dasharray="4 3"/>'
        )
    lines.append("</svg>")
    return "\n".join(lines) + "\n"
