"""Which module computes on which device, and that each has every function."""

import inspect
import sys
import types

import pytest
import torch

from mindiesd.ops import backends
from mindiesd.ops.backends import Backend, backend_for, backend_of, native

FUNCTIONS = [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta", "mps", "xpu"])
def test_aten_serves_every_device_without_a_backend(device_type):
    assert backend_for(device_type) is native


def test_backend_of_a_tensor():
    assert backend_of(torch.empty(1)) is native
    assert backend_of(torch.empty(1, device="meta")) is native


def test_a_backend_is_imported_when_first_asked_for(monkeypatch):
    module = types.ModuleType("a_backend")
    monkeypatch.setitem(sys.modules, "a_backend", module)
    monkeypatch.setitem(backends.MODULES, "somewhere", "a_backend")
    monkeypatch.setattr(backends, "_loaded", {})
    assert backend_for("somewhere") is module
    del backends.MODULES["somewhere"]
    assert backend_for("somewhere") is module


@pytest.mark.parametrize("name", FUNCTIONS)
def test_native_has_the_contracts_signatures(name):
    def positional(function):
        return [p for p in inspect.signature(function).parameters if p != "self"]

    assert positional(getattr(native, name)) == positional(getattr(Backend, name))


def test_there_is_something_to_compare():
    assert {"attention", "rms_norm", "layer_norm", "rotate", "gelu"} <= set(FUNCTIONS)
