"""The patch record: one redirect as data.

Documentation, ``mindiesd-run --list`` and the report are generated from these records, and the
engine installs them without knowing what they do. Reading the registry imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from mindiesd.errors import ParametersInvalid

# One module per family of targets; each holds a tuple called RECORDS.
FAMILIES = (
    "sdpa",
    "composed_attention",
    "rms_norm",
    "layer_norm",
    "channel_norm",
    "group_norm",
    "sequential",
    "ada_norm",
    "modulation",
    "conditioning",
    "activation",
    "rope",
    "inline_rope",
    "tables",
    "attention_backend",
    "construction",
    "flash_attn",
    "xformers",
    "sageattention",
    "sparse",
)
# Families whose records are in a module that they share.
_SHARED = dict.fromkeys(("flash_attn", "xformers", "sageattention"), "front_doors.records")

INSIDE = "inside"
"""``Patch.reference`` of a replacement that has its parts verified, not the whole call."""

NOT_COMPARED = "not compared"
"""``Patch.reference`` where nothing can be compared: the original cannot run here, is what is being
put right, or is approximated on request. Calls that it leads to are verified themselves."""


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
        reference: ``"module:function"`` that gives ``verify=N`` its float64 result, see
            :func:`mindiesd.patches.verify.watch`; empty: the original, called with float64
            arguments; :data:`INSIDE`: the replacement verifies its parts itself;
            :data:`NOT_COMPARED`: calls are not verified.
        tables: ``"module:attribute"`` of dictionaries whose values are called in the target's
            place; those that are the target are replaced too.
        also: ``(module, attribute)`` of further targets that belong to this one and are redirected
            by the same ``build``.
        provides: top-level packages. Where none of them is installed there is nothing to redirect;
            then they are provided to the user's own code, see :mod:`mindiesd.patches.front_doors`.
        contents: ``"module:function"``; called with a ``Site``, returns the attributes of each
            module of the provided packages.
        mends: distribution name -> the versions whose fault the record puts right. With others
            there is nothing to do, and it is left out unless ``only=`` names it or its family.
        by_name_only: whether the record is left out unless ``only=`` names it.
        option: the option of ``patch_all`` that must be given for this patch to be selected; empty
            for none.
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
    reference: str = ""
    tables: tuple[str, ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    provides: tuple[str, ...] = ()
    contents: str = ""
    mends: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    by_name_only: bool = False
    option: str = ""

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
    found = {family: getattr(_home(family), "LEFT", ()) for family in FAMILIES}
    return {family: targets for family, targets in found.items() if targets}


def _home(family: str) -> ModuleType:
    """The module that holds a family's records."""
    return import_module(f"mindiesd.patches.{_SHARED.get(family, family)}")


@cache
def records() -> tuple[Patch, ...]:
    """All records, in the order in which they are installed and listed."""
    found: list[Patch] = []
    for family in FAMILIES:
        found.extend(record for record in _home(family).RECORDS if record.family == family)
    return tuple(found)


def names() -> tuple[str, ...]:
    """Every word that ``only=`` and ``skip=`` understand: record names, then families."""
    every = [record.name for record in records()]
    return tuple(dict.fromkeys([*every, *FAMILIES]))


def select(
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    options: Iterable[str] = (),
) -> tuple[Patch, ...]:
    """The records that ``only`` and ``skip`` leave, in registry order.

    Args:
        only: record or family names to keep; ``None`` keeps all.
        skip: record or family names to leave out.
        options: which of the options are given that some records need.

    Raises:
        ParametersInvalid: a name is neither a record nor a family, or ``only`` names one that needs
            an option which is not given.
    """
    wanted = words("only", only)
    for record in records():
        named = wanted is not None and wanted & {record.name, record.family}
        if named and record.option not in ("", *options):
            raise ParametersInvalid(
                "only", record.name, f"patches that are in force without {record.option}="
            )
    unwanted = words("skip", skip) or frozenset()
    return tuple(
        record
        for record in records()
        if record.option in ("", *options)
        and (
            not record.by_name_only
            if wanted is None
            else record.option
            or wanted & {record.name, "" if record.by_name_only else record.family}
        )
        and not unwanted & {record.name, record.family}
    )


def words(argument: str, value: str | Iterable[str] | None) -> frozenset[str] | None:
    """The names in ``only`` or ``skip``, or None.

    Raises:
        ParametersInvalid: a name is neither a record nor a family.
    """
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else list(value)
    split = frozenset(part.strip() for word in texts for part in word.split(",") if part.strip())
    for word in sorted(split):
        if word not in names():
            raise ParametersInvalid(argument, word, "any of " + ", ".join(names()))
    return split
