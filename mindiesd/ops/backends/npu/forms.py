"""Masks and biases in the forms that the attention kernels take.

Kernels mask where 1 (the opposite of PyTorch), broadcast nothing over rows and keys, and read
causal masks and windows off one 2048 x 2048 triangle. What is made here from a caller's mask is
made once and kept with it (:mod:`.derived`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindiesd.ops.backends.npu.call import BATCH, HEADS, Call
from mindiesd.ops.backends.npu.derived import constant, derived
from mindiesd.ops.masks import AttentionMask, Band

SIDE = 2048
INT_MAX = 2147483647

# Far below any score, and far above the number that kernels mask with; more than the distance of
# float32's neighbours at its lowest, 2 ** 104, so that adding it there is not lost.
_LOWEST = 2.0**110

LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = 2, 3, 4


class Sparse(NamedTuple):
    """A band as the kernels' ``sparse_mode``: 2 is j <= i, 3 is j <= i + Skv - Sq, 4 a window."""

    mode: int
    pre: int = INT_MAX
    next: int = INT_MAX


def sparse(call: Call) -> Sparse | None:
    """The band of a call as a mode of the kernels, or None where only a full mask says it.

    Windows with a negative side are not documented, so they become full masks.
    """
    if call.band is None:
        return None
    lower, upper = call.band
    if lower is None and upper == 0:
        return Sparse(LEFT_UP_CAUSAL)
    if lower is None and upper == call.corner:
        return Sparse(RIGHT_DOWN_CAUSAL)
    pre = INT_MAX if lower is None else call.corner - lower
    after = INT_MAX if upper is None else upper - call.corner
    return Sparse(BAND, pre, after) if pre >= 0 and after >= 0 else None


def compressed(device: torch.device, frozen: bool) -> Tensor:
    """The upper triangle [2048, 2048] of the modes 2 to 4, once per device."""

    def build() -> Tensor:
        return torch.ones(SIDE, SIDE, dtype=torch.bool, device=device).triu(1)

    return constant(frozen, ("compressed", device), build)


def _outside(band: Band, call: Call, device: torch.device) -> Tensor:
    """bool [Sq, Skv], True where the band masks out; made once per device, sizes and band."""

    def build() -> Tensor:
        return ~band.matrix(call.queries, call.keys, device)

    frozen = call.frozen or call.queries * call.keys > 64 << 20
    return constant(frozen, ("band", device, call.queries, call.keys, band), build)


def _spread(call: Call) -> tuple[int, int]:
    """The leading dimensions of a mask of this call: [1, 1], [B, 1] or [B, N]."""
    kinds = (call.keep, call.bias)
    if HEADS in kinds:
        return call.batch, call.heads
    return (call.batch, 1) if BATCH in kinds else (1, 1)


def _four(tensor: Tensor) -> Tensor:
    """A broadcastable mask with four dimensions."""
    while tensor.dim() < 4:
        tensor = tensor[None]
    return tensor


def _masked_out(mask: AttentionMask, call: Call) -> Tensor:
    """bool, broadcastable to [B, N, Sq, Skv], True where a score is masked out."""
    out = None
    if mask.keep is not None:
        out = ~_four(mask.keep)
    if mask.bias is not None:
        # -inf is no number to a kernel that computes with it: it gives NaN.
        infinite = _four(mask.bias) == -math.inf
        out = infinite if out is None else out | infinite
    if call.band is not None:
        device = _source(mask).device
        outside = _four(_outside(call.band, call, device))
        out = outside if out is None else out | outside
    assert out is not None
    return out


def _source(mask: AttentionMask) -> Tensor:
    source = mask.bias if mask.keep is None else mask.keep
    assert source is not None
    return source


def _kept(mask: AttentionMask | None) -> bool:
    """Whether there is exactly one tensor that derivatives can be kept with."""
    return mask is not None and (mask.keep is None) != (mask.bias is None)


