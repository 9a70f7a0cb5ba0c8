"""The mean of each block of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.ops.sparse.selection import BLOCK, blocks_of
from mindiesd.ops.sparse.workers import WORKERS

# Blocks gathered at a time, per head: a copy of everything would double the memory of the call.
_AT_ONCE = 8


def block_means(x: Tensor, order: Tensor | None) -> Tensor:
    """The mean of every 128 consecutive tokens in the given order, in float32 or better.

    The last block is the mean of the tokens that are there.

    Args:
        x: [B, N, S, D].
        order: int64 [S], or None for the order they are in.

    Returns:
        [B, N, ceil(S / 128), D].
    """
    batch, heads, length, dim = x.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    out = x.new_empty(batch, heads, blocks_of(length), dim, dtype=wide)
    step = BLOCK * _AT_ONCE
    whole = length - length % BLOCK

    # One head at a time, to gather from rows that follow each other where the layout has them so.
    def pool(task: tuple[int, int, int]) -> None:
        b, n, start = task
        tokens, means = x[b, n], out[b, n]
        stop = min(start + step, whole)
        part = _take(tokens, order, start, stop).view(-1, BLOCK, dim)
        torch.mean(part, 1, dtype=wide, out=means[start // BLOCK : stop // BLOCK])

    heads_of_all = [(b, n) for b in range(batch) for n in range(heads)]
    WORKERS.each(((b, n, at) for b, n in heads_of_all for at in range(0, whole, step)), pool)
    if whole != length:
        for b, n in heads_of_all:
            part = _take(x[b, n], order, whole, length)
            torch.mean(part, 0, dtype=wide, out=out[b, n, -1])
    return out


def _take(tokens: Tensor, order: Tensor | None, start: int, stop: int) -> Tensor:
    if order is None:
        return tokens[start:stop].contiguous()
    return tokens.index_select(0, order[start:stop])
