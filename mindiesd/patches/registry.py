"""The patch record: one redirect as data.

Documentation, ``mindiesd-run --list`` and the report are generated from these records, and the
engine installs them without knowing what they do. Reading the registry imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

from mindiesd.errors import ParametersInvalid

# One module per family of targets; each holds a tuple called RECORDS.
FAMILIES = (
    "sdpa",
    "rms_norm",
    "layer_norm",
    "channel_norm",
    "ada_norm",
    "modulation",
    "activation",
    "rope",
    "inline_rope",
    "tables",
)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One existing function or method that is redirected.

    Attributes:
        name: what ``only=`` and ``skip=`` call it; unique.
        family: the group it belongs to, also accepted by ``only=`` and ``skip=``.
        module: dotted name of the module that defines the target.
        attribute: dotted path of the target in that module.
        after: module whose import must be complete before the target may be touched. A package's
            submodule is often imported in the middle of the package's own import.
        becomes: the public function of ``mindiesd.ops`` that calls are redirected to.
        build: ``"module:function"``; called with the original and a ``Site``, returns the
            replacement, a plain Python function.
        why: what is gained, in one sentence.
        when: which calls are redirected; every other call goes to the original.
        numerics: how the result relates to the original's.
        requires: distribution name -> version range in which the target is known.
        parameters: the parameter names the target must have, or the record is skipped. ``None``
            for a builtin, which has no signature to compare.
        keep_in: modules whose own reference to the target is left alone by the identity sweep.
    """

    name: str
    family: str
    module: str
    attribute: str
    after: str
    becomes: str
    build: str
    why: str
    when: str
    numerics: str
    requires: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    parameters: tuple[str, ...] | None = None
    keep_in: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The target as people write it, e.g. ``torch.nn.functional.rms_norm``."""
        return f"{self.module}.{self.attribute}"


class Left(NamedTuple):
    """A target that was looked at and is left alone; families list theirs in a tuple ``LEFT``.

    Attributes:
        target: dotted name.
        reason: why nothing is gained, or nothing can be proved.
    """

    target: str
    reason: str


def left() -> dict[str, tuple[Left, ...]]:
    """By family, what was looked at and is left alone."""
    found = {
        family: getattr(import_module(f"mindiesd.patches.{family}"), "LEFT", ())
        for family in FAMILIES
    }
    return {family: targets for family, targets in found.items() if targets}


@cache
def records() -> tuple[Patch, ...]:
    """All records, in the order in which they are installed and listed."""
    found: list[Patch] = []
    for family in FAMILIES:
        found.extend(import_module(f"mindiesd.patches.{family}").RECORDS)
    return tuple(found)


def names() -> tuple[str, ...]:
    """Every word that ``only=`` and ``skip=`` understand: record names, then families."""
    every = [record.name for record in records()]
    return tuple(dict.fromkeys([*every, *FAMILIES]))


def select(
    only: str | Iterable[str] | None = None, skip: str | Iterable[str] | None = None
) -> tuple[Patch, ...]:
    """The records that ``only`` and ``skip`` leave, in registry order.

    Args:
        only: record or family names to keep; ``None`` keeps all.
        skip: record or family names to leave out.

    Raises:
        ParametersInvalid: a name is neither a record nor a family.
    """
    wanted = _words("only", only)
    unwanted = _words("skip", skip) or frozenset()
    return tuple(
        record
        for record in records()
        if (wanted is None or wanted & {record.name, record.family})
        and not unwanted & {record.name, record.family}
    )


def _words(argument: str, value: str | Iterable[str] | None) -> frozenset[str] | None:
    if value is None:
        return None
    words = [value] if isinstance(value, str) else list(value)
    split = frozenset(part.strip() for word in words for part in word.split(",") if part.strip())
    for word in sorted(split):
        if word not in names():
            raise ParametersInvalid(argument, word, "any of " + ", ".join(names()))
    return split
