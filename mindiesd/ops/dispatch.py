"""Which kernel a call asked for: ``opt_mode``, ``op_type`` and ``layout``, one table for all.

``runtime`` and ``static`` leave the choice to the backend, which makes it from the device, the
dtype and the kind of mask alone: the same call always takes the same kernel. Timing candidates at
run time would make results depend on the load of the machine, synchronise the device, and break
graph capture. ``manual`` names the kernel; a backend without kernels of that name computes the same
result with its own.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from mindiesd.errors import ParametersInvalid
from mindiesd.ops.checks import choice

MODES = ("runtime", "static", "manual")
OPERATORS = ("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")
LAYOUTS = ("BNSD", "BSND", "BSH")

# Overrides op_type, in manual mode only.
OPERATOR_VARIABLE = "MINDIE_SD_FA_TYPE"
_ENCODED = os.environ.encodekey(OPERATOR_VARIABLE)


class Kernel(NamedTuple):
    """The kernel that a manual call asks for.

    Attributes:
        operator: one of :data:`OPERATORS`.
        layout: one of :data:`LAYOUTS`, the layout handed to the kernel, not the caller's.
    """

    operator: str
    layout: str


KERNELS = {(name, layout): Kernel(name, layout) for name in OPERATORS for layout in LAYOUTS}


def requested(
    opt_mode: str = "runtime", op_type: str = "fused_attn_score", layout: str = "BNSD"
) -> Kernel | None:
    """The kernel a call names, or None where the backend is to choose.

    Args:
        opt_mode: ``"runtime"``, ``"static"`` or ``"manual"``.
        op_type: one of :data:`OPERATORS`; effective in manual mode, where the environment variable
            ``MINDIE_SD_FA_TYPE`` overrides it.
        layout: one of :data:`LAYOUTS`; effective in manual mode.

    Raises:
        ParametersInvalid: a value is not in its table, effective or not.
    """
    try:
        kernel = KERNELS[op_type, layout]
    except (KeyError, TypeError):
        # Not in the table, or unhashable: one of the two is wrong.
        choice("op_type", op_type, OPERATORS)
        choice("layout", layout, LAYOUTS)
        raise
    if opt_mode != "manual":
        if opt_mode != "runtime" and opt_mode != "static":
            choice("opt_mode", opt_mode, MODES)
        return None
    # Looking up an unset variable raises and catches inside os.environ, for a microsecond; the
    # dictionary behind it answers at once.
    data = getattr(os.environ, "_data", None)
    if data is not None and _ENCODED not in data:
        return kernel
    override = os.environ.get(OPERATOR_VARIABLE)
    if override is None:
        return kernel
    if override not in OPERATORS:
        raise ParametersInvalid(
            f"environment variable {OPERATOR_VARIABLE}", override, ", ".join(OPERATORS)
        )
    return KERNELS[override, layout]
