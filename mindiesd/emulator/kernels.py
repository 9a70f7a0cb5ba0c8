"""Registers the emulator's kernels in place of torch_npu's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from mindiesd.emulator import aten, copies, npu, ops, quirks, refusals

_libraries: list[Any] = []


def _registered(namespace: str, key: str = "PrivateUse1") -> list[str]:
    """Operators of ``namespace`` that have a kernel for the device, without the namespace."""
    names: list[str] = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    prefix = namespace + "::"
    return sorted(name[len(prefix) :] for name in names if name.startswith(prefix))


def _library(namespace: str) -> Any:
    """A library that keeps its kernels for as long as the process lives."""
    make: Any = torch.library.Library
    library = make(namespace, "IMPL")
    _libraries.append(library)
    return library


def _exists(namespace: str, name: str) -> bool:
    """Whether the operator has a schema here; torch_npu also registers for ones that have none."""
    base, _, overload = name.partition(".")
    try:
        getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError:
        return False
    return True


def _not_emulated(name: str) -> Callable[..., Any]:
    """A kernel that says that the emulator does not know this operator."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"not emulated: {name}")

    return kernel


def register() -> None:
    """Replace every kernel of the device; once per process."""
    with warnings.catch_warnings():
        # torch warns that kernels are overridden, which is what is wanted.
        warnings.simplefilter("ignore")
        library = _library("aten")
        special = {**copies.TABLE, **quirks.TABLE}
        for name in sorted({*_registered("aten"), *special}):
            if name in aten.KEPT or not _exists("aten", name):
                continue
            kernel = special.get(name) or aten.cpu_kernel(name)
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
        for name, kernel in quirks.ABOVE_AUTOGRAD.items():
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
            library.impl(name, kernel, "AutogradPrivateUse1", allow_override=True)
        one_hot = aten.cpu_kernel("one_hot")
        library.impl("one_hot", one_hot, "AutogradPrivateUse1", allow_override=True)
        library = _library("npu")
        selected = _registered("npu", "BackendSelect")
        for name in _registered("npu"):
            if name in ops.KEPT or not _exists("npu", name):
                continue
            function = ops.TABLE.get(name)
            kernel = npu.npu_kernel(name, function) if function else _not_emulated(f"npu::{name}")
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
            if function is None and name in selected:
                # Without a tensor there is no device to dispatch by.
                library.impl(name, kernel, "BackendSelect", allow_override=True)
    refusals.install()
