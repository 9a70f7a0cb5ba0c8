"""The handwritten digits that the demo's model was trained on, and the judge of what it draws.

scikit-learn ships them: 1797 pictures of 8 x 8 pixels, each the number of inked pixels (0 to 16) in
a block of 4 x 4 of a scanned bitmap of 32 x 32. Here they are pictures of 32 x 32 again, white on
black, and a picture becomes 8 x 8 by the same means over blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 32
_BLOCK = 4
_FULL = 16  # the value of an 8 x 8 pixel whose block is all ink


class Digits(NamedTuple):
    """Pictures with what they show.

    Attributes:
        pixels: [N, 8, 8] float32 in [0, 1].
        labels: [N] integers, 0 to 9.
    """

    pixels: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """Four fifths to train with, and the rest, which nothing is ever trained with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = (data.images / _FULL).astype(np.float32)
    parts = train_test_split(
        pixels, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """[N, 8, 8] in [0, 1] as [N, 32, 32] in [0, 1], by bicubic interpolation."""
    import torch

    grown = torch.nn.functional.interpolate(
        torch.from_numpy(pixels)[:, None], size=(SIZE, SIZE), mode="bicubic", align_corners=False
    )
    return grown[:, 0].clamp(0, 1).numpy()


def reduce(pictures: np.ndarray) -> np.ndarray:
    """[N, 32, 32] as [N, 8, 8]: the mean of each block of 4 x 4."""
    n, height, width = pictures.shape
    blocks = pictures.reshape(n, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return blocks.mean(axis=(2, 4))


class Judge:
    """A support vector machine that reads digits, trained on the real ones.

    Attributes:
        held_out: how many of the held-out real digits it reads rightly, and of how many.
    """

    def __init__(self) -> None:
        """Train it, which takes a moment, and examine it."""
        from sklearn.svm import SVC

        train, test = load()
        self._svc = SVC(C=10, gamma=0.25)  # 0.001 for pixels of 0 to 16: scikit-learn's own example
        # What it is given later has been 32 x 32 as well.
        self._svc.fit(_flat(enlarge(train.pixels)), train.labels)
        read = self.read(enlarge(test.pixels))
        self.held_out = (int((read == test.labels).sum()), len(read))

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """The digit in each of [N, 32, 32] pictures with values in [0, 1]."""
        return self._svc.predict(_flat(pictures))


def _flat(pictures: np.ndarray) -> np.ndarray:
    return reduce(pictures).reshape(len(pictures), -1)


def cut(sheet: np.ndarray, rows: int) -> np.ndarray:
    """The pictures of a sheet of ``rows`` rows, row by row.

    Args:
        sheet: [rows * 32, columns * 32, 3] of 0 to 255, as the script saves it.
        rows: how many rows it has.

    Returns:
        [rows * columns, 32, 32] in [0, 1], grey.

    Raises:
        ValueError: the sheet is not so large.
    """
    height, width = sheet.shape[:2]
    if height != rows * SIZE or width % SIZE or not width:
        raise ValueError(f"a sheet of {width} x {height} has no {rows} rows of {SIZE} x {SIZE}")
    grey = sheet.reshape(rows, SIZE, width // SIZE, SIZE, -1).mean(axis=-1) / 255
    return grey.transpose(0, 2, 1, 3).reshape(-1, SIZE, SIZE)
