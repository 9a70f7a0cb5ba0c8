"""Kernels of the ``aten`` operators: the CPU's, over aliases of the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import outline, record
from mindiesd.emulator.alias import cpu_alias, require_device
from mindiesd.emulator.call import Call, below
from mindiesd.emulator.copies import resize_out
from mindiesd.emulator.random import cpu_default_generator, cpu_generator

_CPU = torch.device("cpu")

# Left to torch_npu: they allocate or describe memory, or only decide what else to call.
KEPT = frozenset(
    {
        "_fused_sdp_choice",
        "_pin_memory",
        "_reshape_alias",
        "as_strided",
        "as_strided_",
        "contiguous",
        "empty.memory_format",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "record_stream",
        "resize_",
        "resize_as_",
        "scaled_dot_product_attention",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "squeeze",
        "squeeze.dim",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
    }
)

# Operators that take index tensors from the host, as torch's own kernels do.
_HOST_INDICES = frozenset(
    {
        "_index_put_impl_",
        "index",
        "index_fill_",
        "index_put",
        "index_put_",
    }
)

# Operators to which torch lets a plain number be given for a tensor (python_arg_parser.cpp).
_TAKES_NUMBERS = frozenset({"add", "div", "floor_divide", "mul", "sub", "true_divide"})


def _number_as_tensor(number: Any, others: Sequence[Any]) -> Tensor:
    """A number that stands for a tensor, in the dtype that leaves the others' promotion alone.

    torch hands "wrapped numbers" to Python kernels as plain ones.
    """
    dtype = next((t.dtype for t in others if isinstance(t, Tensor)), None)
    if isinstance(number, complex):
        fits = dtype is not None and dtype.is_complex
    elif isinstance(number, float):
        fits = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
    else:
        fits = dtype is not None and (isinstance(number, bool) or dtype != torch.bool)
    return torch.tensor(number, dtype=dtype if fits else None, device=_CPU)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _fresh(out: Any) -> Any:
    """Empty tensors to be filled in place of ``out=`` tensors, which may alias the inputs."""
    if isinstance(out, Tensor):
        return torch.empty([0], dtype=out.dtype, device=outline.device())
    return [_fresh(item) for item in out]


def _deliver(out: Any, value: Any) -> None:
    """Write ``value`` (CPU) into ``out`` (NPU), resizing as ``out=`` does."""
    if isinstance(out, Tensor):
        resize_out(out, value)
        if out.numel():
            torch.ops.aten.copy_.default(cpu_alias(out), value)
        return
    for one, other in zip(out, value, strict=True):
        _deliver(one, other)


def cpu_kernel(name: str) -> Callable[..., Any]:
    """The device's kernel of ``aten::name``: the CPU's kernel over aliases.

    Args:
        name: operator and overload, e.g. ``"add.Tensor"`` or ``"clone"``.
    """
    base, _, overload = name.partition(".")
    operator: Any = getattr(getattr(torch.ops.aten, base), overload or "default")
    schema = operator._schema
    arguments = schema.arguments
    positions = {argument.name: index for index, argument in enumerate(arguments)}
    outs = [a.name for a in arguments if _writes(a) and a.kwarg_only]
    takes_generator = "generator" in positions
    takes_device = "device" in positions
    draws = torch.Tag.nondeterministic_seeded in operator.tags and not takes_generator
    # Results are contiguous but for these, for clone, casts and gelu (observed on torch_npu's host
    # code with kernels that accept everything).
    keep_strides = base.endswith("_like")
    host_indices = base in _HOST_INDICES
    # Return number i is argument number same[i], if the schema says that they are one.
    same: list[str | None] = []
    for returned in schema.returns:
        match = None
        if returned.alias_info is not None and returned.alias_info.is_write:
            marks = returned.alias_info.before_set
            match = next(
                (a.name for a in arguments if _writes(a) and a.alias_info.before_set == marks), None
            )
        same.append(match)
    inplace = any(_writes(a) for a in arguments)
    # Positions where a plain number has to become a tensor first.
    wraps = [
        index
        for index, argument in enumerate(arguments)
        if str(argument.type) == "Tensor" and base.rstrip("_") not in _TAKES_NUMBERS
    ]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with below():
            call = Call(f"aten::{name}")
            cpu_args = [call.alias(value) for value in args]
            for index in wraps:
                if index < len(cpu_args) and isinstance(cpu_args[index], (int, float, complex)):
                    cpu_args[index] = _number_as_tensor(cpu_args[index], cpu_args)
            cpu_kwargs: dict[str, Any] = {}
            for key, value in kwargs.items():
                cpu_kwargs[key] = _fresh(value) if key in outs else call.alias(value)
            if not host_indices:
                call.require_one_device()
            if takes_device:
                require_device(kwargs.get("device"))
                cpu_kwargs["device"] = outline.device()
                cpu_kwargs.pop("pin_memory", None)
            if takes_generator:
                where = positions["generator"]
                if where < len(cpu_args):
                    cpu_args[where] = cpu_generator(cpu_args[where])
                else:
                    cpu_kwargs["generator"] = cpu_generator(cpu_kwargs.get("generator"))
            if draws:
                with cpu_default_generator():
                    raw = operator(*cpu_args, **cpu_kwargs)
            else:
                raw = operator(*cpu_args, **cpu_kwargs)
            for key in outs:
                _deliver(kwargs[key], cpu_kwargs[key])

            def original(argument: str) -> Any:
                where = positions[argument]
                return args[where] if where < len(args) else kwargs[argument]

            if not schema.returns:
                result = None
            elif len(schema.returns) == 1:
                keeper = same[0]
                result = original(keeper) if keeper else call.result(raw, keep_strides)
            else:
                result = tuple(
                    original(keeper) if keeper else call.result(value, keep_strides)
                    for keeper, value in zip(same, raw, strict=True)
                )
        if record.active:
            written = [original(a.name) for a in arguments if _writes(a)] if inplace else result
            record.launch("aten::" + name, (args, kwargs), written)
        return result

    kernel.__name__ = kernel.__qualname__ = "cpu_" + name.replace(".", "_")
    return kernel
