"""Registers the emulator's kernels in place of torch_npu's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from mindiesd.emulator import aten, copies, npu, ops, quirks, refusals
from mindiesd.emulator.outline import outlined

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


def _schema(namespace: str, name: str) -> Any:
    """The operator's schema; torch_npu also registers for ones that have none."""
    base, _, overload = name.partition(".")
    try:
        operator = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError:
        return None
    return operator._schema


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
            schema = _schema("aten", name)
            if name in aten.KEPT or schema is None:
                continue
            kernel = outlined(special.get(name) or aten.cpu_kernel(name), schema)
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
        for name, function in quirks.ABOVE_AUTOGRAD.items():
            kernel = outlined(function, _schema("aten", name))
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
            library.impl(name, kernel, "AutogradPrivateUse1", allow_override=True)
        one_hot = outlined(aten.cpu_kernel("one_hot"), _schema("aten", "one_hot"))
        library.impl("one_hot", one_hot, "AutogradPrivateUse1", allow_override=True)
        library = _library("npu")
        selected = _registered("npu", "BackendSelect")
        for name in _registered("npu"):
            schema = _schema("npu", name)
            if name in ops.KEPT or schema is None:
                continue
            emulated = ops.TABLE.get(name)
            if emulated:
                kernel = outlined(npu.npu_kernel(name, emulated), schema)
            else:
                kernel = _not_emulated(f"npu::{name}")
            library.impl(name, kernel, "PrivateUse1", allow_override=True)
            if emulated is None and name in selected:
                # Without a tensor there is no device to dispatch by.
                library.impl(name, kernel, "BackendSelect", allow_override=True)
    refusals.install()
