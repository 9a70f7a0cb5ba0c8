"""The pictures of docs/guides/layouts_and_masks.md, as SVG text, drawn from what tensors hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import torch

from mindiesd.ops.masks import BOTTOM_RIGHT_CAUSAL, TOP_LEFT_CAUSAL, Band

CELL = 34
HEADS = ("#bcd6f0", "#f6d2a9")
SEEN, HIDDEN = "#2f6db5", "#eef1f4"


@dataclass(frozen=True)
class Cell:
    """A square: where, its colour, and what is written in it."""

    x: float
    y: float
    colour: str
    text: str = ""
    size: int = CELL

    def svg(self) -> str:
        square = (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.size}" height="{self.size}" '
            f'fill="{self.colour}" stroke="#ffffff" stroke-width="2"/>'
        )
        if not self.text:
            return square
        middle = self.x + self.size / 2
        return square + (
            f'<text x="{middle:g}" y="{self.y + self.size / 2 + 4:g}" text-anchor="middle">'
            f"{escape(self.text)}</text>"
        )


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(words)}</text>'


def sheet(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def layouts() -> str:
    """The memory of one tensor in each layout, from left to right."""
    tokens, heads, dim = 3, 2, 2
    bsnd = torch.arange(tokens * heads * dim).view(1, tokens, heads, dim)
    shown = [
        ("BSND", bsnd, heads * dim, "a projection's output, heads split off"),
        ("BSH", bsnd.flatten(2), heads * dim, "the same memory, heads not split off"),
        ("BNSD", bsnd.transpose(1, 2), tokens * dim, "what F.scaled_dot_product_attention takes"),
        ("TND", bsnd.flatten(0, 1), heads * dim, "sequences a b and c, cu_seqlens = [0, 2, 3]"),
    ]
    parts = []
    left, step = 150, 74
    for row, (name, tensor, group, about) in enumerate(shown):
        y = 30 + row * step
        parts.append(text(12, y + 15, name, ' font-size="15" font-weight="bold"'))
        parts.append(text(12, y + 32, str(list(tensor.shape))))
        parts.append(text(left, y - 8, about, ' fill="#555555"'))
        for at, number in enumerate(tensor.contiguous().flatten().tolist()):
            token, head = number // (heads * dim), number // dim % heads
            x = left + at * CELL + at // group * 10
            parts.append(Cell(x, y, HEADS[head], f"{'abc'[token]}{number % dim}").svg())
    y = 30 + len(shown) * step
    for head, colour in enumerate(HEADS):
        parts.append(Cell(left + head * 90, y - 12, colour, size=16).svg())
        parts.append(text(left + head * 90 + 22, y + 1, f"head {head}"))
    width = left + 12 * CELL + 3 * 10
    return sheet("One tensor in four layouts", width, y + 14, parts)


def masks() -> str:
    """Which keys (columns) each query (row) sees."""
    device = torch.device("cpu")
    padding = torch.tensor([True, True, True, False, False]).expand(4, 5)
    shown = [
        ("padding: a bool mask [1, Skv]", padding),
        ("is_causal: top left", TOP_LEFT_CAUSAL.matrix(2, 5, device)),
        (
            "flash-attention's causal:\nbottom right, window_size=(-1, 0)",
            Band.window(*BOTTOM_RIGHT_CAUSAL, 2, 5).matrix(2, 5, device),
        ),
        ("window_size=(1, 0)", Band.window(1, 0, 5, 5).matrix(5, 5, device)),
    ]
    size, step = 22, 230
    parts = []
    for place, (title, kept) in enumerate(shown):
        x, y = 12 + place * step, 58
        for line, words in enumerate(title.split("\n")):
            parts.append(text(x, 18 + line * 16, words))
        for row, columns in enumerate(kept.tolist()):
            for column, sees in enumerate(columns):
                colour = SEEN if sees else HIDDEN
                parts.append(Cell(x + column * size, y + row * size, colour, size=size).svg())
    y = 58 + 5 * size + 24
    meanings = ((SEEN, "query i sees key j"), (HIDDEN, "it does not"))
    for place, (colour, words) in enumerate(meanings):
        parts.append(Cell(12 + place * 170, y - 12, colour, size=16).svg())
        parts.append(text(12 + place * 170 + 22, y + 1, words))
    parts.append(text(12 + 340, y + 1, "rows: queries i from above, columns: keys j from the left"))
    return sheet("Masks, causal flags and windows", 12 + len(shown) * step, y + 14, parts)
