"""Block-sparse attention on the CPU.

One row of blocks at a time and, of its keys, some at a time, so that what is computed with stays in
a core's cache: gather keys, scores, exponential, gather values, accumulate. ATen parallelises
each of these steps by itself, and would wait for its slowest thread after each; here whole rows are
given to threads that compute alone.

The exponentials are taken without their row's maximum wherever the norms of queries and keys prove
that nothing can overflow; softmax is the same either way, and three passes over the scores are
saved. Otherwise the maximum is carried along (arXiv 1805.02867). Everything is float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.sparse.selection import BLOCK, Selection
from mindiesd.ops.sparse.workers import WORKERS

# Keys per step: 128 x 1024 float32 scores are as large as a level-2 cache.
_KEYS = 1024
_LOG2E = math.log2(math.e)
# Largest |score| (base 2), and largest |value|, with which sums of powers cannot overflow float32.
_SAFE_SCORE, _SAFE_VALUE = 40.0, 1e18


class _Call(NamedTuple):
    """What the threads share."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    selection: Selection
    scale: float
    careful: list[bool]
    columns: Tensor
    ends: list[int]
    lasts: list[int]
    places_k: Tensor | None
    wide: torch.dtype


def attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float, head_first: bool
) -> Tensor:
    """Attention over the selected blocks.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``; on the CPU.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        selection: which blocks.
        scale: factor on the scores.
        head_first: whether heads come before the sequence.

    Returns:
        Attention in the query's layout and dtype.
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    q, k, v, result = query, key, value, out
    if not head_first:
        q, k, v, result = (t.transpose(1, 2) for t in (query, key, value, out))
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    keep = selection.keep
    ends = keep.sum(-1).view(-1).cumsum(0).tolist()
    places = None
    if selection.order_k is not None:
        # Whole blocks of places; the tail is cut off again where it is used.
        padded = torch.nn.functional.pad(selection.order_k, (0, -k.shape[2] % BLOCK))
        places = padded.view(-1, BLOCK)
    careful = _careful(q, k, v, scale)
    columns = keep.nonzero()[:, 3].contiguous()
    # Each row keeps a block at least.
    lasts = columns[torch.tensor(ends, device=columns.device) - 1].tolist()
    call = _Call(q, k, v, result, selection, scale, careful, columns, ends, lasts, places, wide)
    rows = keep.shape[0] * keep.shape[1] * keep.shape[2]
    tickets = count()

    def work() -> None:
        _work(call, tickets, rows)

    WORKERS.run(work, rows)
    return out


def _careful(query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[bool]:
    """For each batch and head, whether the row maximum has to be subtracted."""
    shared = query.shape[1] // key.shape[1]
    longest_q = torch.linalg.vector_norm(query, dim=-1).amax(-1).double()
    longest_k = torch.linalg.vector_norm(key, dim=-1).amax(-1).double()
    # Norms of half precision are rounded: a little on top.
    bound = 1.02 * abs(scale) * _LOG2E * longest_q * longest_k.repeat_interleave(shared, 1)
    low, high = torch.aminmax(value)
    # Written so that NaN counts as careful.
    small = (low >= -_SAFE_VALUE) & (high <= _SAFE_VALUE)
    safe: list[bool] = ((bound <= _SAFE_SCORE) & small).view(-1).tolist()
    return [not one for one in safe]


def _work(call: _Call, tickets: Iterator[int], rows: int) -> None:
    """Compute rows until none is left; each thread runs this."""
    steps = _Steps(call)
    heads, per_head = call.query.shape[1], call.selection.keep.shape[2]
    for ticket in tickets:
        if ticket >= rows:
            return
        pair, row = divmod(ticket, per_head)
        steps.row(*divmod(pair, heads), row, call.careful[pair])


class _Steps:
    """The buffers of one thread, and the steps with them."""

    def __init__(self, call: _Call) -> None:
        query, key, value, wide = call.query, call.key, call.value, call.wide
        self.call = call
        self.shared = query.shape[1] // key.shape[1]
        self.dim, self.value_dim = query.shape[-1], value.shape[-1]
        self.half = query.dtype is not wide
        device = query.device
        starts = [0, *call.ends]
        longest = max(end - begin for begin, end in zip(starts, call.ends, strict=False)) * BLOCK
        self.width = min(_KEYS, longest)
        room = self.width * max(self.dim, self.value_dim)
        self.gathered = torch.empty(room, dtype=query.dtype, device=device)
        self.widened = torch.empty(room if self.half else 0, dtype=wide, device=device)
        self.scores = torch.empty(BLOCK * self.width, dtype=wide, device=device)
        self.sums = torch.empty(BLOCK, self.value_dim, dtype=wide, device=device)
        self.total = torch.empty(BLOCK, 1, dtype=wide, device=device)
        self.within = torch.arange(BLOCK, device=device)
        self.pair: tuple[int, int] | None = None
        self.query = self.key = self.value = self.out = query

    def take(self, source: Tensor, tokens: Tensor) -> Tensor:
        """Rows of a [S, D] tensor, in the dtype of computation."""
        rows, dim = tokens.shape[0], source.shape[1]
        gathered = self.gathered[: rows * dim].view(rows, dim)
        torch.index_select(source, 0, tokens, out=gathered)
        if not self.half:
            return gathered
        widened = self.widened[: rows * dim].view(rows, dim)
        return widened.copy_(gathered)

    def tokens(self, columns: Tensor) -> Tensor:
        """The keys in some blocks."""
        places = self.call.places_k
        if places is not None:
            return places.index_select(0, columns).view(-1)
        return torch.add(self.within, columns[:, None], alpha=BLOCK).view(-1)

    def row(self, b: int, n: int, row: int, careful: bool) -> None:
        """The attention of one block of queries."""
        call = self.call
        if self.pair != (b, n):
            self.pair = (b, n)
            self.query, self.out = call.query[b, n], call.out[b, n]
            self.key, self.value = call.key[b, n // self.shared], call.value[b, n // self.shared]
        key, value = self.key, self.value
        at = (b * call.query.shape[1] + n) * call.selection.keep.shape[2] + row
        columns = call.columns[call.ends[at - 1] if at else 0 : call.ends[at]]
        queries, mine = self.queries(row)
        size, keys = queries.shape[0], key.shape[0]
        tokens = self.tokens(columns)
        left = keys % BLOCK
        last = call.lasts[at]
        if left and last == call.selection.keep.shape[3] - 1:
            tokens = tokens[: tokens.shape[0] - (BLOCK - left)]
        length = tokens.shape[0]
        # In a causal row the own block, if kept, comes last and is seen in part.
        own = (columns.shape[0] - 1) * BLOCK if call.selection.causal and last == row else length

        factor, sums, total = call.scale * _LOG2E, self.sums[:size], self.total[:size]
        top: Tensor | None = None
        for start in range(0, length, self.width):
            some = tokens[start : start + self.width]
            stop = start + some.shape[0]
            scores = self.scores[: size * some.shape[0]].view(size, -1)
            torch.addmm(scores, queries, self.take(key, some).t(), beta=0, alpha=factor, out=scores)
            if stop > own:
                part = scores[:, own - start :]
                hidden = self.within[: part.shape[1]] > self.within[:size, None]
                part.masked_fill_(hidden, -math.inf)
            if careful:
                highest = scores.amax(-1, keepdim=True)
                if top is not None:
                    highest = torch.maximum(highest, top)
                    shrink = (top - highest).exp2_()
                    total.mul_(shrink)
                    sums.mul_(shrink)
                top = highest
                scores.sub_(highest)
            scores.exp2_()
            if start:
                total.add_(scores.sum(-1, keepdim=True))
            else:
                torch.sum(scores, -1, keepdim=True, out=total)
            torch.addmm(sums, scores, self.take(value, some), beta=1 if start else 0, out=sums)
        sums.div_(total)
        if mine is None:
            self.out[row * BLOCK : row * BLOCK + size].copy_(sums)
        else:
            self.out.index_copy_(0, mine, sums.to(self.out.dtype))

    def queries(self, row: int) -> tuple[Tensor, Tensor | None]:
        """The queries of a block, and which tokens they are unless in order."""
        source, order = self.query, self.call.selection.order_q
        if order is None:
            own = source[row * BLOCK : (row + 1) * BLOCK]
            return own.to(self.call.wide), None
        mine = order[row * BLOCK : (row + 1) * BLOCK]
        return source.index_select(0, mine).to(self.call.wide), mine
