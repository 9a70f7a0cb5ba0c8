"""Calling back when a module has been imported, also when it is imported again.

The first import is wrapt's post-import hook. wrapt's hooks fire once, so a reload, or an import
after the module was dropped from ``sys.modules``, would lose a patch: a finder watches for those.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import wrapt

_log = logging.getLogger("mindiesd")


def is_initializing(module: ModuleType) -> bool:
    """Whether ``module`` is still being executed by an import."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Initializing(ModuleSpec):
    """The spec of a module that is being executed; calls back when the import system is done."""

    # Where the import system keeps the attribute of this name; a property comes before it.
    @property
    def _initializing(self) -> bool:
        return bool(vars(self).get("_initializing"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        vars(self)["_initializing"] = value
        if not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            for then in vars(self).pop("_mindiesd_then", ()):
                then()


def _when_initialized(module: ModuleType, then: Callable[[], None]) -> None:
    """Call ``then`` as soon as the execution of ``module`` is over.

    Without this a module that nothing is imported after would stay as it is.
    """
    spec = module.__spec__
    if type(spec) is ModuleSpec:
        spec.__class__ = _Initializing
    if type(spec) is _Initializing:
        vars(spec).setdefault("_mindiesd_then", []).append(then)


class ImportWatch(MetaPathFinder):
    """Calls ``on_import(name)`` each time one of the watched modules has been executed.

    A callback that raises is logged and never reaches the import that triggered it: an exception
    there would make the user's import fail, and the next one succeed unpatched.
    """

    def __init__(self, on_import: Callable[[str], None]) -> None:
        """Watch nothing yet."""
        self._on_import = on_import
        self._watched: set[str] = set()
        self._executed: set[str] = set()
        self._partial: set[str] = set()
        self._finding = threading.local()
        self._lock = threading.Lock()

    def watch(self, name: str) -> None:
        """Call back after each execution of the module ``name``; at once if it is loaded."""
        with self._lock:
            known = name in self._watched
            self._watched.add(name)
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)
        module = sys.modules.get(name)
        if module is None:
            if not known:
                wrapt.register_post_import_hook(self._first_import, name)
        elif is_initializing(module):
            # Half-way through its import: wrapt would fire now, before the target exists.
            self._partial.add(name)
            _when_initialized(module, self.retry_partial)
        else:
            self._call(name)

    def _first_import(self, module: ModuleType) -> None:
        # The module wrapt passes may have replaced itself in sys.modules; the name is what counts.
        self._call(module.__name__)

    def _call(self, name: str) -> None:
        self._executed.add(name)
        try:
            self._on_import(name)
        except Exception as error:  # noqa: BLE001 - it is not the importing code's fault
            _log.warning("patching after the import of %s failed: %r", name, error)
            _log.debug("%s", name, exc_info=True)

    def retry_partial(self) -> None:
        """Call back for modules that were half-imported when they were first watched."""
        for name in list(self._partial):
            module = sys.modules.get(name)
            if module is None or is_initializing(module):
                continue
            self._partial.discard(name)
            self._call(name)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find nothing, except to call back after a watched module is executed once more."""
        if self._partial:
            self.retry_partial()
        if fullname not in self._watched or getattr(self._finding, "name", None) == fullname:
            return None
        if fullname not in self._executed:
            return None  # a first import belongs to wrapt's hook
        self._finding.name = fullname
        try:
            spec = _find(fullname, path, target)
        finally:
            self._finding.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Again(spec.loader, self._call)
        return spec


def _find(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is not None:
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


class _Again(Loader):
    """A loader that executes the module as its own loader does, and then calls back."""

    def __init__(self, loader: Loader, then: Callable[[str], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Leave no trace of us on the module: tools read its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module.__name__)


def find_module(name: str) -> bool:
    """Whether a top-level module ``name`` could be imported; nothing is imported to find out."""
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        # A stub without __spec__ in sys.modules makes find_spec raise ValueError.
        return False
