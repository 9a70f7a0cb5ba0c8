"""ATen: right on every device PyTorch has, and what the other backends fall back on.

Half precision is rounded once, at the end; everything between is float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.ops.dispatch import Kernel
from mindiesd.ops.masks import AttentionMask, bias_for_sdpa, for_sdpa

_sdpa = torch._C._nn.scaled_dot_product_attention

# Before the fused kernel came in 2.8, torch.rms_norm rounded half precision twice (once before the
# weight).
_RMS_NORM_ROUNDS_ONCE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where one of the tensors is."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | Tensor | None,
    scale: float | None,
    head_first: bool,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention by ATen's best kernel; ``kernel`` names other devices' kernels and changes nothing.

    The result is bit for bit that of ``F.scaled_dot_product_attention`` with the same mask.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise; N is a multiple of Nkv.
        value: [B, Nkv, Skv, Dv] likewise.
        mask: what is masked, or None; a tensor that is all of it may be given by itself.
        scale: factor on the scores; None is D ** -0.5.
        head_first: whether heads come before the sequence.
        kernel: ignored.
    """
    if not head_first:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    attn_mask, is_causal = None, False
    if isinstance(mask, Tensor):
        attn_mask = mask if mask.dtype is torch.bool else bias_for_sdpa(mask, query.dtype)
    elif mask is not None:
        attn_mask, is_causal = for_sdpa(
            mask, query.shape[2], key.shape[2], query.dtype, query.device
        )
    # A branch, not the comparison itself, which is no bool where dynamic shapes are traced.
    grouped = False
    if query.shape[1] != key.shape[1]:
        grouped = True
    out: Tensor = _sdpa(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
    )
    return out if head_first else out.transpose(1, 2)


def attention_composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    scale: float | None,
    head_first: bool,
    softcap: float = 0.0,
) -> Tensor:
    """Attention as matmul, softmax, matmul: for what no kernel computes, and to compare with.

    Never multiplies in half precision: the scores of large activations overflow float16.

    Args:
        query: as for :func:`attention`.
        key: as for :func:`attention`. Grouped heads are matched by a view, without a copy.
        value: as for :func:`attention`.
        mask: what is masked, or None.
        scale: factor on the scores; None is D ** -0.5.
        head_first: whether heads come before the sequence.
        softcap: c > 0 replaces each scaled score s by c * tanh(s / c), before the mask.
    """
    if not head_first:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if keys == 0 or kv_heads == 0:
        out = query.new_zeros(batch, heads, queries, value.shape[-1])
        return out if head_first else out.transpose(1, 2)

    wide = _wide(query)
    factor = scale if scale is not None else dim**-0.5 if dim else 1.0
    # Query heads that share a key head are rows of one matrix product.
    rows = heads // kv_heads * queries
    grouped = (query.to(wide) * factor).reshape(batch, kv_heads, rows, dim)
    scores = (grouped @ key.to(wide).transpose(-2, -1)).view(batch, heads, queries, keys)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        if mask.bias is not None:
            scores = scores.add_(mask.bias)
        if mask.keep is not None:
            scores = scores.masked_fill_(~mask.keep, -math.inf)
        if mask.band is not None:
            inside = mask.band.matrix(queries, keys, query.device)
            scores = scores.masked_fill_(~inside, -math.inf)

    # Softmax, but a row of -inf only is a row of zeros instead of NaN.
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == -math.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights.view(batch, kv_heads, rows, keys) @ value.to(wide)
    out = out.view(batch, heads, queries, value.shape[-1])
    out = out.div_(total.masked_fill_(total == 0, 1.0)).to(query.dtype)
    return out if head_first else out.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, as_is: bool = False) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, rounded once, in x's dtype.

    Args:
        x: [..., H], any floating dtype.
        weight: [H], any floating dtype, or None for ones.
        eps: added to the mean square.
        as_is: of no meaning here.
    """
    shape = (x.shape[-1],)
    same = weight is None or weight.dtype is x.dtype
    if same and (_RMS_NORM_ROUNDS_ONCE or x.dtype in (torch.float32, torch.float64)):
        return torch.rms_norm(x, shape, weight, eps)
    wide = _wide(x, weight)
    gain = None if weight is None else weight.to(wide)
    return torch.rms_norm(x.to(wide), shape, gain, eps).to(x.dtype)


def centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * (1 + weight)`` over the last dimension, rounded once.

    Args:
        x: [..., H], any floating dtype.
        weight: [H], any floating dtype.
        eps: added to the mean square.
    """
    wide = _wide(x, weight)
    gain = weight.to(wide) + 1
    return torch.rms_norm(x.to(wide), (x.shape[-1],), gain, eps).to(x.dtype)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, rounded once, in x's dtype.

    Args:
        x: [..., *normalized_shape], any floating dtype.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: of ``normalized_shape``, any floating dtype, or None for ones.
        bias: of ``normalized_shape``, any floating dtype, or None for zeros.
        eps: added to the variance.
    """
    same = (weight is None or weight.dtype is x.dtype) and (bias is None or bias.dtype is x.dtype)
    if same or _takes_float32_parameters(x, weight, bias):
        return torch.layer_norm(x, normalized_shape, weight, bias, eps)
    wide = _wide(x, weight, bias)
    gain = None if weight is None else weight.to(wide)
    offset = None if bias is None else bias.to(wide)
    return torch.layer_norm(x.to(wide), normalized_shape, gain, offset, eps).to(x.dtype)


def _takes_float32_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether ATen itself mixes half inputs with float32 parameters, saving two passes over x."""
    return (
        x.is_cpu
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight is not None
        and weight.dtype is torch.float32
        and (bias is None or bias.dtype is torch.float32)
    )


