"""Layer normalisation: ``torch.nn.LayerNorm`` and diffusers' ``FP32LayerNorm``.

diffusers' own ``LayerNorm`` *is* ``torch.nn.LayerNorm``, so the first record is process-wide: it
reaches text encoders and the user's own models too, and therefore takes only calls whose result is
the original's. ``FP32LayerNorm`` overrides ``forward`` and needs a record of its own.

Shapes are not compared: the operator at the end is the original's, and refuses what does not fit in
the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.registry import Left, Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = (
    Patch(
        name="torch_layer_norm",
        family="layer_norm",
        module="torch.nn.modules.normalization",
        attribute="LayerNorm.forward",
        after="torch",
        becomes="mindiesd.fast_layernorm",
        build="mindiesd.patches.layer_norm:build_torch",
        why="the fast layer-norm kernel where the vendor's operators are present",
        when="input and parameters of one half or float32 dtype, no gradients",
        numerics="bitwise equal on CPU and CUDA",
        requires={"torch": ">=2.5"},
        parameters=("self", "input"),
    ),
    Patch(
        name="fp32_layer_norm",
        family="layer_norm",
        module="diffusers.models.normalization",
        attribute="FP32LayerNorm.forward",
        after="diffusers.models.normalization",
        becomes="mindiesd.fast_layernorm",
        build="mindiesd.patches.layer_norm:build_fp32",
        why="one kernel that is float32 inside, instead of casts of input, weight and bias",
        when="half or float32 input and parameters, no gradients",
        numerics="float32 inside and one rounding, as the original",
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=("self", "inputs"),
    ),
)

_AROUND = "moves the channels to the end around a layer norm, which is redirected itself"
LEFT = (
    Left("diffusers.models.unets.unet_stable_cascade.SDCascadeLayerNorm", _AROUND),
    Left("diffusers.models.autoencoders.autoencoder_vidtok.VidTokLayerNorm", _AROUND),
)


def build_torch(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``torch.nn.LayerNorm.forward``."""
    import torch
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    from mindiesd.ops import norm

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(input: Any, weight: Any, bias: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(input, Tensor):
            return law.NOT_A_TENSOR
        dtype = input.dtype
        if dtype not in half_or_single:
            return law.DTYPE
        if (weight is not None and weight.dtype is not dtype) or (
            bias is not None and bias.dtype is not dtype
        ):
            return law.MIXED_DTYPES
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return law.GRADIENTS
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            weight, bias = self.weight, self.bias
            # A mode or subclass must see F.layer_norm, which the original calls.
            if not has_torch_function_variadic(input, weight, bias):
                reason = refusal(input, weight, bias)
                if site.takes(reason):
                    return norm.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        kept: Tensor = original(self, input)
        return kept

    return forward


def build_fp32(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of diffusers' ``FP32LayerNorm.forward``."""
    import torch
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    from mindiesd.ops import norm

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(inputs: Any, weight: Any, bias: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(inputs, Tensor):
            return law.NOT_A_TENSOR
        if inputs.dtype not in half_or_single:
            return law.DTYPE
        for parameter in (weight, bias):
            if parameter is not None and parameter.dtype not in half_or_single:
                return law.DTYPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            inputs.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return law.GRADIENTS
        return None

    def forward(self: Any, inputs: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            weight, bias = self.weight, self.bias
            if not has_torch_function_variadic(inputs, weight, bias):
                reason = refusal(inputs, weight, bias)
                if site.takes(reason):
                    return norm.layer_norm(inputs, self.normalized_shape, weight, bias, self.eps)
        kept: Tensor = original(self, inputs)
        return kept

    return forward
