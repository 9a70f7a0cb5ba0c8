"""Where a kernel of sparse attention reads and writes, whatever layout the caller has."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Views of a call's tensors and of its result, each [B, N, S, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def operands(
    query: Tensor, key: Tensor, value: Tensor, head_first: bool
) -> tuple[Tensor, Operands]:
    """An empty result in the query's layout and dtype, and the views to compute it with.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        head_first: whether heads come before the sequence.
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    given = query, key, value, out
    return out, Operands(*(given if head_first else (t.transpose(1, 2) for t in given)))
