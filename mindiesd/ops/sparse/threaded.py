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
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.sparse.layout import Operands, operands
from mindiesd.ops.sparse.selection import BLOCK, Selection
from mindiesd.ops.sparse.workers import WORKERS

# Keys per step: 128 x 1024 float32 scores, and as many keys, are half a megabyte each.
_KEYS = 1024
# Tasks to be made of a call, at least.
_TASKS = 32
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
    out, views = operands(query, key, value, head_first)
    WORKERS.alone(lambda: _fill(views, selection, scale))
    return out


def _fill(views: Operands, selection: Selection, scale: float) -> None:
    """The same, written to ``views.out``."""
    query, key, value, out = views
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    columns, bounds = selection.lists()
    places = None
    if selection.order_k is not None:
        # Whole blocks of places; the tail is cut off again where it is used.
        padded = torch.nn.functional.pad(selection.order_k, (0, -key.shape[2] % BLOCK))
        places = padded.view(-1, BLOCK)
    careful = _careful(query, key, value, scale)
    # Each row keeps a block at least.
    lasts = columns[bounds[1:] - 1].tolist()
    ends = bounds.tolist()
    call = _Call(
        query, key, value, out, selection, scale, careful, columns, ends, lasts, places, wide
    )
    batch, heads, rows = selection.keep.shape[:3]
    WORKERS.share_rows(batch * heads, rows, _TASKS, lambda: _Steps(call).rows)


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


class _Room(NamedTuple):
    """Views of one thread's buffers for a number of queries and of keys."""

    scores: Tensor
    key: Tensor
    turned: Tensor
    value: Tensor
    key_given: Tensor
    value_given: Tensor


