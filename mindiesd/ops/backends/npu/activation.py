"""GELU on an Ascend NPU, where ATen's computes the tanh form whatever it is asked for."""

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
