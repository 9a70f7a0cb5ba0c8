"""Modulations and gates written out in the forward of a block: no function of their own to patch.

    norm(x) * (1 + scale) + shift        x + gate * y

The functions are rewritten from their own source, see :mod:`mindiesd.patches.rewriting`; this
module holds what is looked for, what it becomes, and where.

Left alone, because nothing is gained or it would not be as accurate: products without a shift
(``norm(x) * scale``), gates of a dtype that half-precision activations are promoted to, and gates
in only one branch of a condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches import law
from mindiesd.patches.rewriting.records import builder, records
from mindiesd.patches.rewriting.rules import Expression, Rewrite
from mindiesd.patches.scope import Site

HOOKED = "norm with hooks, or with a forward of its own"
DEVICES = "operands on several devices"
SHAPE = "scale or shift does not span the last dimension"

NORM_MODULATE = Expression(
    name="norm_modulate",
    spellings=(
        "NORM(X) * (1 + SCALE) + SHIFT",
        "NORM(X) * (SCALE + 1.0) + SHIFT",
        "(1 + SCALE) * NORM(X) + SHIFT",
        "(1.0 + SCALE) * NORM(X) + SHIFT",
    ),
    holes=("NORM", "X", "SCALE", "SHIFT"),
    calls=("X",),
    members=("NORM",),
    joins=("NORM(X)",),
    build="mindiesd.patches.modulation:build_norm_modulate",
)
MODULATE = Expression(
    name="modulate",
    spellings=("X * (1 + SCALE) + SHIFT", "(1 + SCALE) * X + SHIFT"),
    holes=("X", "SCALE", "SHIFT"),
    calls=("X",),
    build="mindiesd.patches.modulation:build_modulate",
)
GATE = Expression(
    name="gated_residual",
    spellings=("X + Y * GATE", "Y * GATE + X"),
    holes=("X", "Y", "GATE"),
    calls=("X", "Y", "GATE"),
    joins=("GATE * Y",),
    build="mindiesd.patches.modulation:build_gated_residual",
)

_T = "diffusers.models.transformers."


def _block(
    module: str, qualname: str, *, norms: int = 0, plain: int = 0, gates: int = 0
) -> Rewrite:
    """A function with so many modulated norms, other modulations, and gated residuals."""
    counts = {NORM_MODULATE: norms, MODULATE: plain, GATE: gates}
    return Rewrite(
        module=module if "." in module else _T + module,
        qualname=qualname,
        counts={kind: count for kind, count in counts.items() if count},
    )


RULES = (
    _block("transformer_flux", "FluxTransformerBlock.forward", norms=2, gates=4),
    _block("transformer_flux", "FluxSingleTransformerBlock.forward", gates=1),
    _block("transformer_wan", "WanTransformerBlock.forward", norms=2, gates=2),
)

RECORDS, _BY_NAME = records(
    RULES,
    family="modulation",
    suffix="modulation",
    becomes="mindiesd.layernorm_scale_shift, torch.addcmul",
    why="one or two kernels instead of four for a modulated norm, one instead of two for a gate",
    when="tensors of one half or float32 dtype, layer norms without hooks, no gradients",
    numerics="fewer roundings than the expressions have",
)
build = builder(_BY_NAME)


def build_norm_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x) * (1 + scale) + shift``."""
    import torch
    from diffusers.models.normalization import FP32LayerNorm
    from torch.nn import LayerNorm

    from mindiesd.ops import ada_norm

    kinds = (LayerNorm, FP32LayerNorm)
    hooked = _hook_finder()
    unlike = _unlike()

    def refusal(norm: Any, x: Any, scale: Any, shift: Any) -> str | None:
        reason = unlike(x, scale, shift)
        if reason is not None:
            return reason
        if hooked(norm):
            return HOOKED
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                reason = unlike(x, parameter, parameter)
                if reason is not None:
                    return reason
        if len(norm.normalized_shape) != 1:
            return law.NOT_LAST_DIM
        hidden = norm.normalized_shape[0]
        if x.dim() < 2 or x.shape[-1] != hidden:
            return law.NOT_LAST_DIM
        if not scale.dim() or not shift.dim():
            return SHAPE
        if scale.shape[-1] != hidden or shift.shape[-1] != hidden:
            return SHAPE
        return None

    def norm_modulate(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
        if type(norm) in kinds:
            reason = refusal(norm, x, scale, shift)
            if reason is None:
                site.takes(None)
                return ada_norm.layer_norm_scale_shift(
                    x, norm.weight, norm.bias, norm.eps, scale, shift
                )
            if reason is not HOOKED:
                site.takes(reason)
                return original(norm, x, scale, shift)
        # Called as ever; what follows may still be one kernel.
        normed = norm(x)
        if site.takes(unlike(normed, scale, shift)):
            return torch.addcmul(shift, normed, 1 + scale)

        def again(_: Any) -> Any:
            return normed

        return original(again, x, scale, shift)

    return norm_modulate


def build_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x * (1 + scale) + shift``."""
    import torch

    unlike = _unlike()

    def modulate(x: Any, scale: Any, shift: Any) -> Any:
        if site.takes(unlike(x, scale, shift)):
            return torch.addcmul(shift, x, 1 + scale)
        return original(x, scale, shift)

    return modulate


def build_gated_residual(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x + y * gate``."""
    import torch

    unlike = _unlike()

    def gated_residual(x: Any, y: Any, gate: Any) -> Any:
        reason = unlike(x, y, gate)
        if reason is law.MIXED_DTYPES and x.dtype is torch.float32:
            # A float32 stream: the product is float32 if one factor is, and the sum in any case.
            if y.dtype is torch.float32 or gate.dtype is torch.float32:
                y, gate = y.float(), gate.float()
                reason = unlike(x, y, gate)
        if site.takes(reason):
            return torch.addcmul(x, y, gate)
        return original(x, y, gate)

    return gated_residual


def _unlike() -> Callable[[Any, Any, Any], str | None]:
    """Why three operands may not go into one kernel; None if they may."""
    import torch
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def unlike(x: Any, y: Any, z: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and isinstance(z, Tensor)):
            return law.NOT_A_TENSOR
        if has_torch_function_variadic(x, y, z):
            return law.UNUSUAL_ARGUMENT
        dtype = x.dtype
        if dtype not in half_or_single:
            return law.DTYPE
        if y.dtype is not dtype or z.dtype is not dtype:
            return law.MIXED_DTYPES
        # A tensor without dimensions may be on another device.
        if x.device != y.device or x.device != z.device:
            return DEVICES
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (x.requires_grad or y.requires_grad or z.requires_grad):
            return law.GRADIENTS
        return None

    return unlike


def _hook_finder() -> Callable[[Any], bool]:
    """Whether calling a module does more than its class's forward."""
    from torch.nn.modules import module as torch_module

    from mindiesd.patches.pipeline import scoped_only

    def hooked(module: Any) -> bool:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return True
        return not scoped_only(module)

    return hooked
