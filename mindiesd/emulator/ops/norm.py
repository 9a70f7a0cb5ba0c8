"""Norms: RMS, layer, deep and group norms of ``npu::``, computed in float32, rounded once.

Limits: the op-plugin pages of the operators (docs/zh/custom_APIs/torch_npu).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import FLOATS, Table, require, require_dtype

_PAIRS = {
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
}
_PAIRS_310P = {(torch.float16, torch.float16), (torch.float32, torch.float32)}


def _check_gamma(operator: str, x: Tensor, gamma: Tensor, mixed: bool) -> None:
    require_dtype(operator, "input", x, FLOATS)
    require_dtype(operator, "gamma", gamma, FLOATS)
    require(1 <= gamma.dim() <= x.dim(), operator, f"gamma is {gamma.dim()}-D, input {x.dim()}-D")
    require(
        tuple(x.shape[x.dim() - gamma.dim() :]) == tuple(gamma.shape),
        operator,
        f"gamma {tuple(gamma.shape)} must be the last dimensions of input {tuple(x.shape)}",
    )
    pairs = _PAIRS_310P if soc.is_310p() else _PAIRS
    allowed = (x.dtype, gamma.dtype) in pairs and (mixed or x.dtype == gamma.dtype)
    require(allowed, operator, f"input {x.dtype} with gamma {gamma.dtype} is not supported")
    if soc.is_310p():
        require(
            x.shape[-1] * x.element_size() >= 32, operator, "the last dimension must be >= 32 bytes"
        )


def _rms(x: Tensor, gamma: Tensor, epsilon: float, one: float = 0.0) -> tuple[Tensor, Tensor]:
    """The norm in float32, and 1 / rms with the normalised dimensions kept as 1."""
    wide = x.float()
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    rstd = (wide.square().mean(axes, keepdim=True) + epsilon).rsqrt()
    return wide * rstd * (gamma.float() + one), rstd


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma, and 1 / rms in float32.

    2 to 8 dimensions; dtypes (x, gamma) equal, or half with float32 (A2, A3); gamma is required (by
    the schema).
    """
    operator = "npu_rms_norm"
    require(2 <= input.dim() <= 8, operator, f"input must have 2..8 dimensions: {input.dim()}")
    _check_gamma(operator, input, gamma, mixed=True)
    y, rstd = _rms(input, gamma, epsilon)
    return y.to(input.dtype), rstd


