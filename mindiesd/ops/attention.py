"""Scaled dot-product attention: the public function, and the two that the patch engine calls.

    out = softmax(scale * Q Kᵀ + bias, over the kept keys) V

The meaning of masks, causal flags and windows is in :mod:`mindiesd.ops.masks`. Source: Vaswani et
al., *Attention Is All You Need* (arXiv 1706.03762); grouped queries: arXiv 2305.13245.

:func:`refusal` and :func:`attend` run on every redirected SDPA call, so both are written for the
host: each property of a tensor is read once, and what reading costs decides the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.backends import backend_for, native
from mindiesd.ops.dispatch import MEASURED, Kernel, requested
from mindiesd.ops.masks import CAUSAL, Band, attention_mask, broadcasts

# Bound here: each lookup through `torch` on the path of every call is measurable.
_BOOL, _FLOAT16, _BFLOAT16, _FLOAT32 = torch.bool, torch.float16, torch.bfloat16, torch.float32
_grad_enabled = torch.is_grad_enabled


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    fused: bool = True,
    head_first: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention forward: ``softmax(scale * Q Kᵀ + mask) V``.

    Rows in which no key may be attended yield zeros, and so does an empty key sequence. The key
    and value may have fewer heads than the query (grouped-query attention).

    Args:
        query: [B, Sq, N, D], or [B, N, Sq, D] with ``head_first``; float16, bfloat16, float32 or
            float64.
        key: [B, Skv, Nkv, D], likewise; same dtype and device.
        value: [B, Skv, Nkv, Dv], likewise.
        attn_mask: 2 to 4 dimensions, broadcastable to [B, N, Sq, Skv] whatever ``head_first`` is.
            bool: True attends. Floating (float16, bfloat16, float32 or the query's dtype): added
            to the scaled scores.
        scale: factor on the scores; None is ``D ** -0.5``.
        fused: True uses the best kernel of the device; False composes matmul, softmax and matmul in
            float32.
        head_first: whether heads come before the sequence in every tensor.
        **kwargs: ``opt_mode`` ("runtime", "static", "manual"), ``op_type``, ``layout``: see
            :mod:`mindiesd.ops.dispatch`. ``is_causal``: query i sees the keys j <= i, besides the
            mask. ``enable_gqa``: None (default) groups heads whenever N is a multiple of Nkv; False
            insists on equal numbers. ``window_size``: (left, right) as in flash-attention, query i
            sees the keys from i + Skv - Sq - left to i + Skv - Sq + right; -1 is unlimited.

    Returns:
        [B, Sq, N, Dv], or [B, N, Sq, Dv] with ``head_first``; dtype of the query.

    Raises:
        ParametersInvalid: an argument is wrong, a keyword is unknown, or a gradient is needed.
    """
    is_causal, enable_gqa, band, kernel, measure = False, None, None, None, True
    if kwargs:
        is_causal, enable_gqa, window_size, kernel, measure = _extras(**kwargs)
    if scale is not None:
        scale = checks.real("scale", scale)
    flag: Any = fused
    if flag is not True and flag is not False:
        checks.boolean("fused", flag)
    flag = head_first
    if flag is not True and flag is not False:
        checks.boolean("head_first", flag)
    try:
        if not (
            isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        ) or refusal(query, key, value, attn_mask, False, enable_gqa is not False, head_first):
            # Slower, and exact about what is wrong; it may also find that nothing is.
            _check(query, key, value, attn_mask, enable_gqa, head_first)
        if _grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or (attn_mask is not None and attn_mask.requires_grad)
        ):
            checks.forward_only(query=query, key=key, value=value, attn_mask=attn_mask)
        if kwargs and window_size is not None:
            sequence = 2 if head_first else 1
            band = Band.window(*window_size, query.shape[sequence], key.shape[sequence])
        if fused:
            return attend(
                query, key, value, attn_mask, scale, is_causal, band, head_first, kernel, measure
            )
        mask = attention_mask(attn_mask, is_causal, band)
        # Explicitly unfused means exactly this composition, on every device.
        return native.attention_composed(query, key, value, mask, scale, head_first)
    except RuntimeError:
        # Sparse and nested tensors only show when touched; asking each call would cost more than
        # all other checks.
        _check(query, key, value, attn_mask, enable_gqa, head_first)
        raise


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    band: Band | None = None,
    head_first: bool = True,
    kernel: Kernel | None = None,
    measure: bool = False,
) -> Tensor:
    """Attention of arguments known to be right, by the backend of the query's device.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise; N is a multiple of Nkv.
        value: [B, Nkv, Skv, Dv] likewise.
        attn_mask: bool (True attends) or floating (added), broadcastable to [B, N, Sq, Skv].
        scale: factor on the scores; None is ``D ** -0.5``.
        is_causal: top-left causal, as in SDPA.
        band: further limits on the diagonals.
        head_first: whether heads come before the sequence.
        kernel: what a manual call asked for.
        measure: whether a backend with several kernels may time them; redirected calls do not,
            so that a script takes the same kernels each time it runs.

    Returns:
        Attention in the query's layout and dtype.
    """
    if attn_mask is None and band is None:
        mask = CAUSAL if is_causal else None
    elif band is None and not is_causal and query.is_cpu:
        # ATen takes it as it is: what would be taken apart again is not put together.
        return native.attention(query, key, value, attn_mask, scale, head_first, kernel)
    else:
        mask = attention_mask(attn_mask, is_causal, band)
    if query.is_cpu:
        return native.attention(query, key, value, mask, scale, head_first, kernel)
    if measure:
        kernel = MEASURED
    backend = backend_for(query.device.type)
    return backend.attention(query, key, value, mask, scale, head_first, kernel)


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    head_first: bool = True,
) -> str | None:
    """Why an SDPA call is not one that :func:`attend` provably computes; None if it is.

    Gradients and dropout are the caller's to look at. The reasons are constants, so that they can
    be counted.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        attn_mask: the mask, if any.
        is_causal: whether the call is also causal.
        enable_gqa: whether the call allows fewer key heads than query heads.
        head_first: whether heads come before the sequence.
    """
    if query.is_nested:
        return "nested tensor"
    shape = query.shape
    if len(shape) != 4:
        return "3-D input" if len(shape) == 3 else "not 4-D"
    key_shape, value_shape = key.shape, value.shape
    if shape != key_shape or shape != value_shape:
        if len(key_shape) != 4 or len(value_shape) != 4:
            return "not 4-D"
        if shape[0] != key_shape[0] or shape[0] != value_shape[0]:
            return "batch sizes differ"
        if key_shape[1] != value_shape[1] or key_shape[2] != value_shape[2]:
            return "key and value differ in heads or length"
        if shape[3] != key_shape[3]:
            return "query and key differ in head dimension"
        heads, kv_heads = (shape[1], key_shape[1]) if head_first else (shape[2], key_shape[2])
        if heads != kv_heads:
            if not enable_gqa:
                return "head counts differ without enable_gqa"
            if kv_heads == 0 or heads % kv_heads:
                return "head counts do not divide"
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype:
        return "query, key and value differ in dtype"
    if dtype is not _FLOAT32 and dtype is not _BFLOAT16 and dtype is not _FLOAT16:
        return "dtype float64" if dtype is torch.float64 else "dtype is not floating"
    on_cpu = query.is_cpu
    device = None
    if on_cpu:
        if not (key.is_cpu and value.is_cpu):
            return "query, key and value differ in device"
    else:
        device = query.device
        if key.device != device or value.device != device:
            return "query, key and value differ in device"
    if attn_mask is None:
        return None
    if is_causal:
        return "mask and is_causal together"
    if not isinstance(attn_mask, Tensor) or attn_mask.is_nested:
        return "mask is not a dense tensor"
    mask_dtype = attn_mask.dtype
    if mask_dtype is not _BOOL and mask_dtype is not dtype and mask_dtype is not _FLOAT32:
        return "mask dtype"
    if not attn_mask.is_cpu if on_cpu else attn_mask.device != device:
        return "mask on another device"
    batch, heads, queries, _ = shape
    keys = key_shape[2]
    if not head_first:
        heads, queries, keys = queries, heads, key_shape[1]
    if not broadcasts(attn_mask.shape, batch, heads, queries, keys):
        return "mask does not broadcast"
    return None


