"""Rotary position embedding: diffusers' shared helper ``apply_rotary_emb``.

A dozen transformer modules import the helper by name, so its other holders are rebound as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

COMPLEX_TABLE = "complex frequency table"
TABLE_SHAPE = "table is not [S, D] of this input"
LAYOUT = "not a 4-D input with even head_dim, or an unknown sequence_dim or unbind dim"

RECORDS = (
    Patch(
        name="diffusers_rope",
        family="rope",
        module="diffusers.models.embeddings",
        attribute="apply_rotary_emb",
        after="diffusers.models.embeddings",
        becomes="mindiesd.rotary_position_embedding",
        build="mindiesd.patches.rope:build",
        why="one npu_rotary_mul kernel instead of reshape, unbind, stack, casts, mul, mul, add",
        when="4-D input, real cos and sin tables of shape [S, D], no gradients",
        numerics="float32 inside and one rounding, as the original",
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=("x", "freqs_cis", "use_real", "use_real_unbind_dim", "sequence_dim"),
    ),
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``diffusers.models.embeddings.apply_rotary_emb``."""
    import torch
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    from mindiesd.ops import rope

    grad_enabled, jit_tracing, _ = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(x: Any, tables: Any, use_real: Any, unbind: Any, sequence_dim: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not use_real:
            return COMPLEX_TABLE
        if not isinstance(x, Tensor) or type(tables) not in (tuple, list) or len(tables) != 2:
            return law.UNUSUAL_ARGUMENT
        cos, sin = tables
        if has_torch_function_variadic(x, cos, sin):
            return law.UNUSUAL_ARGUMENT
        size, table = x.shape, cos.shape
        if len(size) != 4 or size[3] % 2 or sequence_dim not in (1, 2) or unbind not in (-1, -2):
            return LAYOUT
        dtype = cos.dtype
        if x.dtype not in half_or_single or dtype not in half_or_single or sin.dtype is not dtype:
            return law.DTYPE
        if table != (size[sequence_dim], size[3]) or sin.shape != table:
            return TABLE_SHAPE
        if grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
            return law.GRADIENTS
        return None

    def apply_rotary_emb(
        x: Tensor,
        freqs_cis: Any,
        use_real: bool = True,
        use_real_unbind_dim: int = -1,
        sequence_dim: int = 2,
    ) -> Any:
        if site.everywhere or site.in_force():
            reason = refusal(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)
            if site.takes(reason):
                cos, sin = freqs_cis
                if not (x.is_cpu and cos.is_cpu and sin.is_cpu):
                    cos, sin = cos.to(x.device), sin.to(x.device)
                if sequence_dim == 1:
                    cos, sin = cos[:, None], sin[:, None]
                return rope.rotate(x, cos, sin, use_real_unbind_dim == -1)
        return original(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)

    return apply_rotary_emb
