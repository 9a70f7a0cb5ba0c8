"""The finder that gives the user's own code modules which are not installed.

It stands last among the finders, so a package that is installed wins. It answers by who asks: the
code that is being run (a script, the repository around it) gets the module; code below a
``site-packages`` directory, and the libraries named here wherever they lie, are told what they
would be told without us, that there is none. A library that believed in flash_attn would go on to
its CUDA kernels; xformers does not even survive finding one without them.

For that the packages must not stand in ``sys.modules`` under their names either, where everybody
looks first. They stand there under a private name: the import system stores a module under the name
of its spec and hands the module itself to the import statement. A submodule has to be found under
its own name, so those that the user's code imported are in ``sys.modules``; nobody gets to them
without the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any, NamedTuple

Contents = Mapping[str, Mapping[str, Any]]

# Libraries that probe for these packages, also when they are installed from a clone.
LIBRARIES = frozenset(
    {
        "accelerate",
        "deepspeed",
        "diffusers",
        "flash_attn",
        "huggingface_hub",
        "mindiesd",
        "peft",
        "sageattention",
        "torch",
        "torch_npu",
        "transformers",
        "vllm",
        "vllm_ascend",
        "xformers",
    }
)
# Finders that ask the next finder on somebody's behalf.
_MESSENGERS = (
    "wrapt",
    "_mindiesd_start",
    "mindiesd.bootstrap.path._mindiesd_start",
    "mindiesd.patches.hooks",
)
# Dynamo runs the import statements of the code it traces.
_TRACER = "torch._dynamo.symbolic_convert"
_STDLIB = os.path.dirname(os.__file__) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_BOOTSTRAP = "<frozen importlib._bootstrap>"


@dataclass(eq=False)
class Door:
    """One package that is provided.

    Attributes:
        build: called when the package is first imported; returns, for each module of it, the
            module's attributes.
        modules: what was built, by public name.
        loaded: private and public names under which modules stand in ``sys.modules``.
    """

    build: Callable[[], Contents]
    modules: dict[str, ModuleType] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)


class DoorFinder(MetaPathFinder):
    """Provides packages to the code that is being run, and to nobody else.

    Attributes:
        declined: ``(package, importer)`` of import statements in installed packages that got none.
    """

    def __init__(self) -> None:
        """Provide nothing yet."""
        self._doors: dict[str, Door] = {}
        self.declined: set[tuple[str, str]] = set()

    def open(self, package: str, build: Callable[[], Contents]) -> None:
        """Provide ``package`` from now on.

        Args:
            package: name of the top-level package.
            build: returns the attributes of each module, the package itself included.
        """
        self._doors[package] = Door(build)
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def close(self, package: str) -> None:
        """Provide ``package`` no longer; names that were imported from it go on working."""
        door = self._doors.pop(package, None)
        if door is not None:
            for name in door.loaded:
                if sys.modules.get(name) in door.modules.values():
                    del sys.modules[name]
        if not self._doors and self in sys.meta_path:
            sys.meta_path.remove(self)

    def notes(self) -> list[str]:
        """One remark for each import that got nothing though the user's own code would have."""
        return [
            f"{package} is provided to the code that is run, not to installed packages: {importer} "
            "imported it in vain"
            for package, importer in sorted(self.declined)
        ]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a provided module, for the user's own code."""
        package = fullname.partition(".")[0]
        door = self._doors.get(package)
        if door is None:
            return None
        asker, loading = _asker(package)
        if asker is None or not _is_users(asker):
            if asker is not None and loading and asker.root not in LIBRARIES:
                self.declined.add((package, asker.root))
            return None
        if not door.modules:
            door.modules.update(_modules(door.build()))
        module = door.modules.get(fullname)
        if module is None:
            return None
        if fullname not in loading:
            return module.__spec__  # a question, not an import
        if fullname == package:
            # Python looks for the submodule under its own name once the package is there.
            for name in loading:
                wanted = door.modules.get(name)
                if wanted is None:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
                if name != fullname:
                    sys.modules[name] = wanted
                    door.loaded.add(name)
        private = f"mindiesd.provided.{fullname}"
        door.loaded.add(private)
        return ModuleSpec(private, _Ready(module), is_package=hasattr(module, "__path__"))


class _Ready(Loader):
    """Loads a module that is complete already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just set the private one.
        module.__spec__ = self._spec


def _modules(contents: Contents) -> dict[str, ModuleType]:
    """The modules with these attributes, each an attribute of its parent."""
    made: dict[str, ModuleType] = {}
    for name, attributes in contents.items():
        module = made[name] = ModuleType(name, "Provided by mindiesd.")
        is_package = any(other.startswith(f"{name}.") for other in contents) or "." not in name
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=is_package)
        module.__spec__.loader = module.__loader__ = _Ready(module)
        module.__file__ = __file__
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        vars(module).update(attributes)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


class Asker(NamedTuple):
    """The code that wants a module.

    Attributes:
        namespace: its globals.
        file: where it was compiled from.
    """

    namespace: Mapping[str, Any]
    file: str

    @property
    def root(self) -> str:
        """The top-level package of its module."""
        return str(self.namespace.get("__name__", "")).partition(".")[0]


def _asker(package: str) -> tuple[Asker | None, list[str]]:
    """The code that wants a module, and what of ``package`` is being imported on its behalf.

    Frames of the import system, the standard library and of other finders only pass the question
    on.
    """
    loading: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _BOOTSTRAP:
            if frame.f_code.co_name == "_find_and_load_unlocked":
                name = frame.f_locals["name"]
                if name.partition(".")[0] == package:
                    loading.append(name)
        elif frame.f_globals.get("__name__") == _TRACER:
            traced: Any = frame.f_locals.get("self")
            if traced is not None and hasattr(traced, "f_globals") and hasattr(traced, "f_code"):
                return Asker(traced.f_globals, traced.f_code.co_filename), loading
        elif not _passes_on(frame, file):
            return Asker(frame.f_globals, file), loading
        frame = frame.f_back
    return None, loading


def _passes_on(frame: FrameType, file: str) -> bool:
    if file.startswith("<frozen "):
        return True
    name = str(frame.f_globals.get("__name__", ""))
    if any(name == root or name.startswith(f"{root}.") for root in _MESSENGERS):
        return True
    return file.startswith(_STDLIB) and not any(part in file for part in _INSTALLED)


def _is_users(asker: Asker) -> bool:
    """Whether this code is the user's own."""
    root = asker.root
    if root in LIBRARIES:
        return False
    files: list[object] = [asker.file, asker.namespace.get("__file__")]
    if root != "__main__":  # under python -m that is the tool, not the code it runs
        # Code made of text has no file, but the package it runs in has.
        files.append(getattr(sys.modules.get(root), "__file__", None))
    return not any(isinstance(file, str) and part in file for file in files for part in _INSTALLED)


FINDER = DoorFinder()
"""The one finder of this process."""