def _extras(
    opt_mode: str = "runtime",
    op_type: str = "fused_attn_score",
    layout: str = "BNSD",
    is_causal: bool = False,
    enable_gqa: bool | None = None,
    window_size: tuple[int, int] | None = None,
    **unknown: object,
) -> tuple[bool, bool | None, tuple[int, int] | None, Kernel | None, bool]:
    """The keyword-only extras: is_causal, enable_gqa, window_size, the kernel, whether to time."""
    if unknown:
        allowed = "opt_mode, op_type, layout, is_causal, enable_gqa, window_size"
        raise ParametersInvalid(next(iter(unknown)), "an unknown keyword argument", allowed)
    kernel = None
    if opt_mode != "runtime" or op_type != "fused_attn_score" or layout != "BNSD":
        kernel = requested(opt_mode, op_type, layout)
    if is_causal is not False:
        checks.boolean("is_causal", is_causal)
    if enable_gqa is not None:
        checks.boolean("enable_gqa", enable_gqa)
    if window_size is not None:
        window_size = checks.window("window_size", window_size)
    return is_causal, enable_gqa, window_size, kernel, opt_mode == "runtime"


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool | None,
    head_first: bool,
) -> None:
    """Every rule on the tensors of a call, each with its own message."""
    checks.tensor("query", query, 4)
    for name, other in (("key", key), ("value", value)):
        checks.tensor(name, other, 4)
        checks.same_kind(name, other, "query", query)
        if other.shape[0] != query.shape[0]:
            raise ParametersInvalid(
                name, checks.describe(other), f"the batch size of query, {query.shape[0]}"
            )
    sequence, head = (2, 1) if head_first else (1, 2)
    check_dimensions(query, key, value, ("query", "key", "value"), sequence, head, enable_gqa)
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor) or attn_mask.is_nested:
        raise ParametersInvalid(
            "attn_mask", checks.describe(attn_mask), "None or a dense bool or floating tensor"
        )
    dtypes = {torch.bool, torch.float16, torch.bfloat16, torch.float32, query.dtype}
    if attn_mask.dtype not in dtypes:
        # A float64 bias would lose range in the computation, and -1e300 become a mask.
        raise ParametersInvalid(
            "attn_mask",
            checks.describe(attn_mask),
            "bool, float16, bfloat16, float32 or the dtype of query",
        )
    checks.same_device("attn_mask", attn_mask, "query", query)
    scores = (query.shape[0], query.shape[head], query.shape[sequence], key.shape[sequence])
    if not broadcasts(attn_mask.shape, *scores):
        raise ParametersInvalid(
            "attn_mask",
            checks.describe(attn_mask),
            f"2 to 4 dimensions that broadcast to [B, N, Sq, Skv] = {list(scores)}",
        )


