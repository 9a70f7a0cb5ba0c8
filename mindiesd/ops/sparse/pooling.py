"""The mean of each block of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.ops.sparse.selection import BLOCK, blocks_of


def block_means(x: Tensor, order: Tensor, run: int = 1) -> Tensor:
    """The mean of every 128 consecutive tokens in the given order, in float32 or better.

    The last block is the mean of the tokens that are there. Tokens that stay together are added up
    where they are, and only the sums are gathered.

    Args:
        x: [B, N, S, D].
        order: int64 [S].
        run: how many consecutive tokens stay together in it; divides S and 128.

    Returns:
        [B, N, ceil(S / 128), D].
    """
    batch, heads, length, dim = x.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    out = x.new_empty(batch, heads, blocks_of(length), dim, dtype=wide)
    places = order if run == 1 else torch.div(order[::run], run, rounding_mode="floor")
    per_block = BLOCK // run
    whole = length // BLOCK
    # One head at a time: a copy of everything would double the memory of the call.
    for b in range(batch):
        for n in range(heads):
            sums = x[b, n]
            if run > 1:
                sums = sums.view(-1, run, dim).sum(1, dtype=wide)
            for start in range(0, whole, _AT_ONCE):
                stop = min(start + _AT_ONCE, whole)
                part = sums.index_select(0, places[start * per_block : stop * per_block])
                torch.mean(part.view(-1, per_block, dim), 1, dtype=wide, out=out[b, n, start:stop])
            if whole < out.shape[2]:
                part = sums.index_select(0, places[whole * per_block :])
                torch.mean(part, 0, dtype=wide, out=out[b, n, whole])
    return out if run == 1 else out.div_(run)


# Blocks gathered at a time, so that what is gathered stays in a core's cache.
_AT_ONCE = 8
