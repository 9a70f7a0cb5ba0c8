"""An Ascend NPU in host memory: the real torch_npu over a stand-in CANN runtime.

:func:`start` gives the process one ``npu`` device. The Python layer, the operator schemas and the
dispatcher decisions are those of the installed ``torch_npu`` wheel; every kernel is computed by
ATen on the CPU, and the operators of the ``npu::`` namespace are reference implementations that
enforce the documented limits. The device knows nothing of time and says so: elapsed times are NaN.

What it is for: to rehearse on a laptop what a script would do on an NPU, and to count what it
would launch there (:func:`trace`).

Importing this module imports neither torch nor torch_npu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindiesd.emulator.errors import EmulatorUnavailable

if TYPE_CHECKING:
    from mindiesd.emulator.device import environment, is_started, prepare, start
    from mindiesd.emulator.record import add as listen
    from mindiesd.emulator.trace import Trace, trace

__all__ = [
    "EmulatorUnavailable",
    "Trace",
    "environment",
    "is_started",
    "listen",
    "prepare",
    "start",
    "trace",
]

# Public name -> the module that defines it.
_HOME = {
    "environment": "mindiesd.emulator.device",
    "is_started": "mindiesd.emulator.device",
    "prepare": "mindiesd.emulator.device",
    "start": "mindiesd.emulator.device",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("Trace", "trace"):
        # The submodule has the name of its function; the function is what users mean.
        module = import_module("mindiesd.emulator.trace")
        globals().update(Trace=module.Trace, trace=module.trace)
        return globals()[name]
    if name == "listen":
        globals()["listen"] = import_module("mindiesd.emulator.record").add
        return globals()["listen"]
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