def _full(call: Call, out: Tensor) -> Tensor:
    return out.expand(*_spread(call), call.queries, call.keys).contiguous()


def full(mask: AttentionMask | None, call: Call, device: torch.device) -> Tensor:
    """The ``atten_mask`` of everything masked: [1|B, 1|N, Sq, Skv], contiguous."""
    if mask is None or (mask.keep is None and mask.bias is None):
        assert call.band is not None
        return _outside(call.band, call, device)[None, None]
    given = mask

    def build() -> Tensor:
        if given.keep is not None and given.bias is None and call.band is None:
            # Inverted while it is expanded, in one launch.
            whole = _four(given.keep).expand(*_spread(call), call.queries, call.keys)
            return (~whole).contiguous()
        return _full(call, _masked_out(given, call))

    frozen = call.frozen or not _kept(mask)
    return derived(frozen, _source(mask), ("full", _key(call)), build)


def opened(
    mask: AttentionMask | None, call: Call, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """:func:`full` for kernels that forbid rows without a key, and the rows that were opened.

    Those rows attend to everything, and whatever comes out is to be replaced by 0. They are None
    where the band proves that there are none.
    """
    if mask is None or (mask.keep is None and mask.bias is None):
        everything = full(mask, call, device)
        if not call.empties_rows():
            return everything, None
        empty = everything.all(-1, keepdim=True)
        return everything & ~empty, empty
    given = mask

    def build() -> tuple[Tensor, Tensor]:
        out = _masked_out(given, call)
        out = out.expand(*out.shape[:-1], call.keys)
        empty = out.all(-1, keepdim=True)
        return _full(call, out & ~empty), empty

    frozen = call.frozen or not _kept(mask)
    return derived(frozen, _source(mask), ("opened", _key(call)), build)


def biased(
    mask: AttentionMask, call: Call, dtype: torch.dtype, one_row: bool
) -> tuple[Tensor, Tensor]:
    """The additive mask, finite, and the ``atten_mask`` beside it.

    The first is [1|B, N, Sq, Skv], or, if ``one_row``, [B, N, 1, Skv]; the second as in
    :func:`full`. Masked-out scores get 0. Every other number stays, being arithmetic and not a
    mask, except that a row whose largest number is near float32's lowest is raised as a whole, to
    which softmax is indifferent: kernels mask with such a number, and the row could not be told
    from what is masked. It is raised to where float32 still swallows any score, as it does at its
    lowest, so that a row of finite minima stays an average.

    This is for every call that brings a new mask, so launches count: five, and an expansion where
    the mask broadcasts.
    """
    given = mask.bias
    assert given is not None
    row = one_row and not (call.bias_rows or call.keep or call.band)

    def build() -> tuple[Tensor, Tensor]:
        four, out = _four(given), _masked_out(mask, call)
        wide = four.float() if torch.finfo(dtype).min < -_LOWEST else four
        numbers = wide
        if call.keep or call.band:
            numbers = wide.masked_fill(out, -math.inf)
        if wide.dtype is torch.float32:
            # top + _LOWEST where top < -_LOWEST, else 0. Only rows of -inf become NaN here.
            top = numbers.amax(-1, keepdim=True)
            finite = (numbers - F.softshrink(top, _LOWEST)).masked_fill_(out, 0.0)
        else:
            finite = numbers.masked_fill(out, 0.0)
        finite = finite.to(dtype)
        batch = call.batch if row or four.shape[0] != 1 or call.keep in (BATCH, HEADS) else 1
        rows = 1 if row else call.queries
        return finite.expand(batch, call.heads, rows, call.keys).contiguous(), _full(call, out)

    frozen = call.frozen or not _kept(mask)
    return derived(frozen, given, ("biased", _key(call), dtype, row), build)


def _key(call: Call) -> tuple[object, ...]:
    """What a derivative depends on besides the mask itself."""
    return (call.batch, call.heads, call.queries, call.keys, call.keep, call.bias, call.band)
