"""What is redirected inside a function, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A kind of expression that is redirected.

    Attributes:
        name: of the kind; also of the functions made of its matches, as tracebacks show them.
        spellings: the patterns that mean it, see :mod:`.pattern`; the first that fits is taken.
        holes: the holes in the order of the parameters of the original and its replacement.
        calls: holes in which anything may stand; in the others, only what changes nothing when
            evaluated, for the arithmetic between is done later than in the source.
        members: holes in which an attribute of ``self`` must stand.
        named: of some of these, as (hole, names), which attributes they may be.
        build: ``"module:function"``, called with the original and a ``Site``; returns the
            replacement. The original evaluates the expression as it stands in the source.
        joins: nodes of the pattern that may have been given a name in a statement before, as
            patterns: ``NORM(X)`` lets ``y = self.norm(x)`` and ``y * (1 + s) + t`` match together
            if ``y`` is used for nothing else. Where ``y`` is assigned in the branches of a
            condition, what follows the condition is moved into them.
    """

    name: str
    spellings: tuple[str, ...]
    holes: tuple[str, ...]
    build: str
    calls: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    named: tuple[tuple[str, tuple[str, ...]], ...] = ()
    joins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statements:
    """A kind of consecutive statements that are redirected together.

    They become one assignment, to the name that the last of them assigns; every other name that
    they assign must be used for nothing else in the function.

    Attributes:
        name: of the kind; also of the functions made of its matches, as tracebacks show them.
        spellings: the patterns that mean it, several statements each, see :mod:`.pattern`; the
            first that fits is taken. All of them are assignments.
        holes: what the statements read, in the order of the parameters of the original and its
            replacement. Only what changes nothing when evaluated may stand there.
        build: ``"module:function"``, called with the original and a ``Site``; returns the
            replacement. The original runs the statements as they stand in the source.
        reference: ``"module:function"`` that gives ``verify=N`` its float64 result from the same
            arguments, see :func:`mindiesd.patches.verify.watch`; empty: the original.
    """

    name: str
    spellings: tuple[str, ...]
    holes: tuple[str, ...]
    build: str
    reference: str = ""


@dataclass(frozen=True, kw_only=True)
class Nested:
    """A nested function that is redirected.

    Attributes:
        name: of the function.
        prints: fingerprints (:func:`.pattern.fingerprint`) of the definitions that are known.
        build: ``"module:function"``, called with the original and a ``Site``; returns the
            replacement. The function must not use variables of the function around it.
    """

    name: str
    prints: tuple[str, ...]
    build: str


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A function that is redirected as a whole, if its source is a known one.

    Attributes:
        name: of the kind.
        prints: fingerprints (:func:`.pattern.fingerprint`) of the definitions that are known.
        build: ``"module:function"``, called with the original and a ``Site``; returns the
            replacement.
    """

    name: str
    prints: tuple[str, ...]
    build: str


Kind = Expression | Statements | Nested | Whole
"""What is redirected in a function."""


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One function and what is redirected inside it.

    Attributes:
        module: dotted name of the module that defines it.
        qualname: dotted path in that module.
        counts: how often each kind must be found, neither more nor less. What a kind of higher
            rank has taken is not offered to the next.
    """

    module: str
    qualname: str
    counts: Mapping[Kind, int] = field(default_factory=lambda: MappingProxyType({}))
