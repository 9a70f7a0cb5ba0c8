"""Some consecutive rows of blocks of one head: the buffers they need, and the steps with them.

One row of blocks at a time and, of its keys, some at a time, so that what is computed with stays in
a core's cache: gather keys, scores, exponential, gather values, accumulate.

Threads that compute meet at Python's lock before and after every operator, views too, and whoever
has to wait there waits for being woken up. So views are made once, and what can be done for several
rows at once is.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.sparse.selection import BLOCK

LOG2E = math.log2(math.e)

# Keys per step: 128 x 1024 float32 scores, and as many keys, are half a megabyte each.
_KEYS = 1024


class Call(NamedTuple):
    """What the threads share.

    Attributes:
        queries: of each batch and head, [Sq, D].
        keys: of each batch and head of keys, [Skv / unit, unit * D].
        values: likewise, [Skv / unit, unit * Dv].
        out: of each batch and head, [Sq / unit_out, unit_out * Dv].
        shared: heads of queries to one head of keys.
        order_q: int64 [Sq], the query at each place; None if they stay where they are.
        places_out: the rows of ``out`` that are a block's; None if they follow each other.
        places_k: the rows of ``keys`` that are a block's; None if they follow each other.
        unit: how many keys are gathered as one.
        unit_out: how many results are put down as one.
        columns: the kept blocks of all rows, one after the other.
        ends: where those of row i begin, and of the row after the last.
        lasts: the last kept block of each row.
        rows: blocks of queries in each head.
        length_q: queries in each head.
        length_k: keys in each head.
        scale: factor on the scores.
        causal: query i sees the keys j <= i.
        careful: of each batch and head, whether the maximum has to be subtracted.
        wide: the dtype to compute in.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    out: list[Tensor]
    shared: int
    order_q: Tensor | None
    places_out: Tensor | None
    places_k: Tensor | None
    unit: int
    unit_out: int
    columns: Tensor
    ends: list[int]
    lasts: list[int]
    rows: int
    length_q: int
    length_k: int
    scale: float
    causal: bool
    careful: list[bool]
    wide: torch.dtype


class _Bench(NamedTuple):
    """Views for a number of queries; those in tuples by block."""

    given: Tensor
    widened: Tensor
    queries: tuple[Tensor, ...]
    sums: Tensor
    sums_by_unit: Tensor
    each_sums: tuple[Tensor, ...]
    totals: Tensor
    total: Tensor
    factor: Tensor
    each_totals: tuple[tuple[Tensor, ...], ...]


class _Room(NamedTuple):
    """Views for a number of queries and of keys."""

    scores: Tensor
    key: Tensor
    turned: Tensor
    value: Tensor
    key_given: Tensor
    value_given: Tensor
    key_wide: Tensor
    value_wide: Tensor


