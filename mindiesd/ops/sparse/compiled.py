"""Block-sparse attention on the CPU, and ada_bsa's estimate, by :mod:`mindiesd.compiled`.

What :mod:`.threaded` does with ATen's operators, with everything between two of them left out:
no gathered copies but those that fit into a core's cache, no look for the maximum but in registers,
and no word with Python before a thread has finished its rows.

Without the library, on other processors than x86-64 with AVX2 and for float64, :mod:`.threaded`
and :mod:`.adaptive` compute. What is found is tried on a small case first: a library that gives
other results than ATen is not used.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindiesd.compiled.library import Library, LibraryUnavailable
from mindiesd.ops.sparse.layout import Operands, operands
from mindiesd.ops.sparse.selection import BLOCK, STRIDE, Selection, blocks_of
from mindiesd.ops.sparse.workers import WORKERS

_log = logging.getLogger("mindiesd")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Tasks to be made of a call's rows, at least.
_TASKS = 64
# Groups estimated at once: all of some blocks.
_AT_ONCE = 64


class _Operand(ctypes.Structure):
    """``Operand`` of rows.c."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    """``Call`` of rows.c."""

    _fields_ = (
        *((name, _Operand) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_void_p) for name in ("order_q", "order_k", "columns", "ends")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "shared", "queries", "keys", "dim", "value_dim", "kind", "causal")
        ),
        ("factor", ctypes.c_float),
    )


class _Estimate(ctypes.Structure):
    """``Estimate`` of rows.c."""

    _fields_ = (
        *((name, _Operand) for name in ("query", "key")),
        *((name, ctypes.c_void_p) for name in ("groups", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "shared", "queries", "keys", "dim", "kind", "causal")
        ),
        ("factor", ctypes.c_float),
    )


class Functions(NamedTuple):
    """What the library computes for one instruction set.

    Each takes (call, batch * heads + head, first, stop) and returns 0 unless memory was missing.

    Attributes:
        rows: attention of the blocks of queries first to stop.
        estimate: ada_bsa's estimate of the groups of queries ``groups[first:stop]``.
    """

    rows: Callable[[_Call, int, int, int], int]
    estimate: Callable[[_Estimate, int, int, int], int]


def fits(*tensors: Tensor) -> bool:
    """Whether the library can read these; on the CPU, of one dtype, each of four dimensions."""
    return (
        all(t.dtype in _KINDS and t.stride(-1) == 1 and not t.is_neg() for t in tensors)
        and functions() is not None
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    head_first: bool,
    known: Functions | None = None,
) -> Tensor:
    """Attention over the selected blocks; arguments and result as :func:`.threaded.attention`.

    Args:
        query: that :func:`fits`, as must the others.
        key: likewise.
        value: likewise.
        selection: which blocks.
        scale: factor on the scores.
        head_first: whether heads come before the sequence.
        known: other functions than those of this processor.

    Raises:
        MemoryError: the buffers of a row could not be had.
    """
    compute = _chosen(known).rows
    out, views = operands(query, key, value, head_first)
    WORKERS.alone(lambda: _fill(compute, views, selection, scale))
    return out


def _fill(
    compute: Callable[[_Call, int, int, int], int],
    views: Operands,
    selection: Selection,
    scale: float,
) -> None:
    """The same, written to ``views.out``."""
    query, key, value, _ = views
    columns, ends = selection.lists()
    # Held until the end: the call has their addresses only.
    orders = [
        None if order is None else order.contiguous()
        for order in (selection.order_q, selection.order_k)
    ]
    batch, heads, rows = selection.keep.shape[:3]
    call = _Call(
        *map(_operand, views),
        *(None if order is None else order.data_ptr() for order in orders),
        columns.data_ptr(),
        ends.data_ptr(),
        heads,
        heads // key.shape[1],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
        _KINDS[query.dtype],
        selection.causal,
        scale * math.log2(math.e),
    )

    def some(pair: int, first: int, stop: int) -> None:
        _done(compute(call, pair, first, stop))

    WORKERS.share_rows(batch * heads, rows, _TASKS, lambda: some)


def estimate(
    query: Tensor,
    key: Tensor,
    chosen: Tensor,
    scale: float,
    causal: bool,
    known: Functions | None = None,
) -> Tensor:
    """What :func:`.adaptive.estimate` returns.

    Args:
        query: [B, N, Sq, D] that :func:`fits`, as must the key.
        key: [B, Nkv, Skv, D].
        chosen: int64, the groups of queries to be looked at, ascending; of a block at most four,
            or all sixteen.
        scale: factor on the scores.
        causal: a query group sees the key groups up to its own.
        known: other functions than those of this processor.

    Raises:
        MemoryError: its buffers could not be had.
    """
    compute = _chosen(known).estimate
    batch, heads, queries, dim = query.shape
    chosen = chosen.contiguous()
    shape = (batch, heads, blocks_of(queries), blocks_of(key.shape[2]))
    out = torch.zeros(shape, dtype=torch.float32, device=query.device)
    call = _Estimate(
        _operand(query),
        _operand(key),
        chosen.data_ptr(),
        out.data_ptr(),
        heads,
        heads // key.shape[1],
        queries,
        key.shape[2],
        dim,
        _KINDS[query.dtype],
        causal,
        scale / STRIDE * math.log2(math.e),
    )
    count = chosen.shape[0]

    # A task has blocks of its own: two would add to the same place.
    def some(task: tuple[int, int]) -> None:
        pair, first = task
        _done(compute(call, pair, first, min(first + _AT_ONCE, count)))

    pairs = range(batch * heads)
    WORKERS.each(((pair, at) for pair in pairs for at in range(0, count, _AT_ONCE)), some)
    return out


def _chosen(known: Functions | None) -> Functions:
    found = known or functions()
    assert found is not None
    return found


def _operand(x: Tensor) -> _Operand:
    return _Operand(x.data_ptr(), *x.stride()[:3])


def _done(status: int) -> None:
    if status:
        raise MemoryError("no memory for the buffers of sparse attention")


@functools.cache
def functions() -> Functions | None:
    """The library's functions for this processor; None if there are none, or not to be trusted."""
    try:
        found = typed(Library().function)
    except LibraryUnavailable as error:
        _log.info("sparse attention on the CPU is computed by ATen's operators: %s", error)
        return None
    # In a thread of its own, where no mode of the caller's is in force.
    with ThreadPoolExecutor(1) as other:
        right = other.submit(_right, found).result()
    if not right:
        _log.warning("the compiled sparse attention is wrong on this machine and is not used")
        return None
    return found


