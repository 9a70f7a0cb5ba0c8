"""Finding and rebinding every place that holds a function that was replaced.

``from torch.nn.functional import scaled_dot_product_attention`` copies the function into another
module, a class body may keep it as an attribute, a ``def`` as a default value. Setting the
attribute where the function lives reaches none of these, so they are found by identity. Three kinds
are rebound, each the way Python looks it up; containers, closures and instances are left alone and
described, because what they mean is the owner's business.

A fourth is a method that was bound before and is kept by the object that it belongs to, or by its
hooks: ``module._old_forward`` under accelerate, ``module.forward`` after its hooks were taken off.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple


class Swap(NamedTuple):
    """An object that is replaced, and what replaces it."""

    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Holder:
    """One place that held an object and was given another.

    Attributes:
        where: dotted description for the report.
        found: ``id`` of the replaced object that it held; of the first, if several.
        old: what it held: that object, or what wraps or contains it.
        new: what it was given.
        read: returns what it holds now.
        write: makes it hold something.
    """

    where: str
    found: int
    old: Any
    new: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]

    def undo(self) -> bool:
        """Put the old object back, unless somebody else has replaced ours; say whether we did."""
        if self.read() is not self.new:
            return False
        self.write(self.old)
        return True


def alone(module: str, attribute: str) -> bool:
    """Whether a function is held by its class or module only, so that nothing can be rebound.

    The collector's search takes time in proportion to what is looked for, and most targets are
    methods and helpers that nobody took by name. What a reference costs differs between versions
    of Python, so the count is compared with that of a method which is certainly alone.
    """
    owner: Any = sys.modules.get(module)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    if not isinstance(owner, (type, ModuleType)) or name not in vars(owner):
        return False
    return isinstance(vars(owner)[name], FunctionType) and _count(owner, name) <= _ONE


class _Alone:
    def method(self) -> None:
        """Held by this class only."""


def _count(owner: type | ModuleType, name: str) -> int:
    return sys.getrefcount(vars(owner)[name])


_ONE = _count(_Alone, "method")


def references(swap: Swap) -> tuple[int, int]:
    """How many references there are to the two; only for comparing with the same asked before."""
    return sys.getrefcount(swap.old), sys.getrefcount(swap.new)


def rebind(
    swaps: Mapping[int, Swap], skip: Callable[[str], bool], to_replacement: bool = True
) -> list[Holder]:
    """Rebind every module name, class attribute and default value that holds a replaced object.

    The holders are found by the garbage collector, in C: reading every name of every module takes
    several times as long, and would not find class attributes and default values.

    Args:
        swaps: ``id(old) -> (old, new)``.
        skip: whether the module of this name is to be left alone.
        to_replacement: ``new`` is a plain function that stands in for ``old``; in a class body it
            is wrapped in ``staticmethod`` where ``old`` was not one that binds.

    Returns:
        What was rebound, in order.
    """
    done: list[Holder] = []
    namespaces = _namespaces()
    referrers = gc.get_referrers(*[swap.old for swap in swaps.values()])
    if gc.get_freeze_count():
        # Frozen objects are hidden from the collector; the modules at least can be asked.
        referrers += [vars(sys.modules[name]) for name in namespaces.values()]
    containers: list[Any] = []
    wrappers: list[Any] = []
    seen: set[int] = set()
    for holder in referrers:
        if id(holder) in namespaces:
            name = namespaces[id(holder)]
            if id(holder) not in seen and not skip(name):
                for key, value in list(holder.items()):
                    if id(value) in swaps:
                        done.append(_rebind_item(holder, key, swaps[id(value)], f"{name}.{key}"))
        elif type(holder) is MethodType:
            _rebind_bound(holder, swaps, to_replacement)
        elif type(holder) is staticmethod:
            wrappers.append(holder)
        elif type(holder) is dict:
            if any(id(value) in swaps for value in list(holder.values())):
                containers.append(holder)
        elif type(holder) is tuple and not _is_operator_entry(holder):
            containers.append(holder)
        seen.add(id(holder))
    if wrappers:
        containers += [holder for holder in gc.get_referrers(*wrappers) if type(holder) is dict]
    if not containers:
        return done
    seen.clear()
    for owner in gc.get_referrers(*containers):
        if id(owner) in seen or skip(_home(owner)):
            continue
        seen.add(id(owner))
        if isinstance(owner, type):
            done += _rebind_class(owner, swaps, to_replacement)
        elif isinstance(owner, FunctionType):
            done += _rebind_defaults(owner, swaps)
    return done


def rebind_values(table: dict[str, Any], swap: Swap, where: str) -> list[Holder]:
    """Replace the values of one dictionary that are the old object.

    Args:
        table: the dictionary, of whose meaning the caller is sure.
        swap: what is replaced, and what by.
        where: dotted name of the dictionary, for the report.
    """
    return [
        _rebind_item(table, key, swap, f"{where}[{key!r}]")
        for key, value in list(table.items())
        if value is swap.old
    ]


def _namespaces() -> dict[int, str]:
    """``id`` of a module's dictionary -> the module's name."""
    return {
        id(vars(module)): name
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
    }


def _is_operator_entry(holder: tuple[Any, ...]) -> bool:
    """Whether this is an entry of ``torch.jit``'s table of builtins, always there: no call site."""
    return len(holder) == 2 and isinstance(holder[1], str) and holder[1].startswith("aten::")


