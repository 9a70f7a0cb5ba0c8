"""Which operators the installed torch_npu has. Older ones lack some that the backend would choose.

``tests/emulator/schemas`` holds the schemas of several releases of torch_npu, and a test compares
every call of the backend with them: an operator that one of them lacks has to be named here, and
whoever calls it has to ask :func:`has` before.
"""

from __future__ import annotations

import torch

NEWER = (
    "npu_block_sparse_attention",
    "npu_fusion_attention_v2",
    "npu_fusion_attention_v3",
)
"""Operators that not every supported torch_npu has."""

_known: dict[str, bool] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _found(operator: str) -> bool:
    found = _known.get(operator)
    if found is None:
        found = _known[operator] = hasattr(torch.ops.npu, operator)
    return found


def has(operator: str) -> bool:
    """Whether ``torch.ops.npu`` has an operator. Asked once torch_npu is loaded.

    Args:
        operator: its name without overload.
    """
    answer: bool = _found(operator)
    return answer
