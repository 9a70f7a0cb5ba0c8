"""Between NPU tensors and CPU tensors.

The memory of the device is host memory, so a CPU tensor can alias it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import outline

_CPU = torch.device("cpu")
NPU = torch.device("npu", 0)

_storage_at: Any = torch._C._construct_storage_from_data_pointer
_untyped: Any = torch.UntypedStorage
_empty = torch.ops.aten.empty.memory_format
_set = torch.ops.aten.set_.source_Storage_storage_offset
_empty_strided = torch.ops.aten.empty_strided.default
_copy = torch.ops.aten.copy_.default
_as_strided = torch.ops.aten.as_strided.default


def require_device(device: torch.device | None) -> None:
    """Raise for an NPU that is not there: there is one, number 0."""
    if device is not None and device.type == "npu" and device.index not in (None, 0):
        raise RuntimeError(
            f"Invalid device id {device.index}: the emulator has one device, npu:0 "
            "(device ordinal out of range)"
        )


def is_npu(value: object) -> bool:
    """Whether ``value`` is a tensor in the emulated device's memory."""
    return isinstance(value, Tensor) and value.device.type == "npu"


def cpu_alias(tensor: Tensor, storages: dict[int, Any] | None = None) -> Tensor:
    """A CPU tensor over the same memory, with the same geometry, conjugate and negative bits.

    It must not outlive ``tensor``. Where nothing is to be computed (see ``outline``) it is a meta
    tensor, over no memory.

    Args:
        tensor: a tensor in the device's memory.
        storages: storages already aliased in this call, by address. Tensors that share memory must
            share the alias too, so that the CPU kernel sees the overlap.
    """
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    shared = None if storages is None else storages.get(address)
    if shared is None:
        if outline.now:
            shared = _untyped(storage.nbytes(), device="meta")
        else:
            shared = _storage_at(address, _CPU, storage.nbytes())
        if storages is not None:
            storages[address] = shared
    alias: Tensor = _empty([0], dtype=tensor.dtype, device=outline.device())
    _set(alias, shared, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        torch._C._set_conj(alias, True)
    if tensor.is_neg():
        torch._C._set_neg(alias, True)
    return alias


def contiguous_strides(size: torch.Size) -> list[int]:
    """The strides of a contiguous tensor of this size."""
    strides = [1] * len(size)
    for axis in range(len(size) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(size[axis + 1], 1)
    return strides


def npu_copy(tensor: Tensor, keep_strides: bool = False) -> Tensor:
    """A new NPU tensor with the values of the CPU tensor ``tensor``.

    It is contiguous unless ``keep_strides``: torch_npu's operators allocate their results
    contiguous whatever the strides of their inputs (observed on its host code, which runs here).
    """
    size = tensor.size()
    strides = tensor.stride() if keep_strides else contiguous_strides(size)
    result: Tensor = _empty_strided(size, strides, dtype=tensor.dtype, device=NPU)
    if tensor.numel() and not outline.now:
        _copy(cpu_alias(result), tensor)
    return result


def npu_view(original: Tensor, alias: Tensor) -> Tensor:
    """The NPU tensor that shows of ``original``'s memory what ``alias`` shows of its alias."""
    view: Tensor = _as_strided(original, alias.size(), alias.stride(), alias.storage_offset())
    return view
