"""Dtype and format casts of ``npu::``.

The emulated memory knows the base formats only, as torch_npu does unless
``torch.npu.config.allow_internal_format`` is set ("tensor will be created with base format"): a
format cast, such as torch_npu's ``Module.to`` makes of convolution weights, gives the same values
in the same order. ``get_npu_format`` goes on naming the base format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.emulator.ops.check import Table, not_emulated, require_absent

# ACL_FORMAT_NCHW, ND, NCDHW: the formats that memory has here.
_BASE = (0, 2, 30)

# torch's numbers of its dtypes (c10/core/ScalarType.h), as the operators pass them.
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    8: torch.complex32,
    9: torch.complex64,
    10: torch.complex128,
    11: torch.bool,
    15: torch.bfloat16,
}


def _dtype(operator: str, given: torch.dtype | int) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    if given not in _DTYPES:
        raise not_emulated(operator, f"dtype number {given}")
    return _DTYPES[given]


def npu_dtype_cast(
    input: Tensor, dtype: torch.dtype | int, input_dtype: int | None = None
) -> Tensor:
    """``input`` as ``dtype``."""
    require_absent("npu_dtype_cast", input_dtype=input_dtype)
    return input.to(_dtype("npu_dtype_cast", dtype), copy=True)


def npu_dtype_cast_(input: Tensor, src: Tensor) -> Tensor:
    """Write ``src`` into ``input``, converting."""
    return input.copy_(src)


def npu_dtype_cast_backward(
    grad: Tensor,
    dtype: torch.dtype | int,
    grad_dtype: int | None = None,
    input_dtype: int | None = None,
) -> Tensor:
    """The gradient as ``dtype``."""
    return grad.to(_dtype("npu_dtype_cast_backward", dtype), copy=True)


def npu_format_cast(input: Tensor, acl_format: int, **others: object) -> Tensor:
    """``input`` itself for a base format, else a new tensor with the same values."""
    require_absent("npu_format_cast", **others)
    return input if acl_format in _BASE else input.clone()


def npu_format_cast_like(input: Tensor, dst: Tensor, **others: object) -> Tensor:
    """``input`` in the format of ``dst``, which is a base one."""
    require_absent("npu_format_cast", **others)
    return input.clone()


def npu_format_cast_(input: Tensor, src: Tensor, **others: object) -> Tensor:
    """Write ``src`` into ``input``."""
    require_absent("npu_format_cast_", **others)
    return input.copy_(src)


def npu_format_cast_in_place(input: Tensor, acl_format: int, **others: object) -> Tensor:
    """Change the memory format of ``input``, whose values stay."""
    require_absent("npu_format_cast_", **others)
    return input


TABLE: Table = {
    "npu_dtype_cast": npu_dtype_cast,
    "_npu_dtype_cast": npu_dtype_cast,
    "npu_dtype_cast_": npu_dtype_cast_,
    "npu_dtype_cast_backward": npu_dtype_cast_backward,
    "_npu_dtype_cast_backward": npu_dtype_cast_backward,
    "npu_format_cast": npu_format_cast,
    "npu_format_cast.Tensor": npu_format_cast_like,
    "npu_format_cast_": npu_format_cast_,
    "npu_format_cast_.acl_format": npu_format_cast_in_place,
    "_npu_format_cast": npu_format_cast,
}
