"""Block-sparse attention on the CPU, whole rows of blocks at a time given to threads.

ATen parallelises each operator by itself, and would wait for its slowest thread after each; here
the threads compute alone, and wait for each other once, at the end.

The exponentials are taken without their row's maximum wherever the norms of queries and keys prove
that nothing can overflow; softmax is the same either way, and three passes over the scores are
saved. Otherwise the maximum is carried along (arXiv 1805.02867). Everything is float32 or better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindiesd.ops.sparse.rows import LOG2E, Call, Rows
from mindiesd.ops.sparse.selection import BLOCK, Selection
from mindiesd.ops.sparse.workers import WORKERS

# Rows given to a thread at once, at most; towards the end they become fewer.
_ROWS = 8
# Largest |score| (base 2), and largest |value|, with which sums of powers cannot overflow float32.
_SAFE_SCORE, _SAFE_VALUE = 40.0, 1e18


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
    keep = selection.keep
    ends = keep.sum(-1).view(-1).cumsum(0).tolist()
    columns = keep.nonzero()[:, 3].contiguous()
    unit, unit_out = _unit(selection.order_k, selection.run_k, k, v), 1
    if selection.order_q is not None:
        unit_out = _unit(selection.order_q, selection.run_q, result)
    call = Call(
        queries=[head for batch in q.unbind() for head in batch.unbind()],
        keys=[_by(unit, head) for batch in k.unbind() for head in batch.unbind()],
        values=[_by(unit, head) for batch in v.unbind() for head in batch.unbind()],
        out=[_by(unit_out, head) for batch in result.unbind() for head in batch.unbind()],
        # Selections of batches and heads follow each other, as their queries do.
        shared=q.shape[1] // k.shape[1],
        order_q=selection.order_q,
        places_out=_places(selection.order_q, unit_out),
        places_k=_places(selection.order_k, unit),
        unit=unit,
        unit_out=unit_out,
        columns=columns,
        ends=[0, *ends],
        # Each row keeps a block at least.
        lasts=columns[torch.tensor(ends, device=columns.device) - 1].tolist(),
        rows=keep.shape[2],
        length_q=q.shape[2],
        length_k=k.shape[2],
        scale=scale,
        causal=selection.causal,
        careful=_careful(q, k, v, scale),
        wide=torch.float64 if q.dtype is torch.float64 else torch.float32,
    )
    tasks = _tasks(len(call.queries), call.rows, torch.get_num_threads())
    left = iter(tasks)

    def work() -> None:
        rows = Rows(call, _ROWS)
        for pair, first, stop in left:
            rows.compute(pair, first, stop)

    WORKERS.run(work, len(tasks))
    return out


def _tasks(pairs: int, rows: int, threads: int) -> list[tuple[int, int, int]]:
    """Batch and head, first row, and the row after the last: small at the end, to end together."""
    tasks = []
    left = pairs * rows
    for pair in range(pairs):
        first = 0
        while first < rows:
            some = min(max(1, left // (4 * threads)), _ROWS, rows - first)
            tasks.append((pair, first, first + some))
            first += some
            left -= some
    return tasks


def _unit(order: Tensor | None, run: int, *tensors: Tensor) -> int:
    """How many tokens are moved as one: as many as stay together, if they do so in memory."""
    together = all(x.stride(3) == 1 and x.stride(2) == x.shape[3] for x in tensors)
    return math.gcd(BLOCK if order is None else run, tensors[0].shape[2]) if together else 1


def _by(unit: int, tokens: Tensor) -> Tensor:
    return tokens.view(-1, unit * tokens.shape[1]) if unit > 1 else tokens


def _places(order: Tensor | None, unit: int) -> Tensor | None:
    """Where the tokens are that come at each place, by the unit: int64 [blocks, 128 / unit].

    The last block is filled up, and cut off again where it is used.
    """
    if order is None:
        return None
    padded = torch.nn.functional.pad(order, (0, -order.shape[0] % BLOCK))
    return torch.div(padded[::unit], unit, rounding_mode="floor").view(-1, BLOCK // unit)


def _careful(query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[bool]:
    """For each batch and head, whether the row maximum has to be subtracted."""
    shared = query.shape[1] // key.shape[1]
    longest_q = torch.linalg.vector_norm(query, dim=-1).amax(-1).double()
    longest_k = torch.linalg.vector_norm(key, dim=-1).amax(-1).double()
    # Norms of half precision are rounded: a little on top.
    bound = 1.02 * abs(scale) * LOG2E * longest_q * longest_k.repeat_interleave(shared, 1)
    low, high = torch.aminmax(value)
    # Written so that NaN counts as careful.
    small = (low >= -_SAFE_VALUE) & (high <= _SAFE_VALUE)
    safe: list[bool] = ((bound <= _SAFE_SCORE) & small).view(-1).tolist()
    return [not one for one in safe]
