"""torch_npu's kernels, each only inside its documented limits; what none takes is composed of ATen.

The functions of :class:`mindiesd.ops.backends.Backend`, and :func:`explain`, which tells what
:func:`attention` would do and why. See ``docs/npu_backend.md`` for the tables.
"""

from mindiesd.ops.backends.native import attention_composed
from mindiesd.ops.backends.npu.activation import geglu, gelu, swiglu
from mindiesd.ops.backends.npu.dense import Plan, attention, explain
from mindiesd.ops.backends.npu.norms import (
    centred_rms_norm,
    group_norm_silu,
    group_norm_silu_refusal,
    layer_norm,
    layer_norm_scale_shift,
    rms_norm,
)
from mindiesd.ops.backends.npu.rope import rotate
from mindiesd.ops.backends.npu.varlen import attention_varlen, host_list

__all__ = [
    "Plan",
    "attention",
    "attention_composed",
    "attention_varlen",
    "centred_rms_norm",
    "explain",
    "geglu",
    "gelu",
    "group_norm_silu",
    "group_norm_silu_refusal",
    "host_list",
    "layer_norm",
    "layer_norm_scale_shift",
    "rms_norm",
    "rotate",
    "swiglu",
]
