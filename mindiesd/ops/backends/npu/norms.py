"""RMS norm and layer norms on an Ascend NPU.

``npu_rms_norm`` limits: 2 to 8 dimensions; (x, gamma) of one dtype out of float16, bfloat16 and
float32, or half with float32 (not on the 310P, which also has no bfloat16 and needs 32 bytes in the
last dimension). It computes in float32 and rounds once. ATen's RMS norm has no kernel there and
decomposes.

``npu_group_norm_silu`` limits: more than one dimension; x, gamma and beta of float16, float32 or,
but for the 310P, bfloat16, gamma and beta alike and no narrower than x; an epsilon above 0. It
computes in float32 and rounds once, where a group norm and a SiLU round twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.ops.backends import native
from mindiesd.ops.backends.npu import soc, vendor
from mindiesd.ops.backends.npu.call import frozen, turned
from mindiesd.ops.backends.npu.derived import constant

_HALF = (torch.float16, torch.bfloat16)


def _ones(x: Tensor) -> Tensor:
    """The gamma of a norm without a weight."""
    size, dtype, device = x.shape[-1], x.dtype, x.device

    def build() -> Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    return constant(frozen(x), ("ones", size, dtype, device), build)


def rms_norm_refusal(x: Tensor, series: str) -> str | None:
    """Why ``npu_rms_norm`` is not for this input; None if it is."""
    if series == soc.UNKNOWN:
        return "no table for this series of Ascend"
    if x.dtype not in (*_HALF, torch.float32):
        return "dtype is not float16, bfloat16 or float32"
    if not 1 <= x.dim() <= 8 or x.numel() == 0:
        return "not 1 to 8 dimensions, or empty"
    if series == soc.I310P:
        if x.dtype is torch.bfloat16:
            return "bfloat16 on the 310P"
        if x.shape[-1] * x.element_size() < 32:
            return "last dimension below 32 bytes on the 310P"
    return None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, as_is: bool = False) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, rounded once, in x's dtype.

    The kernel gets contiguous tensors. So is the result, but for the queries and keys of an
    attention: transposed views stay that, so that attention gets all three in one order.

    Args:
        x: [..., H], any floating dtype.
        weight: [H], any floating dtype, or None for ones.
        eps: added to the mean square.
        as_is: whether what is replaced hands x to this kernel with any strides: then so do we,
            where otherwise a copy would be a launch more.
    """
    series = soc.series()
    if rms_norm_refusal(x, series) is not None or (
        weight is not None and weight.dtype is torch.float64
    ):
        wide = torch.float64 if torch.float64 in (x.dtype, getattr(weight, "dtype", None)) else None
        # ATen decomposes the norm on this device, and would round half precision on the way.
        full = x.to(wide or torch.float32)
        gain = None if weight is None else weight.to(full.dtype)
        return torch.rms_norm(full, (x.shape[-1],), gain, eps).to(x.dtype)
    if not x.is_contiguous():
        # Heads before tokens in [B, S, N, D] memory, or in a part of one projection's.
        turn = x.dim() == 4 and x.stride(3) == 1 and x.stride(1) < x.stride(2)
        if turn and (not as_is or turned(x)):
            return rms_norm(x.transpose(1, 2).contiguous(), weight, eps).transpose(1, 2)
        if not as_is:
            x = x.contiguous()
    given = x[None] if x.dim() == 1 else x
    gamma = _ones(x) if weight is None else weight
    if gamma.dtype is not x.dtype and gamma.dtype is not torch.float32:
        gamma = gamma.float()
    if gamma.dtype is not x.dtype and (series == soc.I310P or x.dtype not in _HALF):
        given = given.float()
    out: Tensor = torch.ops.npu.npu_rms_norm(given, gamma.contiguous(), eps)[0]
    if out.dtype is not x.dtype:
        out = out.to(x.dtype)
    return out[0] if x.dim() == 1 else out


def centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * (1 + weight)`` over the last dimension, rounded once.

    ``npu_gemma_rms_norm`` adds the 1 itself, in one kernel (A2 and A3; x dense, of the weight's
    dtype). It is used in float32 only: nothing says in what precision it adds 1 to a half-precision
    weight. There, ``1 + weight`` is a float32 vector for :func:`rms_norm`, made again for each
    call: a change of the weight through ``weight.data`` moves neither its version nor its address,
    so nobody could tell when a vector that was kept is out of date.

    Args:
        x: [..., H], any floating dtype.
        weight: [H], any floating dtype.
        eps: added to the mean square.
    """
    series = soc.series()
    if rms_norm_refusal(x, series) is not None or weight.dtype is torch.float64:
        return native.centred_rms_norm(x, weight, eps)
    if weight.dtype is torch.float32:
        if x.dim() == 4 and not x.is_contiguous() and turned(x):
            return centred_rms_norm(x.transpose(1, 2), weight, eps).transpose(1, 2)
        if (
            x.dtype is torch.float32
            and series in (soc.A2, soc.A3)
            and x.dim() >= 2
            and x.is_contiguous()
        ):
            out: Tensor = torch.ops.npu.npu_gemma_rms_norm(x, weight, eps)[0]
            return out
        return rms_norm(x, weight + 1, eps)
    device = weight.device

    def build() -> Tensor:
        return torch.ones(1, dtype=torch.float32, device=device)

    # A tensor of one element decides the dtype of the sum, as a number would not: one kernel.
    one = constant(frozen(weight), ("one", device), build)
    return rms_norm(x, torch.add(weight, one), eps)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, rounded once, in x's dtype.

    The vendor's kernel, where its library is loaded and every tensor has one dtype; else ATen's,
    which has one of the device.

    Args:
        x: [..., *normalized_shape], any floating dtype.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: of ``normalized_shape``, any floating dtype, or None for ones.
        bias: of ``normalized_shape``, any floating dtype, or None for zeros.
        eps: added to the variance.
    """
    if (
        x.dtype in (*_HALF, torch.float32)
        and weight is not None
        and weight.dtype is x.dtype
        and bias is not None
        and bias.dtype is x.dtype
        and x.numel()
        and not frozen(x)
        # The library's kernel has no gradient.
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or bias.requires_grad)
        )
    ):
        kernel = vendor.operator("layernorm")
        if kernel is not None:
            # Mode 0: high precision.
            out: Tensor = kernel(x, list(normalized_shape), weight, bias, eps, 0)[0]
            return out
    return native.layer_norm(x, normalized_shape, weight, bias, eps)


def layer_norm_scale_shift(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    fast: bool = False,
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` over the last dimension, in x's dtype.

    With LN the norm without parameters, w its weight and b its bias::

        (LN(x) * w + b) * (1 + s) + t  =  LN(x) * w(1 + s)  +  (b(1 + s) + t)

    so wherever s and t are the same for every token, which is B == 1 with [1, 1, H], one layer norm
    with other parameters computes everything. In real numbers that always holds. In floating point
    it holds to float32's rounding as long as w(1 + s) and b(1 + s) + t are float32, and so is the
    norm: no documentation says that its kernel takes half x with float32 parameters. Half x is
    therefore widened, and the result rounded once: nothing that rounds on the way is closer to the
    exact result at any element.

    ``fast`` keeps half precision where every tensor has x's dtype and there is no bias b: the
    parameters are then rounded to it. By root mean square that is as accurate as the composition of
    half-precision kernels, which rounds the norm, 1 + s, the product and the sum, and at single
    elements up to 2.5 times further off, in a third of the memory traffic.

    Args:
        x: [B, S, H].
        weight: [H] or None.
        bias: [H] or None.
        eps: added to the variance.
        scale: [B, 1, H] or [B, S, H].
        shift: [B, 1, H] or [B, S, H].
        fast: whether half precision may be rounded on the way.
    """
    dtype, hidden = x.dtype, x.shape[-1]
    same = scale.dtype is dtype and shift.dtype is dtype
    same = same and (weight is None or weight.dtype is dtype)
    if not fast or dtype not in _HALF or not same or bias is not None:
        return native.layer_norm_scale_shift(x, weight, bias, eps, scale, shift)
    if scale.shape[:-1] == (1, 1) and shift.shape[:-1] == (1, 1):
        gain = (
            scale + 1
            if weight is None
            else torch.addcmul(weight.float(), weight.float(), scale.float()).to(dtype)
        )
        return native.layer_norm(x, (hidden,), gain.view(hidden), shift.reshape(hidden), eps)
    normed = native.layer_norm(x, (hidden,), weight, None, eps)
    return torch.addcmul(shift, normed, scale + 1)


def group_norm_silu_refusal(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> str | None:
    """Why ``npu_group_norm_silu`` is not for these arguments; None if it is.

    Args:
        x: [B, C, ...].
        weight: [C]; the kernel's documentation requires it.
        bias: [C], as the weight.
        groups: of channels.
        eps: added to the variance.
    """
    series = soc.series()
    if series not in (soc.A2, soc.A3, soc.I310P):
        return "no table of group norms for this series of Ascend"
    dtype = x.dtype
    if dtype not in (*_HALF, torch.float32) or (series == soc.I310P and dtype is torch.bfloat16):
        return "dtype that the group norm kernel does not take"
    if weight is None or bias is None:
        return "group norm without parameters"
    if weight.dtype is not dtype or bias.dtype is not dtype:
        return "group norm with parameters of another dtype"
    # One number in each group is an error of torch's.
    if not 2 <= x.dim() <= 8 or x.numel() <= groups * x.shape[0] or eps <= 0:
        return "not 2 to 8 dimensions, one number in a group, or no epsilon"
    if x.shape[1] % groups or weight.shape != (x.shape[1],) or bias.shape != weight.shape:
        return "channels that do not match the parameters or the groups"
    return None


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """``silu(group_norm(x))`` in one kernel, rounded once; see :func:`group_norm_silu_refusal`.

    Args:
        x: [B, C, ...].
        weight: [C], of x's dtype.
        bias: [C], of x's dtype.
        groups: of channels.
        eps: added to the variance.
    """
    # What is in another order is made dense by a launch of its own, not by the kernel's library.
    out: Tensor = torch.ops.npu.npu_group_norm_silu(x.contiguous(), weight, bias, groups, eps)[0]
    return out
