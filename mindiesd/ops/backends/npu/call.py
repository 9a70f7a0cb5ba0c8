"""One attention call as the facts that a choice of kernel may depend on, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.backends.npu import soc
from mindiesd.ops.masks import AttentionMask, Band

# How far a mask or bias varies: over nothing but rows and keys, over batches, over heads.
SHARED, BATCH, HEADS = "shared", "batch", "heads"


class Call(NamedTuple):
    """Everything a plan may depend on. Equal calls get equal plans.

    Attributes:
        series: of the device, as in :mod:`.soc`.
        device: its index.
        dtype: of query, key and value.
        batch: B.
        heads: N.
        kv_heads: Nkv.
        queries: Sq.
        keys: Skv.
        dim: D of query and key.
        value_dim: D of value.
        scale: factor on the scores.
        head_first: whether query, key and value are given as [B, N, S, D], not [B, S, N, D].
        layout: BNSD or BSND, the one in which fewer bytes have to be copied.
        dense: whether query, key and value are contiguous in that layout.
        keep: how far the bool mask varies; empty if there is none.
        bias: the same of the additive mask.
        bias_dtype: its dtype, or None.
        bias_rows: whether it varies over the query rows.
        band: the diagonals that are kept, without bounds that cut nothing off; or None.
        frozen: whether the call is traced or captured: nothing may be cached or measured.
    """

    series: str
    device: int | None
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    scale: float
    head_first: bool
    layout: str
    dense: bool
    keep: str
    bias: str
    bias_dtype: torch.dtype | None
    bias_rows: bool
    band: Band | None
    frozen: bool

    @property
    def masked(self) -> bool:
        """Whether anything is masked or biased."""
        return bool(self.keep or self.bias) or self.band is not None

    @property
    def corner(self) -> int:
        """Skv - Sq, the diagonal that ends at the bottom right."""
        return self.keys - self.queries

    def empties_rows(self) -> bool:
        """Whether the band alone leaves a query row without a key."""
        if self.band is None:
            return False
        lower, upper = self.band
        first, last = 0, self.queries - 1
        if upper is not None and (first + upper < 0):
            return True
        if lower is not None and last + lower > self.keys - 1:
            return True
        return lower is not None and upper is not None and lower > upper


def frozen(tensor: Tensor) -> bool:
    """Whether this call is traced, faked or captured into a graph."""
    if torch.compiler.is_compiling():
        return True
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return True
    return _capturing()


def _capturing() -> bool:
    try:
        return bool(torch.npu.is_current_stream_capturing())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return False


def _varies(shape: torch.Size) -> str:
    """Over what a tensor that broadcasts to [B, N, Sq, Skv] varies."""
    if len(shape) >= 3 and shape[-3] != 1:
        return HEADS
    return BATCH if len(shape) == 4 and shape[0] != 1 else SHARED


def turned(tensor: Tensor) -> bool:
    """Whether ``tensor.transpose(1, 2)`` is contiguous; asking it costs several times as much."""
    first, second, third, fourth = tensor.shape
    strides = tensor.stride()
    return (
        (strides[3] == 1 or fourth == 1)
        and (strides[1] == fourth or second == 1)
        and (strides[2] == second * fourth or third == 1)
        and (strides[0] == second * third * fourth or first == 1)
    )


def _layout(query: Tensor, key: Tensor, value: Tensor, head_first: bool) -> tuple[str, bool]:
    """The layout of least copying, and whether nothing is copied at all."""
    same, other = ("BNSD", "BSND") if head_first else ("BSND", "BNSD")
    as_is = (query.is_contiguous(), key.is_contiguous(), value.is_contiguous())
    if as_is == (True, True, True):
        return same, True
    swapped = (turned(query), turned(key), turned(value))
    if swapped == (True, True, True):
        return other, True
    sizes = (query.numel(), key.numel(), value.numel())
    copied = [
        sum(size for size, dense in zip(sizes, which, strict=True) if not dense)
        for which in (as_is, swapped)
    ]
    return (other if copied[1] < copied[0] else same), False


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    scale: float | None,
    head_first: bool,
    series: str | None = None,
) -> Call:
    """The facts of a call.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        mask: what is masked, or None.
        scale: factor on the scores; None is D ** -0.5.
        head_first: whether heads come before the sequence.
        series: of the device; None asks it.
    """
    batch, heads, queries, dim = query.shape
    _, kv_heads, keys, _ = key.shape
    if not head_first:
        heads, queries, kv_heads, keys = queries, heads, keys, kv_heads
    keep = bias = ""
    bias_dtype, bias_rows, band = None, False, None
    if mask is not None:
        if mask.keep is not None:
            keep = _varies(mask.keep.shape)
        if mask.bias is not None:
            bias = _varies(mask.bias.shape)
            bias_dtype = mask.bias.dtype
            bias_rows = mask.bias.shape[-2] != 1 or queries == 1
        if mask.band is not None:
            band = mask.band.within(queries, keys)
            if band.lower is None and band.upper is None:
                band = None
    layout, dense = _layout(query, key, value, head_first)
    return Call(
        soc.series() if series is None else series,
        query.device.index,
        query.dtype,
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        dim,
        value.shape[-1],
        scale if scale is not None else dim**-0.5 if dim else 1.0,
        head_first,
        layout,
        dense,
        keep,
        bias,
        bias_dtype,
        bias_rows,
        band,
        frozen(query),
    )


def within_float32(scale: float) -> bool:
    """Whether float32 kernels can be given this factor."""
    return -3e38 <= scale <= 3e38