def layer_norm_scale_shift(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    fast: bool = False,
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` over the last dimension, rounded once, in x's dtype.

    Args:
        x: [B, S, H].
        weight: [H] or None.
        bias: [H] or None.
        eps: added to the variance.
        scale: [B, 1, H] or [B, S, H].
        shift: [B, 1, H] or [B, S, H].
        fast: of no meaning here.
    """
    hidden = x.shape[-1]
    wide = _wide(x, weight, bias, scale, shift)
    gain = scale.to(wide) + 1
    offset = shift.to(wide)
    if scale.shape[:-1] == (1, 1) and shift.shape[:-1] == (1, 1):
        # One modulation for every token is a layer norm with other parameters: a single kernel.
        gain, offset = gain.view(hidden), offset.view(hidden)
        if bias is not None:
            offset = torch.addcmul(offset, bias.to(wide), gain)
        if weight is not None:
            gain = gain * weight.to(wide)
        return layer_norm(x, (hidden,), gain, offset, eps)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    normed = torch.layer_norm(x.to(wide), (hidden,), weight, bias, eps)
    return torch.addcmul(offset, normed, gain).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x * cos + rot(x) * sin`` in float32 or better, rounded once, in x's dtype.

    The rotated tensor is never built: each half of the result gets its own term. IEEE arithmetic
    makes ``a - b * c`` and ``a + (-b) * c`` the same bits.

    Args:
        x: [..., D], D even.
        cos: broadcastable to x.
        sin: broadcastable to x.
        interleaved: rotate neighbours (0,1), (2,3), … instead of halves (0,D/2), (1,D/2+1), ….
    """
    wide = _wide(x, cos, sin)
    full = x.to(wide)
    out = full * cos.to(wide)
    sin = sin.to(wide)
    if interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        half = x.shape[-1] // 2
        first, second = slice(0, half), slice(half, None)
    out[..., first].sub_(full[..., second] * sin[..., first])
    out[..., second].add_(full[..., first] * sin[..., second])
    return out.to(x.dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU in x's dtype: erf (``"none"``), ``"tanh"``, or ``"fast"``, x * sigmoid(1.702 x)."""
    if approximate == "fast":
        full = x.to(_wide(x))
        return (full * torch.sigmoid(1.702 * full)).to(x.dtype)
    return torch._C._nn.gelu(x, approximate=approximate)


def geglu(x: Tensor, approximate: str) -> Tensor:
    """First half of the last dimension * GELU of the second, in x's dtype."""
    left, right = x.chunk(2, -1)
    return left * torch._C._nn.gelu(right, approximate=approximate)


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension * the second, in x's dtype."""
    left, right = x.chunk(2, -1)
    return torch.nn.functional.silu(left) * right
