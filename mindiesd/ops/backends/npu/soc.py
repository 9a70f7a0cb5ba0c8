"""Which Ascend this process computes on: kernels and their limits differ between the series.

The numbers are those of torch_npu (NpuVariables.h): 310P 200-205, 910B (Atlas A2) 220-225, 910_93
(Atlas A3) 250-256, 950 from 260.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

A2, A3, I310P, A950 = "A2", "A3", "310P", "950"
# A series with no table here, or no device at all: no kernel is known to be right there.
UNKNOWN = ""

_found: str = UNKNOWN
_transforming: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def of_number(number: int) -> str:
    """The series of torch_npu's number of a SoC."""
    if 200 <= number < 220:
        return I310P
    if 220 <= number < 240:
        return A2
    if 250 <= number < 260:
        return A3
    return A950 if number >= 260 else UNKNOWN


def series() -> str:
    """The series of this process's devices; asked for once a device answers, never at import.

    Unknown inside of ``torch.vmap`` and other function transforms, for which the kernels have no
    rules.
    """
    if not torch.compiler.is_compiling() and _transforming() is not None:
        return UNKNOWN
    found: str = _detected()
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _detected() -> str:
    global _found
    if not _found:
        try:
            import torch_npu

            _found = of_number(int(torch_npu._C._npu_get_soc_version()))
        except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError):
            # No torch_npu, no CANN, or no device: each has its own way to say so.
            return UNKNOWN
    return _found
