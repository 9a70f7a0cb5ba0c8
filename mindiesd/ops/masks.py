"""What a mask means.

Attention libraries write the same few ideas in incompatible ways: SDPA's causal flag is aligned
at the top left, flash-attention's at the bottom right; a bool mask keeps where it is True, a float
mask is added to the scores; a window counts from the diagonal of the last row. Every one of them
becomes one :class:`AttentionMask` here, once, and the backends read nothing else.

With ``i`` a query row, ``j`` a key column, the attention weights are::

    softmax over j of  scale * <q_i, k_j> + bias_ij    where keep_ij and lower <= j - i <= upper

A row with no key left, or whose every score is -inf, yields 0. A row biased by a large *finite*
number everywhere is an average of the values, as in SDPA: finite numbers are arithmetic, not masks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """The diagonals that may attend: ``lower <= j - i <= upper``; None is unbounded.

    Attributes:
        lower: smallest diagonal offset ``j - i`` that is kept.
        upper: largest diagonal offset ``j - i`` that is kept.
    """

    lower: int | None = None
    upper: int | None = None

    @classmethod
    def window(cls, left: int, right: int, queries: int, keys: int) -> Band:
        """A flash-attention window: ``i + corner - left <= j <= i + corner + right``.

        Args:
            left: keys kept before the diagonal; -1 is unlimited.
            right: keys kept after the diagonal; -1 is unlimited.
            queries: query length.
            keys: key length; ``corner = keys - queries`` ends the diagonal at the bottom right.
        """
        corner = keys - queries
        return cls(
            None if left < 0 else corner - left,
            None if right < 0 else corner + right,
        )

    def intersect(self, other: Band) -> Band:
        """The diagonals that both bands keep."""
        lower, upper = self
        if lower is None or (other.lower is not None and other.lower > lower):
            lower = other.lower
        if upper is None or (other.upper is not None and other.upper < upper):
            upper = other.upper
        return Band(lower, upper)

    def within(self, queries: int, keys: int) -> Band:
        """The same band, without the bounds that cut nothing off a [queries, keys] matrix."""
        lower, upper = self
        if lower is not None and lower <= 1 - queries:
            lower = None
        if upper is not None and upper >= keys - 1:
            upper = None
        return Band(lower, upper)

    def matrix(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The band as a bool tensor [queries, keys], True where it attends."""
        offset = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        if self.lower is None:
            return offset >= 1 - queries if self.upper is None else offset <= self.upper
        if self.upper is None:
            return offset >= self.lower
        return (offset >= self.lower) & (offset <= self.upper)


# SDPA's is_causal: key j is seen by the queries i >= j, also where the lengths differ.
TOP_LEFT_CAUSAL = Band(None, 0)
# flash-attention's causal, as a window: aligned so that the last query sees the last key.
BOTTOM_RIGHT_CAUSAL = (-1, 0)


class AttentionMask(NamedTuple):
    """Everything that restricts or biases one attention call; all three parts apply together.

    Attributes:
        keep: bool, broadcastable to [B, N, Sq, Skv], True where a key is attended; or None.
        bias: floating, broadcastable likewise, added to the scaled scores; or None.
        band: the diagonals that are kept; or None.
    """

    keep: Tensor | None = None
    bias: Tensor | None = None
    band: Band | None = None


CAUSAL = AttentionMask(band=TOP_LEFT_CAUSAL)


def attention_mask(
    attn_mask: Tensor | None, is_causal: bool = False, band: Band | None = None
) -> AttentionMask | None:
    """One value for a mask tensor, a causal flag and a band; None where nothing is masked.

    Args:
        attn_mask: bool (True attends) or floating (added), broadcastable to [B, N, Sq, Skv].
        is_causal: top-left causal, as in SDPA.
        band: further limits on the diagonals.
    """
    if is_causal:
        band = TOP_LEFT_CAUSAL if band is None else band.intersect(TOP_LEFT_CAUSAL)
    if attn_mask is None:
        return None if band is None else AttentionMask(None, None, band)
    if attn_mask.dtype is torch.bool:
        return AttentionMask(attn_mask, None, band)
    return AttentionMask(None, attn_mask, band)


def broadcasts(shape: torch.Size, batch: int, heads: int, queries: int, keys: int) -> bool:
    """Whether a mask of this shape is one SDPA takes for scores [batch, heads, queries, keys]."""
    rank = len(shape)
    if rank == 4:
        over_batch, over_heads, over_queries, over_keys = shape
        return (
            (over_keys == keys or over_keys == 1)
            and (over_queries == queries or over_queries == 1)
            and (over_heads == heads or over_heads == 1)
            and (over_batch == batch or over_batch == 1)
        )
    return (
        2 <= rank <= 3
        and shape[-1] in (1, keys)
        and shape[-2] in (1, queries)
        and (rank == 2 or shape[-3] in (1, heads))
    )


def bias_for_sdpa(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in a dtype that SDPA takes for queries of ``dtype``: that one, or float32."""
    return bias if bias.dtype is dtype or bias.dtype is torch.float32 else bias.float()


def for_sdpa(
    mask: AttentionMask, queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask as SDPA's ``(attn_mask, is_causal)``.

    A [queries, keys] tensor is built only where neither a flag nor the caller's own tensor says it.

    Args:
        mask: what to express.
        queries: query length.
        keys: key length.
        dtype: of the query; SDPA takes a bias in that dtype or in float32.
        device: where a tensor, if one is needed, shall be.
    """
    keep, bias, band = mask
    if band is not None:
        band = band.within(queries, keys)
        if band.lower is None and band.upper is None:
            band = None
    if bias is not None:
        bias = bias_for_sdpa(bias, dtype)
    if band is None:
        if keep is None or bias is None:
            return (bias if keep is None else keep), False
        return bias.masked_fill(~keep, -math.inf), False
    if keep is None and bias is None and band == TOP_LEFT_CAUSAL:
        return None, True
    inside = band.matrix(queries, keys, device)
    if keep is not None:
        inside = inside & keep
    if bias is None:
        return inside, False
    return torch.where(inside, bias, -math.inf), False
