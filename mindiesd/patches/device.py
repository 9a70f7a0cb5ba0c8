"""A script that says "cuda" runs on the NPU: torch_npu's ``transfer_to_npu``, contained and undone.

It is applied where an NPU is there and CUDA is not, never where CUDA is available. What it does,
beyond ``"cuda"`` meaning ``"npu"`` in factory functions, ``to``, ``Generator``, ``autocast`` and so
on, is listed in ``docs/device.md``. Four of its side effects are contained here:

- it sets warning filters for the whole process and writes a banner: caught, a note says it shorter;
- it imports transformers, accelerate, peft and trl to hide CUDA from some functions of theirs: that
  is done when, and if, the program imports them;
- its wrappers replace "cuda" in any text, paths included, and break graphs under ``torch.compile``:
  :mod:`.cuda_names` takes their place;
- while it hides CUDA from a library it does so for all threads, and for good if the library raises.

Everything it changed is found by comparing torch before and after, and put back by :meth:`undo`.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from types import CodeType, FunctionType, ModuleType
from typing import Any

import wrapt

from mindiesd.patches import sweep
from mindiesd.patches.engine import _compiled_anything
from mindiesd.patches.hooks import is_initializing
from mindiesd.patches.snapshot import ABSENT, Change, Snapshot

TRANSFER = "torch_npu.contrib.transfer_to_npu"

# What it changes must be loaded before the snapshot.
_BEFORE = (
    "torch._dynamo.trace_rules",
    "torch._dynamo.utils",
    "torch._inductor.autotune_process",
    "torch._inductor.compile_fx",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.runtime.autotune_cache",
    "torch._inductor.utils",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.utils.cpp_extension",
    "torch_npu.contrib",
)

_hiding = threading.local()


class Device:
    """The one device migration of this process."""

    def __init__(self) -> None:
        """Nothing is changed yet."""
        self._lock = threading.RLock()
        self._users = 0
        self._waiting = False
        self._changes: list[Change] = []
        self._containers: list[tuple[Any, Any]] = []
        self._queued: list[Any] = []
        self.active = False
        self.note = ""

    def acquire(self) -> None:
        """Apply it now, or when torch has been imported; where it must not be, only note why."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            torch = sys.modules.get("torch")
            if torch is not None and not is_initializing(torch):
                self._apply()
            elif not self._waiting:
                self._waiting = True
                self.note = 'device: "cuda" means the NPU once torch is imported, if there is one'
                wrapt.register_post_import_hook(lambda _: self._imported(), "torch")

    def release(self) -> list[str]:
        """Undo it if nobody wants it any more.

        Returns:
            Places that were not restored because somebody else had changed them since.
        """
        with self._lock:
            self._users -= 1
            return self.undo() if self._users == 0 else []

    def _imported(self) -> None:
        with self._lock:
            self._waiting = False
            if self._users and not self.active:
                self._apply()

    def _apply(self) -> None:
        try:
            reason = _obstacle()
            if reason:
                self.note = f'device: "cuda" was left alone: {reason}'
                return
            self._transfer()
        except Exception as error:  # noqa: BLE001 - the program must run on, and is told
            lost = self.undo()
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self.note = f'device: "cuda" was left alone, for it failed: {what}'
            if lost:
                self.note += f"; not restored: {', '.join(lost)}"
            return
        self.note = (
            'device: "cuda" means the NPU (torch_npu.contrib.transfer_to_npu); '
            "torch.jit.script compiles nothing and torch finds no Triton (docs/device.md)"
        )

    def _transfer(self) -> None:
        for name in _BEFORE:
            # Not every version of torch has them all.
            if util.find_spec(name) is not None:
                importlib.import_module(name)
        import torch
        import torch_npu

        backend: Any = torch.distributed.Backend if torch.distributed.is_available() else None
        lists: list[Any] = [_allowed_methods()]
        if hasattr(backend, "default_device_backend_map"):
            lists.append(backend.default_device_backend_map)
        self._containers = [(each, each.copy()) for each in lists]
        queue = list(torch_npu.npu._queued_calls)
        snapshot = Snapshot(("torch", "torch_npu"))
        try:
            with warnings.catch_warnings(record=True), _no_imports_by_it():
                transfer = importlib.import_module(TRANSFER)
        finally:
            self._changes = list(snapshot.changes())
        self._queued = [call for call in torch_npu.npu._queued_calls if call not in queue]
        self.active = True
        self._contain(transfer)
        _reset_dynamo()

    def _contain(self, transfer: ModuleType) -> None:
        import torch

        from mindiesd.patches.cuda_names import translated

        theirs = _inner(transfer._wrapper_cuda)
        before: dict[int, Any] = {}
        for change in self._changes:
            new = change.new
            if isinstance(new, FunctionType) and new.__code__ is theirs:
                numbers = new.__name__ in ("to", "to_empty")
                # One function for every place that has it.
                ours = before.setdefault(id(new), translated(new.__wrapped__, numbers))  # type: ignore[attr-defined]
                change.put(ours)
                change.new = ours
            elif change.name == "is_available" and change.owner is torch.cuda:
                change.new = _unless_hidden(new)
                change.put(change.new)
        methods = _allowed_methods()
        methods[:] = [
            torch.Tensor.to if getattr(method, "__name__", "") == "to" else method
            for method in methods
        ]
        for package, entry in transfer._load_json_file(transfer.config_path).items():
            if _installed(package, entry.get("version")):
                for path, kind in (entry.get("apis") or {}).items():
                    self._hide_from(path, 2 if kind == "method" else 1)

    def _hide_from(self, path: str, depth: int) -> None:
        """Let a function of a library, ``module.name`` or ``module.class.name``, see no CUDA."""
        module, *rest = path.rsplit(".", depth)

        def apply(loaded: Any) -> None:
            owner = loaded
            for name in rest[:-1]:
                owner = getattr(owner, name, None)
            original = vars(owner).get(rest[-1]) if owner is not None else None
            if not self.active or not callable(original):
                return
            hidden = _hidden(original)
            setattr(owner, rest[-1], hidden)
            self._changes.append(Change(path, owner, rest[-1], original, hidden))

        wrapt.register_post_import_hook(apply, module)

    def undo(self) -> list[str]:
        """Put everything back.

        Returns:
            Places that were not restored because somebody else had changed them since.
        """
        lost = []
        made: dict[int, sweep.Swap] = {}
        for change in reversed(self._changes):
            if not change.undo():
                lost.append(change.where)
            if _made_here(change.new) and change.old is not ABSENT:
                made[id(change.new)] = sweep.Swap(change.new, change.old)
        for container, before in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        if sys.modules.pop(TRANSFER, None) is not None:
            # To be imported anew, by us or by the script.
            vars(sys.modules["torch_npu.contrib"]).pop("transfer_to_npu", None)
        if self.active:
            import torch_npu

            calls = torch_npu.npu._queued_calls
            calls[:] = [call for call in calls if call not in self._queued]
            if made:
                # Modules imported meanwhile took the functions by name.
                sweep.rebind(made, lambda name: name.startswith("mindiesd"), to_replacement=False)
            _reset_dynamo()
            self.note = 'device: "cuda" means CUDA again'
        self.active = False
        self._changes, self._containers, self._queued = [], [], []
        return lost