def typed(function_of: Callable[[str], Any]) -> Functions:
    """A library's functions, found by their names, for calls with the structures of this file."""
    found = []
    for name, structure in (("rows", _Call), ("estimate", _Estimate)):
        function = function_of(name)
        function.argtypes = (ctypes.POINTER(structure), *[ctypes.c_int64] * 3)
        function.restype = ctypes.c_int
        found.append(function)
    return Functions(*found)


def _right(known: Functions) -> bool:
    """Whether they do what ATen does, on a case with incomplete blocks and a causal one."""
    generator = torch.Generator().manual_seed(0)
    length = BLOCK + 24
    query, key, value = torch.randn(3, 1, 1, length, 20, generator=generator, dtype=torch.float32)
    ours = torch.empty_like(query)
    selection = Selection(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), causal=True)
    _fill(known.rows, Operands(query, key, value, ours), selection, 0.3)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(hidden, -math.inf)
    theirs = torch.softmax(scores, -1) @ value

    groups = torch.arange(length // STRIDE)
    estimated = estimate(query, key, groups, 2.0, False, known)[0, 0]
    reverse = query.view(-1, STRIDE, 20).flip(1).flatten(1)
    weights = torch.softmax(reverse @ key.view(-1, STRIDE * 20).T * (2 / STRIDE), -1)
    sizes = [BLOCK // STRIDE, length // STRIDE - BLOCK // STRIDE]
    rows = torch.split(weights, sizes)
    parts = [[part.sum() for part in torch.split(row, sizes, 1)] for row in rows]
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) and all(
        torch.allclose(estimated[i, j], parts[i][j], rtol=1e-4) for i in (0, 1) for j in (0, 1)
    )
