"""Activations of ``npu::``, computed in float32, rounded once.

Limits: the op-plugin pages of the operators (docs/zh/custom_APIs/torch_npu).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import FLOATS, Table, require, require_dtype


def _check_approximate(operator: str, approximate: str) -> None:
    require(
        approximate in ("none", "tanh"),
        operator,
        f"approximate must be none or tanh: {approximate!r}",
    )


def _fast(operator: str, x: Tensor) -> Tensor:
    require_dtype(operator, "input", x, FLOATS)
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def npu_fast_gelu(input: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return _fast("npu_fast_gelu", input)


def fast_gelu(input: Tensor) -> Tensor:
    """As :func:`npu_fast_gelu`."""
    return _fast("fast_gelu", input)


def npu_fast_gelu_backward(grad: Tensor, input: Tensor) -> Tensor:
    """Gradient of :func:`npu_fast_gelu`."""
    x = input.float()
    gate = torch.sigmoid(1.702 * x)
    return (grad.float() * (gate + x * 1.702 * gate * (1 - gate))).to(input.dtype)


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU that honours ``approximate`` (aclnnGeluV2), as F.gelu on the device does not."""
    operator = "npu_gelu"
    require_dtype(operator, "input", input, FLOATS)
    _check_approximate(operator, approximate)
    return F.gelu(input.float(), approximate=approximate).to(input.dtype)


def npu_gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(first half) * second half of the last dimension, which is even and at most 1024."""
    operator = "npu_gelu_mul"
    soc.refuse_310p(operator)
    require_dtype(operator, "input", input, FLOATS)
    _check_approximate(operator, approximate)
    width = input.shape[-1]
    require(
        width % 2 == 0 and width <= 1024,
        operator,
        f"the last dimension must be even and at most 1024, got {width}",
    )
    first, second = input.float().chunk(2, -1)
    return (F.gelu(first, approximate=approximate) * second).to(input.dtype)


def npu_geglu(
    input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    """(other half * gelu(one half), gelu(one half)); approximate 1 is tanh, 0 is erf.

    The right half is activated, unless ``activate_left``.
    """
    operator = "npu_geglu"
    soc.refuse_310p(operator)
    require_dtype(operator, "input", input, FLOATS)
    require(approximate in (0, 1), operator, f"approximate must be 0 or 1, got {approximate}")
    require(input.shape[dim] % 2 == 0, operator, f"dimension {dim} must be even")
    left, right = input.float().chunk(2, dim)
    if activate_left:
        left, right = right, left
    active = F.gelu(right, approximate="tanh" if approximate else "none")
    return (left * active).to(input.dtype), active.to(input.dtype)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half; the input must be contiguous."""
    operator = "npu_swiglu"
    soc.refuse_310p(operator)
    require_dtype(operator, "input", input, FLOATS)
    require(input.is_contiguous(), operator, "input must be contiguous")
    require(input.shape[dim] % 2 == 0, operator, f"dimension {dim} must be even")
    first, second = input.float().chunk(2, dim)
    return (F.silu(first) * second).to(input.dtype)


def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """Gradient of :func:`npu_swiglu`."""
    first, second = input.float().chunk(2, dim)
    gate = torch.sigmoid(first)
    g = grad_output.float()
    d_first = g * second * gate * (1 + first * (1 - gate))
    return torch.cat([d_first, g * first * gate], dim).to(input.dtype)


def npu_silu(input: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    require_dtype("npu_silu", "input", input, FLOATS)
    return F.silu(input.float()).to(input.dtype)


def npu_silu_(input: Tensor) -> Tensor:
    """:func:`npu_silu` in place."""
    input.copy_(npu_silu(input))
    return input


def npu_mish(input: Tensor) -> Tensor:
    """x * tanh(softplus(x))."""
    require_dtype("npu_mish", "input", input, FLOATS)
    return F.mish(input.float()).to(input.dtype)


def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    """Gradient of :func:`npu_gelu`."""
    computed: Tensor = torch.ops.aten.gelu_backward.default(
        grad_output.float(), input.float(), approximate=approximate
    )
    return computed.to(input.dtype)


def npu_silu_backward(grad_output: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Gradient of :func:`npu_silu` at ``x0``, whose result was ``x1``."""
    computed: Tensor = torch.ops.aten.silu_backward.default(grad_output.float(), x0.float())
    return computed.to(x0.dtype)


def npu_mish_backward(grad: Tensor, input: Tensor) -> Tensor:
    """Gradient of :func:`npu_mish`."""
    computed: Tensor = torch.ops.aten.mish_backward.default(grad.float(), input.float())
    return computed.to(input.dtype)


def npu_geglu_grad(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    """Gradient of :func:`npu_geglu`."""
    halves = input.float().chunk(2, dim)
    linear, active = halves if not activate_left else (halves[1], halves[0])
    form = "tanh" if approximate else "none"
    grad = grad_output.float()
    d_linear = grad * F.gelu(active, approximate=form)
    d_active: Tensor = torch.ops.aten.gelu_backward.default(grad * linear, active, approximate=form)
    parts = [d_active, d_linear] if activate_left else [d_linear, d_active]
    return torch.cat(parts, dim).to(input.dtype)


def npu_scaled_masked_softmax(
    x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False
) -> Tensor:
    """softmax(scale * x, masked where ``mask`` is true) over the last dimension, in x's dtype.

    x [B, N, H, W] with H and W in 32..4096, W a multiple of 32; mask bool, broadcastable to it;
    with ``fixed_triu_mask`` the upper triangle takes its place. Masked scores are -10000
    (op-plugin), so a row that is all masked is uniform.
    """
    operator = "npu_scaled_masked_softmax"
    soc.refuse_310p(operator)
    require_dtype(operator, "x", x, FLOATS)
    require_dtype(operator, "mask", mask, (torch.bool,))
    require(x.dim() == 4, operator, f"x must be 4-D, got {x.dim()}-D")
    height, width = x.shape[2:]
    require(
        32 <= height <= 4096 and 32 <= width <= 4096 and width % 32 == 0,
        operator,
        f"H and W must be 32..4096 and W a multiple of 32, got {height}, {width}",
    )
    if fixed_triu_mask:
        out = torch.ones(height, width, dtype=torch.bool).triu(1)
    else:
        fits = mask.dim() == 4 and all(
            have in (1, full) for have, full in zip(mask.shape, x.shape, strict=True)
        )
        require(fits, operator, f"mask {tuple(mask.shape)} does not go with x {tuple(x.shape)}")
        out = mask
    scores = (x.float() * scale).masked_fill(out, -10000.0)
    return scores.softmax(-1).to(x.dtype)


TABLE: Table = {
    "fast_gelu": fast_gelu,
    "npu_fast_gelu": npu_fast_gelu,
    "npu_fast_gelu_backward": npu_fast_gelu_backward,
    "npu_gelu": npu_gelu,
    "npu_gelu_mul": npu_gelu_mul,
    "npu_gelu_backward": npu_gelu_backward,
    "npu_geglu": npu_geglu,
    "npu_geglu_grad": npu_geglu_grad,
    "npu_swiglu": npu_swiglu,
    "npu_swiglu_backward": npu_swiglu_backward,
    "npu_silu": npu_silu,
    "npu_silu_": npu_silu_,
    "npu_silu_backward": npu_silu_backward,
    "npu_mish": npu_mish,
    "npu_mish_backward": npu_mish_backward,
    "npu_scaled_masked_softmax": npu_scaled_masked_softmax,
}
