"""One call of a kernel: its arguments as CPU tensors, its results as the device's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import outline
from mindiesd.emulator.alias import cpu_alias, npu_copy, npu_view

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class below:
    """Run CPU kernels as if nothing stood above them: no autograd, autocast, function modes."""

    __slots__ = ("_guards",)

    def __enter__(self) -> None:
        """Enter all guards."""
        self._guards = (
            torch._C._AutoDispatchBelowADInplaceOrView(),
            torch._C._ExcludeDispatchKeyGuard(_AUTOCAST),
            torch._C.DisableTorchFunction(),
        )
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *exc: object) -> None:
        """Leave all guards."""
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)


class Call:
    """The arguments of one call, aliased: which NPU memory lies behind which CPU storage."""

    __slots__ = ("_originals", "_storages", "host", "name")

    def __init__(self, name: str) -> None:
        """Start with no arguments.

        Args:
            name: the operator, for messages.
        """
        self.name = name
        self._storages: dict[int, Any] = {}
        self._originals: dict[int, Tensor] = {}
        self.host: Tensor | None = None

    def alias(self, value: Any) -> Any:
        """``value`` with every NPU tensor in it replaced by its alias."""
        if isinstance(value, Tensor):
            if value.device.type == "npu":
                self._require_strided(value)
                result = cpu_alias(value, self._storages)
                self._originals.setdefault(result.untyped_storage()._cdata, value)
                return result
            if value.dim() and value.device.type == "cpu":
                self.host = value
                # Operators of npu:: read what they take from the host.
                if outline.now and self.name.startswith("aten::"):
                    return value.to("meta")
            return value
        if isinstance(value, (list, tuple)):
            return [self.alias(item) for item in value]
        return value

    def result(self, value: Any, keep_strides: bool) -> Any:
        """``value`` with every CPU tensor in it moved to the device."""
        if isinstance(value, Tensor):
            self._require_strided(value)
            if value.numel():
                original = self._originals.get(value.untyped_storage()._cdata)
                if original is not None and original.dtype == value.dtype:
                    return npu_view(original, value)
            return npu_copy(value, keep_strides)
        if isinstance(value, (list, tuple)):
            return [self.result(item, keep_strides) for item in value]
        return value

    def _require_strided(self, value: Tensor) -> None:
        if value.layout is not torch.strided or value.is_quantized:
            kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
            raise NotImplementedError(f"not emulated: {self.name} with a {kind} tensor")

    def require_one_device(self) -> None:
        """Raise if there were tensors of the device and, larger than a number, of the host."""
        if self.host is not None and self._originals:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"npu:0 and cpu! (when calling {self.name})"
            )
