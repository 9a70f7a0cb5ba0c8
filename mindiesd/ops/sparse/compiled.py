"""Block-sparse attention on the CPU by the library of :mod:`mindiesd.compiled`.

What :mod:`.threaded` does with ATen's operators, with everything between two of them left out:
no gathered copies but those that fit into a core's cache, no look for the maximum but in registers,
and no word with Python before a thread has finished its rows.

Without the library, on other processors than x86-64 with AVX2 and for float64, :mod:`.threaded`
computes. What is found is tried on a small case first: a library that gives other results than ATen
is not used.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindiesd.compiled.library import Library, LibraryUnavailable
from mindiesd.ops.sparse import threaded
from mindiesd.ops.sparse.selection import BLOCK, Selection
from mindiesd.ops.sparse.workers import WORKERS

_log = logging.getLogger("mindiesd")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Tasks to be made of a call, at least.
_TASKS = 64


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


Rows = Callable[[_Call, int, int, int], int]


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attention` can compute these; on the CPU, each with as many dimensions."""
    return (
        query.dtype in _KINDS
        and all(t.stride(-1) == 1 and not t.is_neg() for t in (query, key, value))
        and rows() is not None
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float, head_first: bool
) -> Tensor:
    """Attention over the selected blocks; arguments and result as :func:`.threaded.attention`.

    Raises:
        MemoryError: the buffers of a row could not be had.
    """
    compute = rows()
    assert compute is not None
    return attend(compute, query, key, value, selection, scale, head_first)


def attend(
    compute: Rows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    head_first: bool,
) -> Tensor:
    """The same by the given function of a library."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    q, k, v, result = query, key, value, out
    if not head_first:
        q, k, v, result = (t.transpose(1, 2) for t in (query, key, value, out))
    WORKERS.alone(lambda: _fill(compute, result, q, k, v, selection, scale))
    return out


def _fill(
    compute: Rows,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
) -> None:
    """The same, written to ``out``; all are [B, N, S, D]."""
    columns, ends = selection.lists()
    # Held until the end: the call has their addresses only.
    orders = [
        None if order is None else order.contiguous()
        for order in (selection.order_q, selection.order_k)
    ]
    batch, heads, rows = selection.keep.shape[:3]
    call = _Call(
        *(_Operand(t.data_ptr(), *t.stride()[:3]) for t in (query, key, value, out)),
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
        if compute(call, pair, first, stop):
            raise MemoryError("no memory for the buffers of sparse attention")

    WORKERS.share_rows(batch * heads, rows, _TASKS, lambda: some)


@functools.cache
def rows() -> Rows | None:
    """The library's function for this processor; None if there is none, or it is not to be trusted.

    It computes rows of blocks of one batch and head, (call, batch * heads + head, first, stop),
    and returns 0 unless memory was missing.
    """
    try:
        found = typed(Library().function())
    except LibraryUnavailable as error:
        _log.info("sparse attention on the CPU is computed by ATen's operators: %s", error)
        return None
    if not _right(found):
        _log.warning("the compiled sparse attention is wrong on this machine and is not used")
        return None
    return found


def typed(function: Any) -> Rows:
    """The library's function, for calls with the structure of this file."""
    function.argtypes = (ctypes.POINTER(_Call), ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _right(compute: Rows) -> bool:
    """Whether it does what ATen does, on a case with an incomplete block and a causal one."""
    generator = torch.Generator().manual_seed(0)
    length = BLOCK + 23
    query, key, value = torch.randn(3, 1, 1, length, 20, generator=generator).unbind(0)
    selection = Selection(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), causal=True)
    arguments = (query, key, value, selection, 0.3, True)
    ours = attend(compute, *arguments)
    return torch.allclose(ours, threaded.attention(*arguments), rtol=1e-4, atol=1e-5)
