"""What the attributes of some packages are at one moment, to find out what a foreign patch changed.

Modules, the classes in them and ``sys.modules`` are remembered by reference; values are compared by
identity. What a module keeps inside of a list or a dictionary is not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

ABSENT: Any = object()
"""Stands for an attribute that is not there."""

# Written by Python itself.
_NOISE = frozenset({"__warningregistry__", "__annotations__", "__annotations_cache__"})


@dataclass
class Change:
    """One attribute, or entry of ``sys.modules``, that is another object than before.

    Attributes:
        where: dotted name for people.
        owner: the module, class or dictionary.
        name: of the attribute or entry.
        old: what it was, or ``ABSENT``.
        new: what it is now, or ``ABSENT``.
    """

    where: str
    owner: Any
    name: str
    old: Any
    new: Any

    @property
    def current(self) -> Any:
        """What is there at this moment."""
        return _space(self.owner).get(self.name, ABSENT)

    def put(self, value: Any) -> None:
        """Put another object there, or with ``ABSENT`` none."""
        if isinstance(self.owner, type):
            if value is not ABSENT:
                setattr(self.owner, self.name, value)
            elif self.name in vars(self.owner):
                delattr(self.owner, self.name)
        else:
            space: MutableMapping[str, Any] = _space(self.owner)
            if value is ABSENT:
                space.pop(self.name, None)
            else:
                space[self.name] = value

    def undo(self) -> bool:
        """Put the old object back; False if somebody else has put yet another one there."""
        if self.current is not self.new:
            return self.current is self.old
        self.put(self.old)
        return True


def _space(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else vars(owner)


class Snapshot:
    """The attributes of every loaded module of some packages, and of the classes in them."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        """Remember them.

        Args:
            packages: names of top-level packages.
        """
        self._packages = packages
        self._modules = {
            name: module
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] in packages and isinstance(module, ModuleType)
        }
        self._spaces: dict[int, tuple[str, Any, dict[str, Any]]] = {}
        for name, module in self._modules.items():
            self._remember(name, module)
            for value in list(vars(module).values()):
                # Not isinstance: some values answer that with a deprecation warning.
                if type in type(value).__mro__ and self._is_theirs(value):
                    self._remember(f"{value.__module__}.{value.__qualname__}", value)

    def _is_theirs(self, value: type) -> bool:
        return str(getattr(value, "__module__", "")).partition(".")[0] in self._packages

    def _remember(self, name: str, owner: Any) -> None:
        self._spaces.setdefault(id(owner), (name, owner, dict(vars(owner))))

    def changes(self) -> Iterator[Change]:
        """What has changed since. A submodule that was imported meanwhile is no change."""
        for where, owner, before in self._spaces.values():
            now = vars(owner)
            for name in {*before, *now} - _NOISE:
                old, new = before.get(name, ABSENT), now.get(name, ABSENT)
                if old is new:
                    continue
                if old is not ABSENT or sys.modules.get(f"{where}.{name}") is not new:
                    yield Change(f"{where}.{name}", owner, name, old, new)
        for name, module in self._modules.items():
            new = sys.modules.get(name, ABSENT)
            if new is not module:
                yield Change(f"sys.modules[{name!r}]", sys.modules, name, module, new)