def check_dimensions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    names: tuple[str, str, str],
    sequence: int,
    head: int,
    enable_gqa: bool | None = None,
) -> None:
    """Lengths, head counts and head dimensions of one attention call fit together.

    Args:
        query: any layout whose last dimension is the head dimension.
        key: same layout.
        value: same layout.
        names: what the caller calls the three.
        sequence: the dimension of the sequence.
        head: the dimension of the heads.
        enable_gqa: False insists on equal head counts.
    """
    query_name, key_name, value_name = names
    shown = checks.describe
    if query.shape[-1] != key.shape[-1]:
        raise ParametersInvalid(
            key_name, shown(key), f"the head dimension of {query_name}, {query.shape[-1]}"
        )
    if value.shape[sequence] != key.shape[sequence] or value.shape[head] != key.shape[head]:
        raise ParametersInvalid(
            value_name,
            shown(value),
            f"the length and head count of {key_name}, {key.shape[sequence]} and {key.shape[head]}",
        )
    heads, kv_heads = query.shape[head], key.shape[head]
    if heads != kv_heads and (enable_gqa is False or kv_heads == 0 or heads % kv_heads):
        allowed = (
            f"the head count of {query_name}, {heads}, with enable_gqa=False"
            if enable_gqa is False
            else f"a head count that divides that of {query_name}, {heads}"
        )
        raise ParametersInvalid(key_name, shown(key), allowed)