class Rows:
    """The buffers of one thread."""

    def __init__(self, call: Call, most: int) -> None:
        """Make them.

        Args:
            call: what is to be computed.
            most: rows that are computed at once, at most.
        """
        self.call = call
        query, value = call.queries[0], call.values[0]
        dtype, device, wide = query.dtype, query.device, call.wide
        self.dim, self.value_dim = query.shape[1], value.shape[1] // call.unit
        self.half = dtype is not wide
        longest = max(end - begin for begin, end in pairwise(call.ends)) * BLOCK
        self.width = min(_KEYS, longest)
        self.parts = -(-longest // self.width)
        room = self.width * max(self.dim, self.value_dim)
        self.gathered = torch.empty(room, dtype=dtype, device=device)
        self.widened = torch.empty(room, dtype=wide, device=device) if self.half else self.gathered
        self.scores = torch.empty(BLOCK * self.width, dtype=wide, device=device)
        queries = min(most, call.rows) * BLOCK
        self.given = torch.empty(queries * self.dim, dtype=dtype, device=device)
        self.queries = (
            torch.empty(queries * self.dim, dtype=wide, device=device) if self.half else self.given
        )
        self.sums = torch.empty(queries * self.value_dim, dtype=wide, device=device)
        self.totals = torch.empty(self.parts * queries, dtype=wide, device=device)
        self.within = torch.arange(BLOCK, device=device)
        self.units = torch.arange(BLOCK // call.unit, device=device)
        self.benches: dict[int, _Bench] = {}
        self.rooms: dict[tuple[int, int], _Room] = {}

    def compute(self, pair: int, first: int, stop: int) -> None:
        """The attention of consecutive rows of one batch and head.

        Args:
            pair: which batch and head.
            first: the first row.
            stop: the one after the last.
        """
        call = self.call
        begin, end = first * BLOCK, min(stop * BLOCK, call.length_q)
        bench = self.bench(end - begin)
        source, queries = call.queries[pair], bench.queries
        if call.order_q is None:
            given = source[begin:end]
            if self.half:
                bench.widened.copy_(given)
            else:
                queries = torch.split(given, BLOCK)
        else:
            torch.index_select(source, 0, call.order_q[begin:end], out=bench.given)
            if self.half:
                bench.widened.copy_(bench.given)
        if self.parts > 1:
            # Rows differ in the number of steps, and what is not written to is added up too.
            bench.totals.zero_()
        at = pair * call.rows + first
        ends = call.ends[at : at + stop - first + 1]
        places = torch.split(
            self.places(call.columns[ends[0] : ends[-1]]),
            [(after - before) * self.units.shape[0] for before, after in pairwise(ends)],
        )
        key, value = call.keys[pair // call.shared], call.values[pair // call.shared]
        for row in range(stop - first):
            last = call.lasts[at + row]
            kept = (ends[row + 1] - ends[row]) * BLOCK
            self.row(
                queries[row],
                key,
                value,
                self.existing(places[row], last),
                bench.each_sums[row],
                bench.each_totals[row],
                # In a causal row the own block, if kept, comes last and is seen in part.
                kept - BLOCK if call.causal and last == first + row else kept,
                call.careful[pair],
            )
        if self.parts > 1:
            torch.sum(bench.totals, 0, out=bench.total)
        bench.sums.div_(bench.factor)
        if call.places_out is None:
            call.out[pair][begin:end].copy_(bench.sums)
            return
        mine = call.places_out[first:stop].view(-1)[: bench.sums_by_unit.shape[0]]
        results = bench.sums_by_unit
        call.out[pair].index_copy_(0, mine, results.to(source.dtype) if self.half else results)

    def places(self, columns: Tensor) -> Tensor:
        """Where the keys of some blocks are, by the unit."""
        places = self.call.places_k
        if places is not None:
            return places.index_select(0, columns).view(-1)
        return torch.add(self.units, columns[:, None], alpha=self.units.shape[0]).view(-1)

    def existing(self, places: Tensor, last: int) -> Tensor:
        """The places without those that the last block lacks."""
        missing = -self.call.length_k % BLOCK
        if missing and last == self.call.length_k // BLOCK:
            return places[: -missing // self.call.unit]
        return places

    def row(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        places: Tensor,
        sums: Tensor,
        totals: tuple[Tensor, ...],
        own: int,
        careful: bool,
    ) -> None:
        """The numerators of one block of queries, and the parts of its denominator.

        Args:
            query: [at most 128, D].
            key: [Skv / unit, unit * D].
            value: [Skv / unit, unit * Dv].
            places: which of them.
            sums: the numerators, written to.
            totals: zeros if there are several, enough for each step over the keys; written to.
            own: where among the keys the block begins of which query i sees keys up to i.
            careful: whether the maximum has to be subtracted.
        """
        size, unit = sums.shape[0], self.call.unit
        scale = self.call.scale * LOG2E
        top: Tensor | None = None
        width = self.width // unit
        whole = (places,) if places.shape[0] <= width else torch.split(places, width)
        start = 0
        for some, total in zip(whole, totals, strict=False):
            count = some.shape[0] * unit
            room = self.room(size, count)
            scores = room.scores
            torch.index_select(key, 0, some, out=room.key_given)
            if self.half:
                room.key_wide.copy_(room.key_given)
            torch.addmm(scores, query, room.turned, beta=0, alpha=scale, out=scores)
            stop = start + count
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
                room.value_wide.copy_(room.value_given)
            torch.addmm(sums, scores, room.value, beta=1 if start else 0, out=sums)
            start = stop

    def bench(self, queries: int) -> _Bench:
        """The views for so many queries."""
        known = self.benches.get(queries)
        if known is None:
            given, widened = (
                buffer[: queries * self.dim].view(queries, self.dim)
                for buffer in (self.given, self.queries)
            )
            flat = self.sums[: queries * self.value_dim]
            sums = flat.view(queries, self.value_dim)
            totals = self.totals[: self.parts * queries].view(self.parts, queries)
            total = totals[0] if self.parts == 1 else torch.empty_like(totals[0])
            by_part = (torch.split(part, BLOCK) for part in totals.unbind())
            known = self.benches[queries] = _Bench(
                given=given,
                widened=widened,
                queries=torch.split(widened, BLOCK),
                sums=sums,
                sums_by_unit=flat.view(-1, self.call.unit_out * self.value_dim),
                each_sums=torch.split(sums, BLOCK),
                totals=totals,
                total=total,
                factor=total[:, None],
                each_totals=tuple(zip(*by_part, strict=True)),
            )
        return known

    def room(self, queries: int, keys: int) -> _Room:
        """The views for so many queries and keys."""
        known = self.rooms.get((queries, keys))
        if known is None:
            unit, scores = self.call.unit, self.scores[: queries * keys].view(queries, keys)
            dims = (self.dim, self.value_dim)
            key, value = (self.widened[: keys * dim].view(keys, dim) for dim in dims)
            # The same memory as it is gathered into.
            by_unit = [
                buffer[: keys * dim].view(keys // unit, unit * dim)
                for buffer in (self.gathered, self.widened)
                for dim in dims
            ]
            known = self.rooms[queries, keys] = _Room(scores, key, key.t(), value, *by_unit)
        return known
