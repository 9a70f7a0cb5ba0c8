"""Which key blocks each query block attends to, and in which order the tokens form blocks."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

BLOCK = 128
# Tokens in a group of ada_bsa's estimate.
STRIDE = 8


@dataclass(frozen=True)
class Selection:
    """The blocks of one call. A block is 128 tokens, the last one maybe fewer.

    Attributes:
        keep: bool [B, N, ceil(Sq / 128), ceil(Skv / 128)], True where a block of keys is attended;
            at least one in each row.
        order_q: int64 [Sq], the token at each place of the blocked query sequence; None if the
            tokens stay where they are.
        order_k: int64 [Skv], the same for keys.
        causal: whether query i sees the keys j <= i only; then no order is given, and a query block
            keeps no key block after its own.
    """

    keep: Tensor
    order_q: Tensor | None = None
    order_k: Tensor | None = None
    causal: bool = False

    def lists(self) -> tuple[Tensor, Tensor]:
        """The kept key blocks of all rows of all heads, one row after the other, and their ends.

        Those of row i are ``columns[ends[i]:ends[i + 1]]``, in ascending order; both are int64.
        """
        columns = self.keep.nonzero()[:, 3].contiguous()
        ends = torch.nn.functional.pad(self.keep.sum(-1).view(-1).cumsum(0), (1, 0))
        return columns, ends


def blocks_of(length: int) -> int:
    """Number of blocks of a sequence."""
    return -(-length // BLOCK)


def kept(candidates: int, sparsity: float) -> int:
    """How many of so many blocks are kept: ``ceil(candidates * (1 - sparsity))``, at least one.

    Exact in decimals: 0.7 of 10 blocks is 7, where binary floating point says 7.000000000000001.
    """
    share = 1 - Fraction(sparsity).limit_denominator(10**6)
    return max(1, ceil(candidates * share))


def largest(scores: Tensor, count: int) -> Tensor:
    """bool of the scores' shape, True at the ``count`` largest of each row; ties go to the first.

    Args:
        scores: [..., n].
        count: at least 1.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
