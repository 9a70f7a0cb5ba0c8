"""Finding and rebinding every place that holds a function that was replaced.

``from torch.nn.functional import scaled_dot_product_attention`` copies the function into another
module, a class body may keep it as an attribute, a ``def`` as a default value. Setting the
attribute where the function lives reaches none of these, so they are found by identity. Three kinds
are rebound, each the way Python looks it up; containers, closures and instances are left alone and
described, because what they mean is the owner's business.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Holder:
    """One place that held an object and was given another.

    Attributes:
        where: dotted description for the report.
        found: the replaced objects it held; a tuple of default values may hold several.
        old: what it held.
        new: what it was given.
        read: returns what it holds now.
        write: makes it hold something.
    """

    where: str
    found: tuple[Any, ...]
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


def rebind(
    replacements: Mapping[int, tuple[Any, Any]],
    skip: Callable[[str], bool],
    to_replacement: bool = True,
) -> list[Holder]:
    """Rebind every module name, class attribute and default value that holds a replaced object.

    Args:
        replacements: ``id(old) -> (old, new)``.
        skip: whether the module of this name is to be left alone.
        to_replacement: ``new`` is a plain function that stands in for ``old``; in a class body it
            is wrapped in ``staticmethod`` where ``old`` was not one that binds.

    Returns:
        What was rebound, in order.
    """
    done: list[Holder] = []
    namespaces: set[int] = set()
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(module, ModuleType) or type(namespace) is not dict:
            continue
        if id(namespace) in namespaces:
            continue
        namespaces.add(id(namespace))
        if skip(name):
            continue
        for key, value in list(namespace.items()):
            pair = replacements.get(id(value))
            if pair is not None:
                done.append(_rebind_item(namespace, key, pair, f"{name}.{key}"))
    done += _rebind_deep(replacements, namespaces, skip, to_replacement)
    return done


def _rebind_item(namespace: dict[str, Any], key: str, pair: tuple[Any, Any], where: str) -> Holder:
    old, new = pair
    namespace[key] = new
    return Holder(
        where,
        (old,),
        old,
        new,
        functools.partial(namespace.get, key),
        functools.partial(namespace.__setitem__, key),
    )


def _rebind_deep(
    replacements: Mapping[int, tuple[Any, Any]],
    namespaces: set[int],
    skip: Callable[[str], bool],
    to_replacement: bool,
) -> list[Holder]:
    """Class attributes and default values; found through the garbage collector, in C."""
    objects = [old for old, _ in replacements.values()]
    first = [r for r in gc.get_referrers(*objects) if id(r) not in namespaces and r is not objects]
    wrappers = [r for r in first if isinstance(r, staticmethod)]
    if wrappers:
        first += [r for r in gc.get_referrers(*wrappers) if isinstance(r, dict)]
    containers = [r for r in first if type(r) in (dict, tuple)]
    if not containers:
        return []
    done: list[Holder] = []
    seen: set[int] = set()
    for owner in gc.get_referrers(*containers):
        if id(owner) in seen or skip(_home(owner)):
            continue
        seen.add(id(owner))
        if isinstance(owner, type):
            done += _rebind_class(owner, replacements, to_replacement)
        elif isinstance(owner, FunctionType):
            done += _rebind_defaults(owner, replacements)
    return done


def _rebind_class(
    owner: type, replacements: Mapping[int, tuple[Any, Any]], to_replacement: bool
) -> list[Holder]:
    done = []
    for key, raw in list(vars(owner).items()):
        static = isinstance(raw, staticmethod)
        pair = replacements.get(id(raw.__func__ if static else raw))
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
                (old,),
                raw,
                fresh,
                functools.partial(vars(owner).get, key),
                functools.partial(setattr, owner, key),
            )
        )
    return done


def _rebind_defaults(
    owner: FunctionType, replacements: Mapping[int, tuple[Any, Any]]
) -> list[Holder]:
    done = []
    where = f"{_home(owner)}.{owner.__qualname__}"
    defaults = owner.__defaults__
    if defaults and any(id(value) in replacements for value in defaults):
        fresh = tuple(
            replacements[id(value)][1] if id(value) in replacements else value for value in defaults
        )
        owner.__defaults__ = fresh
        done.append(
            Holder(
                f"{where} (default value)",
                tuple(value for value in defaults if id(value) in replacements),
                defaults,
                fresh,
                functools.partial(getattr, owner, "__defaults__"),
                functools.partial(setattr, owner, "__defaults__"),
            )
        )
    keyword_defaults: dict[str, Any] = owner.__kwdefaults__ or {}
    for key, value in list(keyword_defaults.items()):
        if id(value) in replacements:
            done.append(
                _rebind_item(
                    keyword_defaults, key, replacements[id(value)], f"{where} (default of {key})"
                )
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

    modules = {
        id(vars(module)): name
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
    }
    containers: dict[int, Any] = {}
    for holder in gc.get_referrers(*originals.values()):
        if holder is originals or id(holder) in modules:
            continue
        if isinstance(holder, functools.partial):
            note([holder.func, *holder.args], "a functools.partial object")
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
                cells = owner.__closure__ or ()
                note(
                    [cell.cell_contents for cell in cells if id(cell) in containers],
                    f"the closure of {_home(owner)}.{owner.__qualname__}",
                )
    return {name: sorted(places) for name, places in found.items()}


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _home(value: Any) -> str:
    # A class may define __module__ as anything, a property for one.
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else ""
