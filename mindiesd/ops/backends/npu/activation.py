"""GELU and gated units on an Ascend NPU, where ATen's GELU is the tanh form whatever is asked for.

``npu_geglu`` activates the second half of the last dimension (erf with ``approximate=0``),
``npu_swiglu`` the first. Both are documented for A2; A3 has the same cores, and its users run
them. ``npu_swiglu`` wants dense memory: for a slice of a larger tensor it would be copied first,
which costs more than the kernel saves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindiesd.ops.backends import native
from mindiesd.ops.backends.npu import soc

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU in x's dtype: erf (``"none"``), ``"tanh"``, or ``"fast"``, x * sigmoid(1.702 x)."""
    series = soc.series()
    legal = x.dtype in _DTYPES and series != soc.UNKNOWN and x.numel()
    if series == soc.I310P and x.dtype is torch.bfloat16:
        legal = False
    if legal:
        if approximate == "fast":
            fast: Tensor = torch.ops.npu.npu_fast_gelu(x)
            return fast
        exact: Tensor = torch.ops.npu.npu_gelu(x, approximate=approximate)
        return exact
    if approximate == "none":
        full = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
        return (0.5 * full * (1.0 + torch.erf(full * math.sqrt(0.5)))).to(x.dtype)
    return native.gelu(x, approximate)


def _gated(x: Tensor) -> bool:
    """Whether the kernels of gated units take x."""
    return (
        soc.series() in (soc.A2, soc.A3)
        and x.dtype in _DTYPES
        and 1 <= x.dim() <= 8
        and x.numel() > 0
        and x.shape[-1] % 2 == 0
    )


def geglu(x: Tensor, approximate: str) -> Tensor:
    """First half of the last dimension * GELU of the second, in x's dtype."""
    if _gated(x):
        kind = 0 if approximate == "none" else 1
        out: Tensor = torch.ops.npu.npu_geglu(x, -1, kind)[0]
        return out
    left, right = x.chunk(2, -1)
    return left * gelu(right, approximate)


def swiglu(x: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension * the second, in x's dtype."""
    if x.is_contiguous() and _gated(x):
        out: Tensor = torch.ops.npu.npu_swiglu(x, -1)
        return out
    return native.swiglu(x)
