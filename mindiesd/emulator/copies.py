"""Copies and casts: within the device, and between device and host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import outline, record
from mindiesd.emulator.alias import cpu_alias, npu_copy, require_device
from mindiesd.emulator.call import below

_CPU = torch.device("cpu")


def resize_out(out: Tensor, value: Tensor) -> None:
    """Give ``out`` the size of ``value``, as ``out=`` does."""
    if out.size() != value.size():
        out.resize_(value.size())


def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten::copy_`` in all directions: between devices, dtypes and strides."""
    if self.device.type != "npu":
        outline.refuse_reading("aten::copy_")
    with below():
        storages: dict[int, Any] = {}
        to = cpu_alias(self, storages) if self.device.type == "npu" else self
        source = cpu_alias(src, storages) if src.device.type == "npu" else src
        torch.ops.aten.copy_.default(to, source)
    if record.active:
        record.copy("aten::copy_", src, self)
    return self


def copy_from(self: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten::_copy_from``: copy ``self`` into ``dst``."""
    return copy_(dst, self, non_blocking)


def copy_from_and_resize(self: Tensor, dst: Tensor) -> Tensor:
    """``aten::_copy_from_and_resize``: copy ``self`` into ``dst``, which takes its size."""
    resize_out(dst, self)
    return copy_(dst, self)


def to_copy(
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """``aten::_to_copy`` from the device, to the device or to the host.

    Only contiguous and preserved memory formats exist on the device (torch_npu's own message).
    """
    target = self.device if device is None else device
    require_device(target)
    if target.type != "npu":
        outline.refuse_reading("aten::_to_copy")
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        raise RuntimeError("Only contiguous_format or preserve_format is supported.")
    with below():
        source = cpu_alias(self) if self.device.type == "npu" else self
        copied = torch.ops.aten._to_copy.default(
            source,
            dtype=dtype,
            layout=layout,
            device=outline.device() if target.type in ("npu", "cpu") else target,
            memory_format=memory_format,
        )
        if target.type == "npu":
            result = npu_copy(copied, keep_strides=True)
        elif pin_memory:
            result = copied.pin_memory()
        else:
            result = copied
    if record.active:
        record.copy("aten::_to_copy", self, result)
    return result


def clone(self: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    """``aten::clone``: dense strides are kept, every other memory format comes out contiguous."""
    with below():
        source = cpu_alias(self)
        wanted = memory_format if memory_format == torch.contiguous_format else None
        if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
            wanted = torch.contiguous_format
        result = npu_copy(
            torch.ops.aten.clone.default(source, memory_format=wanted), keep_strides=True
        )
    if record.active:
        record.launch("aten::clone", ((self,), {}), result)
    return result


def local_scalar_dense(self: Tensor) -> Any:
    """``aten::_local_scalar_dense``: read one number, waiting for the device."""
    outline.refuse_reading("aten::_local_scalar_dense")
    with below():
        value = torch.ops.aten._local_scalar_dense.default(cpu_alias(self))
    if record.active:
        record.copy("aten::_local_scalar_dense", self, None)
    return value


TABLE: dict[str, Callable[..., Any]] = {
    "_copy_from": copy_from,
    "_copy_from_and_resize": copy_from_and_resize,
    "_local_scalar_dense": local_scalar_dense,
    "_to_copy": to_copy,
    "clone": clone,
    "copy_": copy_,
}