_BOUND = "_mindiesd_bound"
"""Attribute in which an object keeps its own bound methods that were replaced. Not we: it would
live for as long as it is patched."""


def _rebind_bound(method: MethodType, swaps: Mapping[int, Swap], to_replacement: bool) -> None:
    """Replace a bound method where its own object keeps it, or put the one from before back."""
    pair = swaps.get(id(method.__func__))
    if pair is None:
        return
    for place in own_places(method.__self__):
        for key, value in list(place.items()):
            if value is not method:
                continue
            kept: dict[str, MethodType] = place.pop(_BOUND, {})
            if to_replacement:
                place[_BOUND] = {**kept, key: method}
                place[key] = MethodType(pair.new, method.__self__)
                continue
            # Hooks may have moved it to another attribute since.
            at = next((name for name, old in kept.items() if old.__func__ is pair.new), None)
            place[key] = MethodType(pair.new, method.__self__) if at is None else kept.pop(at)
            if kept:
                place[_BOUND] = kept


def own_places(owner: Any) -> list[dict[str, Any]]:
    """The attributes of an object, and of what diffusers' hooks keep for it."""
    held = getattr(owner, "__dict__", None)
    if type(held) is not dict:
        return []
    registry = held.get("_diffusers_hook")
    return [held, *(vars(reference) for reference in getattr(registry, "_fn_refs", ()))]


def _rebind_item(namespace: dict[str, Any], key: str, swap: Swap, where: str) -> Holder:
    namespace[key] = swap.new
    return Holder(
        where,
        id(swap.old),
        swap.old,
        swap.new,
        functools.partial(namespace.get, key),
        functools.partial(namespace.__setitem__, key),
    )


def _rebind_class(owner: type, swaps: Mapping[int, Swap], to_replacement: bool) -> list[Holder]:
    done = []
    for key, raw in list(vars(owner).items()):
        static = isinstance(raw, staticmethod)
        pair = swaps.get(id(raw.__func__ if static else raw))
        if pair is None:
            continue
        old, new = pair
        # Reading a builtin from an instance gives the builtin; reading a Python function gives a
        # bound method, which would pass the instance as the first argument.
        unbound = to_replacement and isinstance(old, BuiltinFunctionType)
        fresh = staticmethod(new) if static or unbound else new
        where = f"{_home(owner)}.{owner.__qualname__}.{key}"
        try:
            setattr(owner, key, fresh)
        except (AttributeError, TypeError):
            continue  # an immutable type; it stays listed as not reached
        done.append(
            Holder(
                where,
                id(old),
                raw,
                fresh,
                functools.partial(vars(owner).get, key),
                functools.partial(setattr, owner, key),
            )
        )
    return done