class _Steps:
    """The buffers of one thread, and the steps with them.

    Threads that compute meet at Python's lock between any two operators, views too. So views are
    made once, rows are cut out of lists, and what can be done for several rows at once is.
    """

    def __init__(self, call: _Call) -> None:
        query, key, value, wide = call.query, call.key, call.value, call.wide
        self.call = call
        self.heads, self.shared = query.shape[1], query.shape[1] // key.shape[1]
        self.dim, self.value_dim = query.shape[-1], value.shape[-1]
        self.half = query.dtype is not wide
        device = query.device
        longest = max(end - begin for begin, end in pairwise(call.ends)) * BLOCK
        self.width = min(_KEYS, longest)
        self.parts = -(-longest // self.width)
        room = self.width * max(self.dim, self.value_dim)
        self.gathered = torch.empty(room, dtype=query.dtype, device=device)
        self.widened = torch.empty(room, dtype=wide, device=device) if self.half else self.gathered
        self.scores = torch.empty(BLOCK * self.width, dtype=wide, device=device)
        self.within = torch.arange(BLOCK, device=device)
        self.rooms: dict[tuple[int, int], _Room] = {}

    def room(self, queries: int, keys: int) -> _Room:
        """The views for so many queries and keys."""
        known = self.rooms.get((queries, keys))
        if known is None:
            key, value = (
                self.widened[: keys * dim].view(keys, dim) for dim in (self.dim, self.value_dim)
            )
            given = [
                self.gathered[: keys * dim].view(keys, dim) for dim in (self.dim, self.value_dim)
            ]
            scores = self.scores[: queries * keys].view(queries, keys)
            known = self.rooms[queries, keys] = _Room(scores, key, key.t(), value, *given)
        return known

    def tokens(self, columns: Tensor) -> Tensor:
        """The keys in some blocks."""
        places = self.call.places_k
        if places is not None:
            return places.index_select(0, columns).view(-1)
        return torch.add(self.within, columns[:, None], alpha=BLOCK).view(-1)

    def rows(self, pair: int, first: int, stop: int) -> None:
        """The attention of consecutive blocks of queries of one batch and head."""
        call, selection = self.call, self.call.selection
        b, n = divmod(pair, self.heads)
        at = pair * selection.keep.shape[2] + first
        ends = call.ends[at : at + stop - first + 1]
        source, out = call.query[b, n], call.out[b, n]
        mine: Tensor | None = None
        if selection.order_q is None:
            given = source[first * BLOCK : stop * BLOCK]
        else:
            mine = selection.order_q[first * BLOCK : stop * BLOCK]
            given = source.index_select(0, mine)
        queries = given.to(call.wide)
        counts = [BLOCK * (end - begin) for begin, end in pairwise(ends)]
        tokens = torch.split(self.tokens(call.columns[ends[0] : ends[-1]]), counts)
        sums = queries.new_empty(queries.shape[0], self.value_dim)
        totals = queries.new_zeros(self.parts, queries.shape[0])
        parts = list(zip(*(torch.split(part, BLOCK) for part in totals.unbind()), strict=True))
        key, value = call.key[b, n // self.shared], call.value[b, n // self.shared]
        each = zip(
            torch.split(queries, BLOCK), tokens, torch.split(sums, BLOCK), parts, strict=True
        )
        for place, (query, keys, row_sums, row_totals) in enumerate(each):
            self.row(
                query,
                key,
                value,
                self.existing(keys, call.lasts[at + place]),
                row_sums,
                row_totals,
                # In a causal row the own block, if kept, comes last and is seen in part.
                counts[place] - BLOCK
                if selection.causal and call.lasts[at + place] == first + place
                else counts[place],
                call.careful[pair],
            )
        sums.div_(totals.sum(0)[:, None])
        if mine is None:
            out[first * BLOCK : stop * BLOCK].copy_(sums)
        else:
            out.index_copy_(0, mine, sums.to(out.dtype))

    def existing(self, tokens: Tensor, last: int) -> Tensor:
        """The keys without those that the last block lacks."""
        missing = -self.call.key.shape[2] % BLOCK
        if missing and last == self.call.selection.keep.shape[3] - 1:
            return tokens[:-missing]
        return tokens

    def row(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tensor,
        sums: Tensor,
        totals: tuple[Tensor, ...],
        own: int,
        careful: bool,
    ) -> None:
        """The numerators of one block of queries, and the parts of its denominator.

        Args:
            query: [at most 128, D].
            key: [Skv, D].
            value: [Skv, Dv].
            tokens: which keys.
            sums: the numerators, written to.
            totals: zeros, in number enough for each step over the keys; written to.
            own: where among the tokens the block begins of which query i sees keys up to i.
            careful: whether the maximum has to be subtracted.
        """
        size, length = sums.shape[0], tokens.shape[0]
        factor = self.call.scale * _LOG2E
        top: Tensor | None = None
        whole = (tokens,) if length <= self.width else torch.split(tokens, self.width)
        start = 0
        for some, total in zip(whole, totals, strict=False):
            room = self.room(size, some.shape[0])
            scores = room.scores
            torch.index_select(key, 0, some, out=room.key_given)
            if self.half:
                room.key.copy_(room.key_given)
            torch.addmm(scores, query, room.turned, beta=0, alpha=factor, out=scores)
            stop = start + some.shape[0]
            if stop > own:
                part = scores[:, own - start :]
                hidden = self.within[: part.shape[1]] > self.within[:size, None]
                part.masked_fill_(hidden, -math.inf)
            if careful:
                highest = scores.amax(-1, keepdim=True)
                if top is not None:
                    highest = torch.maximum(highest, top)
                    shrink = (top - highest).exp2_()
                    for before in totals:
                        before.mul_(shrink[:, 0])
                    sums.mul_(shrink)
                top = highest
                scores.sub_(highest)
            scores.exp2_()
            torch.sum(scores, -1, out=total)
            torch.index_select(value, 0, some, out=room.value_given)
            if self.half:
                room.value.copy_(room.value_given)
            torch.addmm(sums, scores, room.value, beta=1 if start else 0, out=sums)
            start = stop
