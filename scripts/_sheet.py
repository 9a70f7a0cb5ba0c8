"""Several columns of small pictures with captions, as one picture."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_ACROSS = 4  # pictures of a row that are shown
_SCALE = 2
_GAP, _LINE, _LABELS = 18, 17, 120
_FONT, _SMALL = 14, 12
_WRONG = (205, 40, 40)


@dataclass
class Column:
    """One column of the sheet.

    Attributes:
        title: what made it.
        remarks: lines below the title.
        pictures: [rows, each, height, width] in [0, 1]; None where nothing was drawn.
        wrong: [rows, each], true where a picture does not show what was asked for.
        absent: why nothing was drawn.
    """

    title: str
    remarks: list[str] = field(default_factory=list)
    pictures: np.ndarray | None = None
    wrong: np.ndarray | None = None
    absent: str = ""


def compose(columns: list[Column], labels: list[str], foot: str) -> Image.Image:
    """The columns side by side, a label before each row, and a line below.

    Args:
        columns: at least one of them with pictures, all of one shape.
        labels: what each row shows.
        foot: the line below.
    """
    shape = next(column.pictures.shape for column in columns if column.pictures is not None)
    rows, across = shape[0], min(_ACROSS, shape[1])
    cell = _SCALE * shape[2]
    wide = across * (cell + 2)
    remarks = [_wrapped(column.remarks, wide) for column in columns]
    top = _GAP + _LINE * (1 + max(map(len, remarks))) + _GAP // 2
    width = _LABELS + len(columns) * (wide + _GAP)
    sheet = Image.new("RGB", (width, top + rows * (cell + 2) + 2 * _LINE), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = (ImageFont.load_default(size=size) for size in (_FONT, _SMALL))
    for row, label in enumerate(labels):
        middle = top + row * (cell + 2) + cell // 2
        draw.text((_GAP // 2, middle), label, fill="black", font=small, anchor="lm")
    for number, (column, lines) in enumerate(zip(columns, remarks, strict=True)):
        left = _LABELS + number * (wide + _GAP)
        draw.text((left, _GAP // 2), column.title, fill="black", font=font)
        draw.text((left, _GAP // 2 + _LINE), "\n".join(lines), fill="dimgrey", font=small)
        if column.pictures is None:
            box = (left, top, left + wide - 2, top + rows * (cell + 2) - 2)
            draw.rectangle(box, outline="grey")
            text = "\n".join(_wrapped(["not drawn:", column.absent], wide - 20))
            draw.text((left + 10, top + 10), text, fill=_WRONG, font=small)
            continue
        for row in range(rows):
            for place in range(across):
                corner = (left + place * (cell + 2), top + row * (cell + 2))
                tile = Image.fromarray((column.pictures[row, place] * 255).round().astype("uint8"))
                sheet.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), corner)
                if column.wrong is not None and column.wrong[row, place]:
                    end = (corner[0] + cell - 1, corner[1] + cell - 1)
                    draw.rectangle((*corner, *end), outline=_WRONG, width=2)
    draw.text((_GAP // 2, sheet.height - _LINE - 6), foot, fill="dimgrey", font=small)
    return sheet


def _wrapped(lines: list[str], width: int) -> list[str]:
    letters = max(10, width * 10 // (6 * _SMALL))  # a letter is 0.6 of its size wide, at most
    return [part for line in lines for part in textwrap.wrap(line, letters) or [""]]
