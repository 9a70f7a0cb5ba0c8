"""Which Ascend the process pretends to have: limits differ between the series.

The SoC name comes from ``MINDIESD_EMULATOR_SOC`` (default Ascend910B1, an Atlas A2). The numbers
are torch_npu's (NpuVariables.h): 310P 200-205, 910B (A2) 220-225, 910_93 (A3) 250-256, 950 from
260.
"""

from __future__ import annotations

from functools import cache

from mindiesd.emulator.ops.check import refuse


@cache
def number() -> int:
    """torch_npu's number of the SoC."""
    import torch_npu

    found: int = torch_npu._C._npu_get_soc_version()
    return found


def is_310p() -> bool:
    """Whether this is an Atlas inference series (310P, Duo)."""
    return 200 <= number() < 220


def is_950() -> bool:
    """Whether this is a 950 (A5) or later."""
    return number() >= 260


def refuse_310p(operator: str) -> None:
    """Raise on the 310P, whose table has no such operator."""
    if is_310p():
        raise refuse(operator, "not supported on Ascend310P")
