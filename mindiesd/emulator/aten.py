"""Kernels of the ``aten`` operators: the CPU's, over aliases of the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import record
from mindiesd.emulator.alias import NPU, contiguous_strides, cpu_alias, npu_copy, npu_view
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

# Operators whose result keeps the strides of a dense input; every other result is contiguous
# (observed on torch_npu's host code with kernels that accept everything).
_KEEPS_STRIDES = frozenset({"clone", "_to_copy", "gelu"})

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

# Writes to memory that the schema does not admit are harmless here (the alias *is* the memory).
_guard_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


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


class below:
    """Run CPU kernels as if nothing stood above them: no autograd, autocast, function modes."""

    __slots__ = ("_guards",)

    def __enter__(self) -> None:
        self._guards = (
            torch._C._AutoDispatchBelowADInplaceOrView(),
            torch._C._ExcludeDispatchKeyGuard(_guard_autocast),
            torch._C.DisableTorchFunction(),
        )
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *exc: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


class Call:
    """The arguments of one call, aliased: which NPU memory lies behind which CPU storage."""

    __slots__ = ("_originals", "_storages", "host")

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        self._originals: dict[int, Tensor] = {}
        self.host: Tensor | None = None

    def alias(self, value: Any) -> Any:
        """``value`` with every NPU tensor in it replaced by its alias."""
        if isinstance(value, Tensor):
            if value.device.type == "npu":
                result = cpu_alias(value, self._storages)
                self._originals.setdefault(value.untyped_storage().data_ptr(), value)
                return result
            if value.dim() and value.device.type == "cpu":
                self.host = value
            return value
        if isinstance(value, (list, tuple)):
            return [self.alias(item) for item in value]
        return value

    def result(self, value: Any, keep_strides: bool) -> Any:
        """``value`` with every CPU tensor in it moved to the device."""
        if isinstance(value, Tensor):
            if value.numel():
                original = self._originals.get(value.untyped_storage().data_ptr())
                if original is not None and original.dtype == value.dtype:
                    return npu_view(original, value)
            return npu_copy(value, keep_strides)
        if isinstance(value, (list, tuple)):
            return [self.result(item, keep_strides) for item in value]
        return value


def _resize_out(out: Tensor, value: Tensor) -> None:
    if out.size() != value.size():
        out.resize_(value.size())


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _fresh(out: Any) -> Any:
    """Empty CPU tensors to be filled in place of ``out=`` tensors, which may alias the inputs."""
    if isinstance(out, Tensor):
        return torch.empty([0], dtype=out.dtype, device=_CPU)
    return [_fresh(item) for item in out]


def _deliver(out: Any, value: Any) -> None:
    """Write ``value`` (CPU) into ``out`` (NPU), resizing as ``out=`` does."""
    if isinstance(out, Tensor):
        _resize_out(out, value)
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
    keep_strides = base in _KEEPS_STRIDES or base.endswith("_like")
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
            call = Call()
            cpu_args = [call.alias(value) for value in args]
            for index in wraps:
                if index < len(cpu_args) and isinstance(cpu_args[index], (int, float, complex)):
                    cpu_args[index] = _number_as_tensor(cpu_args[index], cpu_args)
            cpu_kwargs: dict[str, Any] = {}
            for key, value in kwargs.items():
                cpu_kwargs[key] = _fresh(value) if key in outs else call.alias(value)
            if call.host is not None and not host_indices and call._originals:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, npu:0 and cpu! (when calling aten::{name})"
                )
            if takes_device:
                cpu_kwargs["device"] = _CPU
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


def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten::copy_`` in all directions: between devices, dtypes and strides."""
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
    _resize_out(dst, self)
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
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        raise RuntimeError("Only contiguous_format or preserve_format is supported.")
    with below():
        source = cpu_alias(self) if self.device.type == "npu" else self
        copied = torch.ops.aten._to_copy.default(
            source,
            dtype=dtype,
            layout=layout,
            device=_CPU if target.type in ("npu", "cpu") else target,
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
    with below():
        value = torch.ops.aten._local_scalar_dense.default(cpu_alias(self))
    if record.active:
        record.copy("aten::_local_scalar_dense", self, None)
    return value


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten::gelu``: the tanh form, whatever ``approximate`` says.

    torch_npu calls aclnnGelu, which computes it, unless TORCH_NPU_USE_COMPATIBLE_IMPL asks for
    aclnnGeluV2 (op-plugin, GeluKernelNpuOpApi).
    """
    with below():
        computed = torch.ops.aten.gelu.default(
            cpu_alias(self), approximate=approximate if _compatible_impl() else "tanh"
        )
        result = npu_copy(computed, keep_strides=True)
    if record.active:
        record.launch("aten::gelu", ((self,), {}), result)
    return result


def gelu_backward(grad_output: Tensor, self: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten::gelu_backward``: of the tanh form, as :func:`gelu`."""
    with below():
        computed = torch.ops.aten.gelu_backward.default(
            cpu_alias(grad_output),
            cpu_alias(self),
            approximate=approximate if _compatible_impl() else "tanh",
        )
        result = npu_copy(computed)
    if record.active:
        record.launch("aten::gelu_backward", ((grad_output, self), {}), result)
    return result


def _compatible_impl() -> bool:
    import torch_npu

    enabled = getattr(torch_npu.npu, "are_compatible_impl_enabled", None)
    return enabled is not None and bool(enabled())


def ior_scalar(self: Tensor, other: Any) -> Tensor:
    """``aten::__ior__.Scalar``: or in place."""
    return self.bitwise_or_(other)


def ior_tensor(self: Tensor, other: Tensor) -> Tensor:
    """``aten::__ior__.Tensor``: or in place."""
    return self.bitwise_or_(other)


def slogdet(self: Tensor) -> tuple[Tensor, Tensor]:
    """``aten::slogdet``: the old name of ``linalg_slogdet``."""
    sign, value = torch.linalg.slogdet(self)
    return sign, value


def fill_diagonal_(self: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """``aten::fill_diagonal_``, for tensors without gradients."""
    if self.requires_grad:
        raise NotImplementedError("not emulated: aten::fill_diagonal_ with gradients")
    with below():
        torch.ops.aten.fill_diagonal_.default(cpu_alias(self), fill_value, wrap)
    if record.active:
        record.launch("aten::fill_diagonal_", ((self,), {}), self)
    return self


# Composite operators that torch_npu answers above autograd, with kernels that no dispatch reaches.
ABOVE_AUTOGRAD: dict[str, Callable[..., Any]] = {
    "__ior__.Scalar": ior_scalar,
    "__ior__.Tensor": ior_tensor,
    "fill_diagonal_": fill_diagonal_,
    "slogdet": slogdet,
}

# Kernels that differ from the CPU's in more than their device.
SPECIAL: dict[str, Callable[..., Any]] = {
    "_copy_from": copy_from,
    "_copy_from_and_resize": copy_from_and_resize,
    "_local_scalar_dense": local_scalar_dense,
    "_to_copy": to_copy,
    "clone": clone,
    "copy_": copy_,
    "gelu": gelu,
    "gelu_backward": gelu_backward,
}

__all__: Sequence[str] = ("KEPT", "NPU", "SPECIAL", "contiguous_strides", "cpu_kernel")