def _rebind_defaults(owner: FunctionType, swaps: Mapping[int, Swap]) -> list[Holder]:
    done = []
    where = f"{_home(owner)}.{owner.__qualname__}"
    defaults = owner.__defaults__
    if defaults and any(id(value) in swaps for value in defaults):
        fresh = tuple(swaps[id(value)].new if id(value) in swaps else value for value in defaults)
        owner.__defaults__ = fresh
        done.append(
            Holder(
                f"{where} (default value)",
                next(id(value) for value in defaults if id(value) in swaps),
                defaults,
                fresh,
                functools.partial(getattr, owner, "__defaults__"),
                functools.partial(setattr, owner, "__defaults__"),
            )
        )
    keyword_defaults: dict[str, Any] = owner.__kwdefaults__ or {}
    for key, value in list(keyword_defaults.items()):
        if id(value) in swaps:
            done.append(
                _rebind_item(keyword_defaults, key, swaps[id(value)], f"{where} (default of {key})")
            )
    return done


def describe_holders(
    originals: Mapping[str, Any], skip: Callable[[str], bool]
) -> dict[str, list[str]]:
    """Where originals are still held in a way that :func:`rebind` leaves alone.

    Instance attributes, closures, ``functools.partial`` objects and containers of modules are
    named; references in modules that ``skip`` accepts are not listed.

    Args:
        originals: name -> the object that was replaced.
        skip: whether the module of this name is of no interest.

    Returns:
        name -> descriptions, for the names that have any.
    """
    found: dict[str, set[str]] = {}

    def note(values: Iterable[Any], description: str) -> None:
        for name, original in originals.items():
            if any(value is original for value in values):
                found.setdefault(name, set()).add(description)

    def note_attributes(owner: Any) -> None:
        kind = type(owner)
        held = getattr(owner, "__dict__", None)
        if type(held) is not dict or isinstance(owner, FunctionType) or skip(_home(kind)):
            return
        for key, value in list(held.items()):
            note([value], f"attribute {key!r} of a {_home(kind)}.{kind.__qualname__}")

    modules = _namespaces()
    containers: dict[int, Any] = {}
    for holder in gc.get_referrers(*originals.values()):
        if holder is originals or id(holder) in modules:
            continue
        if isinstance(holder, functools.partial):
            note([holder.func, *holder.args], "a functools.partial object")
        elif type(holder) is MethodType:
            places = own_places(holder.__self__)
            if not any(old is holder for held in places for old in held.get(_BOUND, {}).values()):
                kind = type(holder.__self__)
                note([holder.__func__], f"a bound method of a {_home(kind)}.{kind.__qualname__}")
        elif type(holder) in (dict, list, set, CellType):
            containers[id(holder)] = holder
        else:  # an instance whose attributes have no dictionary of their own yet
            note_attributes(holder)
    if not containers:
        return {}
    tuples: dict[int, CellType] = {}
    owners = gc.get_referrers(*containers.values())
    for owner in owners:
        if type(owner) is dict and id(owner) in modules:
            for key, value in list(owner.items()):
                if id(value) in containers and not skip(modules[id(owner)]):
                    note(_items(value), f"a container at {modules[id(owner)]}.{key}")
        elif type(owner) is tuple:
            tuples |= {id(owner): cell for cell in owner if type(cell) is CellType}
        elif not isinstance(owner, (type, ModuleType, FunctionType)):
            note_attributes(owner)
    if tuples:
        for owner in gc.get_referrers(*[owner for owner in owners if id(owner) in tuples]):
            # By its globals: our replacements are dressed in the original's name and module.
            home = (
                owner.__globals__.get("__name__", "") if isinstance(owner, FunctionType) else None
            )
            if isinstance(owner, FunctionType) and not skip(str(home)):
                cells = zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True)
                note(
                    [
                        cell.cell_contents
                        for name, cell in cells
                        # What stands in an original's place has its globals, but our code or names.
                        if id(cell) in containers
                        and not name.startswith("_mindiesd_")
                        and not owner.__code__.co_filename.startswith(_PACKAGE)
                    ],
                    f"the closure of {_home(owner)}.{owner.__qualname__}",
                )
    return {name: sorted(places) for name, places in found.items()}


_PACKAGE = str(Path(__file__).resolve().parent.parent)


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _home(value: Any) -> str:
    # A class may define __module__ as anything, a property for one.
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else ""