def npu_gemma_rms_norm(
    input: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As npu_rms_norm, with 1 + gamma; dtypes equal."""
    operator = "npu_gemma_rms_norm"
    require(2 <= input.dim() <= 8, operator, f"input must have 2..8 dimensions: {input.dim()}")
    _check_gamma(operator, input, gamma, mixed=False)
    y, rstd = _rms(input, gamma, epsilon, one=1.0)
    return y.to(input.dtype), rstd


def _add(operator: str, x1: Tensor, x2: Tensor) -> Tensor:
    require(
        x1.shape == x2.shape and x1.dtype == x2.dtype,
        operator,
        f"x1 {x1.dtype} {tuple(x1.shape)} and x2 {x2.dtype} {tuple(x2.shape)} must agree",
    )
    return x1.float() + x2.float()


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(rms_norm(x1 + x2) * gamma, 1 / rms, x1 + x2); gamma has x's dtype."""
    operator = "npu_add_rms_norm"
    added = _add(operator, x1, x2)
    _check_gamma(operator, x1, gamma, mixed=False)
    y, rstd = _rms(added, gamma, epsilon)
    return y.to(x1.dtype), rstd, added.to(x1.dtype)


def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As npu_add_rms_norm, with y in float32 before y in x's dtype; half inputs only."""
    operator = "npu_add_rms_norm_cast"
    soc.refuse_310p(operator)
    require_dtype(operator, "x1", x1, (torch.float16, torch.bfloat16))
    added = _add(operator, x1, x2)
    _check_gamma(operator, x1, gamma, mixed=False)
    y, rstd = _rms(added, gamma, epsilon)
    rounded = y.to(x1.dtype)
    return rounded.float(), rounded, rstd, added.to(x1.dtype)


def _layer(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    return centred * rstd, mean, rstd


def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm for inference; deprecated in favour of F.layer_norm."""
    operator = "npu_layer_norm_eval"
    require_dtype(operator, "input", input, FLOATS)
    shape = tuple(normalized_shape)
    require(
        tuple(input.shape[-len(shape) :]) == shape,
        operator,
        f"normalized_shape {shape} must be the last dimensions of {tuple(input.shape)}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor is None or tuple(tensor.shape) == shape, operator, f"{name} must be {shape}")
    y, _, _ = _layer(input.float(), list(range(input.dim() - len(shape), input.dim())), eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(input.dtype)


def npu_add_layer_norm(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float = 1e-5,
    additional_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(LayerNorm(x1 + x2) * gamma + beta, mean, rstd, x1 + x2), the last NaN unless asked for."""
    operator = "npu_add_layer_norm"
    soc.refuse_310p(operator)
    require_dtype(operator, "x1", x1, FLOATS)
    added = _add(operator, x1, x2)
    width = (x1.shape[-1],)
    require(
        tuple(gamma.shape) == width and tuple(beta.shape) == width,
        operator,
        f"gamma and beta must have shape {width}",
    )
    y, mean, rstd = _layer(added, [x1.dim() - 1], epsilon)
    y = y * gamma.float() + beta.float()
    total = added if additional_output else torch.full_like(added, torch.nan)
    return y.to(x1.dtype), mean, rstd, total.to(x1.dtype)


def npu_deep_norm(
    x: Tensor,
    gx: Tensor,
    beta: Tensor,
    gamma: Tensor,
    alpha: float = 0.3,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, LayerNorm(alpha * x + gx) * gamma + beta)."""
    operator = "npu_deep_norm"
    soc.refuse_310p(operator)
    require_dtype(operator, "x", x, FLOATS)
    require(
        x.shape == gx.shape and x.dtype == gx.dtype == beta.dtype == gamma.dtype,
        operator,
        "x, gx, beta and gamma must have one dtype, x and gx one shape",
    )
    require(
        gamma.shape == beta.shape and tuple(x.shape[x.dim() - gamma.dim() :]) == tuple(gamma.shape),
        operator,
        "gamma and beta must be the last dimensions of x",
    )
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    y, mean, rstd = _layer(alpha * x.float() + gx.float(), axes, epsilon)
    return mean, rstd, (y * gamma.float() + beta.float()).to(x.dtype)


def _group(
    operator: str, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype(operator, "input", x, FLOATS)
    require(2 <= x.dim() <= 8, operator, f"input must have 2..8 dimensions, got {x.dim()}")
    batch, channels = x.shape[:2]
    require(
        groups > 0 and channels % groups == 0,
        operator,
        f"{channels} channels are no multiple of {groups} groups",
    )
    wide = x.float().reshape(batch, groups, -1)
    y, mean, rstd = _layer(wide, [2], eps)
    y = y.reshape(x.shape)
    shape = (1, channels) + (1,) * (x.dim() - 2)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require(tuple(tensor.shape) == (channels,), operator, f"{name} must be ({channels},)")
    if weight is not None:
        y = y * weight.float().reshape(shape)
    if bias is not None:
        y = y + bias.float().reshape(shape)
    return y, mean.reshape(batch, groups), rstd.reshape(batch, groups)


def npu_group_norm_silu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(GroupNorm(x)), mean [B, G], rstd [B, G])."""
    y, mean, rstd = _group("npu_group_norm_silu", input, group, weight, bias, eps)
    dtype = input.dtype
    return torch.nn.functional.silu(y).to(dtype), mean.to(dtype), rstd.to(dtype)


def npu_group_norm_swish(
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float | None = 1e-5,
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y * sigmoid(swish_scale * y) of y = GroupNorm(x), mean [B, G], rstd [B, G])."""
    operator = "npu_group_norm_swish"
    y, mean, rstd = _group(operator, input, num_groups, weight, bias, 1e-5 if eps is None else eps)
    scale = 1.0 if swish_scale is None else swish_scale
    dtype = input.dtype
    return (y * torch.sigmoid(scale * y)).to(dtype), mean.to(dtype), rstd.to(dtype)


def npu_rms_norm_backward(
    dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`npu_rms_norm` for x and gamma."""
    axes = list(range(input.dim() - gamma.dim(), input.dim()))
    g, x = dy.float(), input.float()
    normal = x * rstd
    weighted = g * gamma.float()
    dx = rstd * (weighted - normal * (weighted * normal).mean(axes, keepdim=True))
    lead = list(range(input.dim() - gamma.dim()))
    dgamma = (g * normal).sum(lead) if lead else g * normal
    return dx.to(input.dtype), dgamma.float()


TABLE: Table = {
    "npu_rms_norm": npu_rms_norm,
    "npu_rms_norm_backward": npu_rms_norm_backward,
    "npu_gemma_rms_norm": npu_gemma_rms_norm,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_add_rms_norm_cast": npu_add_rms_norm_cast,
    "npu_layer_norm_eval": npu_layer_norm_eval,
    "npu_add_layer_norm": npu_add_layer_norm,
    "npu_deep_norm": npu_deep_norm,
    "npu_group_norm_silu": npu_group_norm_silu,
    "npu_group_norm_swish": npu_group_norm_swish,
}