def _obstacle() -> str:
    """Why it must not be applied; empty if it may."""
    import torch

    if TRANSFER in sys.modules:
        return "transfer_to_npu is in force already, not by mindiesd"
    if "torch_npu" not in sys.modules and util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if torch.cuda.is_available():
        return "CUDA is available"
    try:
        importlib.import_module("torch_npu")
        npu: Any = torch.npu  # type: ignore[attr-defined]
        available = npu.is_available()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"torch_npu cannot be loaded: {str(error).strip().splitlines()[-1]}"
    return "" if available else "there is no NPU"


def _allowed_methods() -> Any:
    """A list in which torch keeps ``Tensor.to`` itself."""
    parameter: Any = importlib.import_module("torch.nn.parameter")
    return parameter.UninitializedTensorMixin._allowed_methods


@contextmanager
def _no_imports_by_it() -> Iterator[None]:
    """While it is imported, it gets none of the libraries that it would import to patch them."""
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if sys._getframe(1).f_globals.get("__name__") == TRANSFER:
            raise ImportError(f"{name} is seen to when the program imports it")
        return real(name, package)

    importlib.import_module = import_module
    try:
        yield
    finally:
        importlib.import_module = real


def _inner(function: FunctionType) -> CodeType | None:
    """The code of the function that a decorator returns."""
    codes = [const for const in function.__code__.co_consts if isinstance(const, CodeType)]
    return codes[0] if len(codes) == 1 else None


def _installed(package: str, version: str | None) -> bool:
    from packaging.version import Version

    try:
        return bool(version) and Version(metadata.version(package)) >= Version(str(version))
    except metadata.PackageNotFoundError:
        return False


def _unless_hidden(available: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(available)
    def is_available() -> bool:
        return not getattr(_hiding, "depth", 0) and available()

    return is_available


def _hidden(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        _hiding.depth = getattr(_hiding, "depth", 0) + 1
        try:
            return original(*args, **kwargs)
        finally:
            _hiding.depth -= 1

    return call


def _made_here(value: Any) -> bool:
    if isinstance(value, FunctionType):
        home = value.__globals__.get("__name__", "")
        return home == TRANSFER or str(home).startswith("mindiesd.patches.")
    return isinstance(value, type) and value.__module__ == TRANSFER


def _reset_dynamo() -> None:
    """Drop what was compiled: it calls the functions that were there then."""
    if _compiled_anything():
        import torch

        torch.compiler.reset()


DEVICE = Device()
"""The one device migration of this process."""
