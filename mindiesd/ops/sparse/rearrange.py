"""The order in which tokens of a video are put into blocks, so that a block is a compact region.

A video token at frame f, row y, column x is number ``(f * h + y) * w + x``. 128 consecutive numbers
are a few rows of one frame; two tiles of 8 x 8 are a region. RainFusion (arXiv 2505.21036,
2512.24086) therefore attends in the order: frame, tile row, tile column, row and column inside the
tile. Where h or w is no multiple of 8, the first frame stays as it is, and of every other frame the
part that tiles cover comes first, then the rows below it, then the columns beside it.

The order is a list of token numbers, so going back is exact, and a kernel that gathers its keys
anyway reads them in that order without a copy of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TILE = 8


def tile_order(t: int, h: int, w: int) -> Tensor:
    """Token numbers of a [t, h, w] video in tile order: int64 [t * h * w], on the CPU."""
    numbers = torch.arange(t * h * w, device="cpu").view(t, h, w)
    rows, columns = h - h % TILE, w - w % TILE
    if rows == h and columns == w:
        return _tiles(numbers).reshape(-1)
    first, rest = numbers[:1], numbers[1:]
    parts = [
        _tiles(rest[:, :rows, :columns]).flatten(1),
        rest[:, rows:].flatten(1),
        rest[:, :rows, columns:].flatten(1),
    ]
    return torch.cat([first.reshape(-1), torch.cat(parts, 1).reshape(-1)])


def _tiles(numbers: Tensor) -> Tensor:
    """[t, h, w] with h and w multiples of the tile, as [t, tile row, tile column, row, column]."""
    t, h, w = numbers.shape
    return numbers.reshape(t, h // TILE, TILE, w // TILE, TILE).transpose(2, 3)


@lru_cache(maxsize=32)
def sequence_order(
    latent: tuple[int, int, int], text: int, text_last: bool, device: torch.device
) -> Tensor:
    """The order of a whole sequence of video and text tokens: video in tile order, then the text.

    Args:
        latent: (t, h, w) of the video part.
        text: number of text tokens.
        text_last: whether the text follows the video in the sequence; else it comes first.
        device: where the order is needed.

    Returns:
        int64 [text + t * h * w]; place i of the new sequence is token ``order[i]`` of the old one.
    """
    t, h, w = latent
    video = t * h * w
    # Kept for later calls, which may be made outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        words = torch.arange(text, device="cpu")
        order = (
            torch.cat([tile_order(*latent), words + video])
            if text_last
            else torch.cat([tile_order(*latent) + text, words])
        )
        return order.to(device)


def latent_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """A latent shape as a key of :func:`sequence_order`."""
    t, h, w = shape
    return int(t), int(h), int(w)
