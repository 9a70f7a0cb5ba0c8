"""Kernels of the ``npu::`` operators: reference functions over aliases of the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mindiesd.emulator import record
from mindiesd.emulator.alias import is_npu
from mindiesd.emulator.call import Call, below

# Operators that read some arguments on the host.
_HOST_ARGUMENTS = {"npu_fusion_attention_v3": ("actual_seq_qlen", "actual_seq_kvlen")}

# Operators whose result keeps the strides of their input.
_KEEPS_STRIDES = frozenset({"npu_format_cast", "_npu_format_cast"})


def npu_kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The device's kernel of ``npu::name``, computed by ``function`` on CPU tensors."""
    base, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, base), overload or "default")._schema
    names = [argument.name for argument in schema.arguments]
    required = [
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if str(argument.type) == "Tensor" and not argument.has_default_value()
    ]
    written = [
        index
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        for index, key in required:
            if (args[index] if index < len(args) else kwargs.get(key)) is None:
                raise RuntimeError(
                    "Expected a proper Tensor but got None (or an undefined Tensor in C++) for "
                    f"argument #{index} {key!r} (when calling npu::{name})"
                )
        with below():
            call = Call(f"npu::{name}")
            cpu_args = [call.alias(value) for value in args]
            cpu_kwargs = {key: call.alias(value) for key, value in kwargs.items()}
            if base in _HOST_ARGUMENTS:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                for key in _HOST_ARGUMENTS[base]:
                    if is_npu(given.get(key)):
                        raise RuntimeError(f"npu::{name}: {key}: tensor must be on CPU")
            else:
                call.require_one_device()
            raw = function(*cpu_args, **cpu_kwargs)
            if written:
                result = args[written[0]]
            elif isinstance(raw, (list, tuple)):
                result = tuple(call.result(value, False) for value in raw)
            else:
                result = call.result(raw, base in _KEEPS_STRIDES)
        if record.active:
            record.launch("npu::" + name, (args, kwargs), result)
        return result

    kernel.__name__ = kernel.__qualname__ = name.replace(".", "_")
    return kernel
