"""One emulated ``npu`` device for this process: :func:`start`."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from importlib import metadata, util
from pathlib import Path

from mindiesd.emulator import runtime
from mindiesd.emulator.errors import EmulatorUnavailable

_lock = threading.RLock()
_home: Path | None = None
_ready = False


def is_started() -> bool:
    """Whether this process has the emulated device."""
    return _ready


def _variables(home: Path) -> dict[str, str]:
    return {
        # `import torch` would import torch_npu by itself, before the stand-in runtime is there.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        # Kernels run in the caller's thread, in order, as host memory demands.
        "TASK_QUEUE_ENABLE": "0",
    }


def environment() -> dict[str, str]:
    """The environment variables under which a child process can call :func:`start` itself.

    Raises:
        EmulatorUnavailable: as :func:`start`.
    """
    with _lock:
        if _home is None:
            _check_versions()
        return _variables(_home if _home is not None else runtime.build())


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:3])


def _check_versions() -> None:
    """Raise unless torch and a torch_npu made for it are installed (found without importing)."""
    if util.find_spec("torch") is None:
        raise EmulatorUnavailable("the emulated NPU needs torch, which is not installed")
    if util.find_spec("torch_npu") is None:
        raise EmulatorUnavailable(
            "the emulated NPU needs the torch_npu wheel, which is not installed "
            "(pip install torch_npu; no CANN is needed)"
        )
    try:
        torch, torch_npu = metadata.version("torch"), metadata.version("torch_npu")
    except metadata.PackageNotFoundError as error:
        raise EmulatorUnavailable(f"the emulated NPU cannot tell versions: {error}") from None
    if _release(torch) != _release(torch_npu):
        raise EmulatorUnavailable(
            f"torch_npu {torch_npu} was built for another torch than the installed {torch}; "
            f"install torch_npu=={'.'.join(_release(torch))}"
        )


def prepare() -> None:
    """Load the stand-in runtime, without importing torch; ``start`` does the rest once torch is in.

    For a launcher, which must be ready before the program imports torch.

    Raises:
        EmulatorUnavailable: as :func:`start`.
    """
    global _home
    with _lock:
        _check_versions()
        _home = runtime.build()
        os.environ.update(_variables(_home))
        runtime.load(_home)


def start(soc: str | None = None) -> None:
    """Give this process one emulated ``npu`` device, once; later calls do nothing.

    It can be called before torch is imported, or after, but not after torch_npu has been imported
    over another runtime.

    Args:
        soc: which Ascend to be, by its SoC name, e.g. ``"Ascend310P3"`` or ``"Ascend910_9391"``;
            default ``$MINDIESD_EMULATOR_SOC``, else ``"Ascend910B1"``. Limits differ between them.

    Raises:
        EmulatorUnavailable: torch or torch_npu is missing, they do not belong together, there is no
            C compiler, or torch_npu is already loaded over a real CANN.
    """
    global _home, _ready
    with _lock:
        if _ready:
            return
        if "torch_npu" in sys.modules:
            raise EmulatorUnavailable(
                "torch_npu is already imported over another runtime; "
                "call mindiesd.emulator.start() before torch_npu is imported"
            )
        _check_versions()
        _home = runtime.build()
        variables = _variables(_home)
        if soc is not None:
            variables["MINDIESD_EMULATOR_SOC"] = soc
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            runtime.load(_home)
            importlib.import_module("torch")
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if isinstance(error, EmulatorUnavailable):
                raise
            reason = str(error).strip().splitlines()
            raise EmulatorUnavailable(
                f"torch_npu could not be imported over the stand-in runtime: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error
        from mindiesd.emulator import kernels

        kernels.register()
        _ready = True
