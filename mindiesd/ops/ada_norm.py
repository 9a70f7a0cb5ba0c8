"""Adaptive layer norm: a layer norm whose scale and shift come from the conditioning.

    out = layer_norm(x) * (1 + scale) + shift

Source: Peebles and Xie, *Scalable Diffusion Models with Transformers* (arXiv 2212.09748), adaLN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks, norm
from mindiesd.ops.backends import backend_of, native
from mindiesd.ops.norm import check_layer_norm


def layernorm_scale_shift(
    layernorm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor, fused: bool = True
) -> Tensor:
    """``layernorm(x) * (1 + scale) + shift``, in float32 or better and rounded once.

    On an Ascend NPU, half precision throughout is folded into fewer kernels of that dtype, which
    round less often than the expression above does; ``fused=False`` is exact there too.

    Args:
        layernorm: the module whose weight, bias and eps are used; it normalises H.
        x: [B, S, H], floating.
        scale: [B, H] or [B, 1, H], floating.
        shift: [B, H] or [B, 1, H], floating; need not have the form of ``scale``.
        fused: True uses the best kernel of the device; False composes it of elementary ones.

    Returns:
        Shape and dtype of x.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    if fused is True and type(layernorm) is nn.LayerNorm:
        weight = layernorm.weight
        usual = _usual(layernorm.normalized_shape, weight, x, scale, shift)
        if usual is not None:
            backend = native if x.is_cpu else backend_of(x)
            return backend.layer_norm_scale_shift(
                x, weight, layernorm.bias, layernorm.eps, usual[0], usual[1]
            )
    # Slower, and exact about what is wrong; it may also find that nothing is.
    check_layer_norm("layernorm", layernorm, x)
    if len(layernorm.normalized_shape) != 1:
        shown = f"normalized_shape {list(layernorm.normalized_shape)}"
        raise ParametersInvalid("layernorm", shown, "a LayerNorm over the last dimension only")
    checks.boolean("fused", fused)
    scale, shift = _modulation("scale", scale, x), _modulation("shift", shift, x)
    backend = backend_of(x) if fused else native
    return backend.layer_norm_scale_shift(
        x, layernorm.weight, layernorm.bias, layernorm.eps, scale, shift
    )


_FLOATING = frozenset(checks.FLOATING)
_STRIDED = torch.strided


def _usual(
    normalized_shape: tuple[int, ...], weight: Tensor | None, x: Any, scale: Any, shift: Any
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift as [B, 1, H] where the call is as it usually is; else None."""
    if not (isinstance(x, Tensor) and isinstance(scale, Tensor) and isinstance(shift, Tensor)):
        return None
    try:
        shape, scales, shifts = x.shape, scale.shape, shift.shape
    except RuntimeError:
        return None  # a nested tensor, which is strided too
    if x.layout is not _STRIDED:
        return None
    if len(shape) != 3 or normalized_shape != (shape[2],):
        return None
    if not (x.dtype in _FLOATING and scale.dtype in _FLOATING and shift.dtype in _FLOATING):
        return None
    if not (x.is_cpu and scale.is_cpu and shift.is_cpu and (weight is None or weight.is_cpu)):
        device = x.device
        if scale.device != device or shift.device != device:
            return None
        if weight is not None and weight.device != device:
            return None
    flat, spread = (shape[0], shape[2]), (shape[0], 1, shape[2])
    if scales == flat:
        scale = scale.unsqueeze(1)
    elif scales != spread:
        return None
    if shifts == flat:
        shift = shift.unsqueeze(1)
    elif shifts != spread:
        return None
    return scale, shift


def layer_norm_scale_shift(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    fast: bool = False,
) -> Tensor:
    """The same of arguments known to be right; also for a modulation of its own per token.

    Args:
        x: [B, S, H].
        weight: [H] or None for ones.
        bias: [H] or None for zeros.
        eps: added to the variance.
        scale: [B, 1, H] or [B, S, H].
        shift: [B, 1, H] or [B, S, H].
        fast: whether half precision may be rounded on the way where that saves memory traffic.

    Returns:
        Shape and dtype of x.
    """
    return backend_of(x).layer_norm_scale_shift(x, weight, bias, eps, scale, shift, fast)


def _modulation(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A scale or shift as [B, 1, H]."""
    checks.tensor(name, value, (2, 3))
    checks.same_device(name, value, "x", x)
    batch, _, hidden = x.shape
    if value.shape not in ((batch, hidden), (batch, 1, hidden)):
        allowed = f"[B, H] = {[batch, hidden]} or [B, 1, H] = {[batch, 1, hidden]}"
        raise ParametersInvalid(name, checks.describe(value), allowed)
    return value if value.dim() == 3 else value[:, None]


def layer_norm_scale(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor, centred: bool
) -> Tensor:
    """``layer_norm(x) * weight * scale``, one scale for every token; arguments known to be right.

    In half precision the product of weight and scale is rounded to it, which is the only rounding
    besides that of the result.

    Args:
        x: [..., H], float32, bfloat16 or float16.
        weight: [H] of x's dtype, or None for ones.
        eps: added to the variance.
        scale: [H] of x's dtype.
        centred: whether 1 is to be added to the scale.

    Returns:
        Shape and dtype of x.
    """
    return norm.layer_norm(x, x.shape[-1:], _gain(weight, scale, centred), None, eps)


def rms_norm_scale(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor, centred: bool
) -> Tensor:
    """``rms_norm(x) * weight * scale``, as :func:`layer_norm_scale`."""
    return norm.rms_norm(x, _gain(weight, scale, centred), eps)


def _gain(weight: Tensor | None, scale: Tensor, centred: bool) -> Tensor:
    if weight is None:
        return scale + 1 if centred else scale
    return torch.addcmul(weight, weight, scale) if centred else weight * scale
