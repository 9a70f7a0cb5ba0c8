"""RMS normalisation: ``torch.nn.functional.rms_norm`` and diffusers' ``RMSNorm``.

``torch.nn.RMSNorm.forward`` looks ``rms_norm`` up on ``torch.nn.functional`` at call time, so the
functional target reaches it as well. The classes that libraries wrote themselves are in
:mod:`mindiesd.patches.rms_classes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law, rms_classes
from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = (
    Patch(
        name="torch_rms_norm",
        family="rms_norm",
        module="torch.nn.functional",
        attribute="rms_norm",
        after="torch",
        becomes="mindiesd.RMSNorm",
        build="mindiesd.patches.rms_norm:build_functional",
        why="one npu_rms_norm kernel instead of six (pow, mean, add, rsqrt, mul, mul)",
        when="normalises over the last dimension, input and weight of one half or float32 dtype",
        numerics="bitwise equal on CPU and CUDA",
        requires={"torch": ">=2.5"},
        parameters=("input", "normalized_shape", "weight", "eps"),
    ),
    Patch(
        name="diffusers_rms_norm",
        family="rms_norm",
        module="diffusers.models.normalization",
        attribute="RMSNorm.forward",
        after="diffusers.models.normalization",
        becomes="mindiesd.RMSNorm",
        build="mindiesd.patches.rms_norm:build_diffusers",
        why=(
            "one kernel on every device; the NPU branch of diffusers is chosen by what is "
            "installed, not by where the tensor is, and rounds float32 input before normalising"
        ),
        when="weight and bias, where there are any, are vectors over the last dimension",
        numerics="float32 inside, rounded once where the original rounds twice",
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=("self", "hidden_states"),
    ),
    *rms_classes.RECORDS,
)
LEFT = rms_classes.LEFT


def build_functional(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``F.rms_norm``."""
    import torch
    from torch import Tensor
    from torch.overrides import handle_torch_function, has_torch_function_variadic

    from mindiesd.ops import norm

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)
    default_eps = torch.finfo(torch.float32).eps

    def refusal(input: Any, normalized_shape: Any, weight: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(input, Tensor):
            return law.NOT_A_TENSOR
        dtype = input.dtype
        if dtype not in half_or_single:
            return law.DTYPE
        size = input.shape
        if len(normalized_shape) != 1 or not size or size[-1] != normalized_shape[0]:
            return law.NOT_LAST_DIM
        if weight is not None:
            if weight.dtype is not dtype:
                return law.MIXED_DTYPES
            if weight.dim() != 1 or weight.numel() != size[-1]:
                return law.WEIGHT_SHAPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            input.requires_grad or (weight is not None and weight.requires_grad)
        ):
            return law.GRADIENTS
        return None

    def rms_norm(
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        if has_torch_function_variadic(input, weight):
            result: Tensor = handle_torch_function(
                site.installed, (input, weight), input, normalized_shape, weight=weight, eps=eps
            )
            return result
        if site.everywhere or site.in_force():
            reason = refusal(input, normalized_shape, weight)
            if site.takes(reason):
                return norm.rms_norm(input, weight, default_eps if eps is None else eps)
        kept: Tensor = original(input, normalized_shape, weight, eps)
        return kept

    return rms_norm


def build_diffusers(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of diffusers' ``RMSNorm.forward``."""
    import torch
    from torch import Tensor

    from mindiesd.ops import norm

    grad_enabled, jit_tracing, autocast = law.context()
    half = (torch.bfloat16, torch.float16)
    half_or_single = (torch.float32, *half)

    def refusal(hidden_states: Any, weight: Any, bias: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(hidden_states, Tensor):
            return law.NOT_A_TENSOR
        if hidden_states.dtype not in half_or_single:
            return law.DTYPE
        if weight is not None:
            dtype = weight.dtype
            if dtype not in half_or_single or (bias is not None and bias.dtype is not dtype):
                return law.MIXED_DTYPES
            # A bias always has the weight's shape.
            if weight.dim() != 1 or weight.numel() != hidden_states.size(-1):
                return law.WEIGHT_SHAPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            hidden_states.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return law.GRADIENTS
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            weight, bias = self.weight, self.bias
            reason = refusal(hidden_states, weight, bias)
            if site.takes(reason):
                # The original's result dtype: half weights make it theirs, float32 weights
                # promote, no weights leave the input's.
                dtype = hidden_states.dtype
                wanted = dtype if weight is None else weight.dtype
                if dtype is wanted and bias is None:
                    # With a weight the original gives the NPU's kernel any strides, too.
                    return norm.rms_norm(hidden_states, weight, self.eps, weight is not None)
                result = norm.rms_norm(hidden_states.float(), weight, self.eps, weight is not None)
                if bias is not None:
                    result = result + bias
                return result.to(wanted)
        kept: Tensor = original(self, hidden_states)
        return kept

    return forward
