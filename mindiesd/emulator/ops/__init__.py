"""Reference implementations of the ``npu::`` operators, with the limits of the device.

Each function takes and gives CPU tensors and has the operator's own argument names; it computes in
float32 and rounds once to the dtype of its result. What the device's documentation rules out raises
a RuntimeError; what the device can do and the emulator cannot raises a NotImplementedError.
"""

from __future__ import annotations

from mindiesd.emulator.ops import (
    activation,
    block_sparse,
    cast,
    fusion_attention,
    fusion_attention_grad,
    infer_attention,
    norm,
    prompt_attention,
    rotary,
)
from mindiesd.emulator.ops.check import Table

# Operator and overload -> its function.
TABLE: Table = {
    **activation.TABLE,
    **block_sparse.TABLE,
    **cast.TABLE,
    **fusion_attention.TABLE,
    **fusion_attention_grad.TABLE,
    **infer_attention.TABLE,
    **norm.TABLE,
    **prompt_attention.TABLE,
    **rotary.TABLE,
}

# Left to torch_npu: they allocate memory or describe it.
KEPT = frozenset(
    {
        "empty_with_format",
        "empty_with_swapped_memory",
        "get_npu_format",
        "get_storage_size",
        "set_op_timeout_ms",
        "unsafe_empty_with_format",
    }
)
