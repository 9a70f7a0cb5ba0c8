"""Patch records for rewritten functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mindiesd.patches.registry import INSIDE, Patch
from mindiesd.patches.rewriting.rules import Kind, Rewrite
from mindiesd.patches.scope import Site

# Sources are compared, so a version that was not tested is no risk; it is a record skipped with a
# reason of its own.
VERSIONS = MappingProxyType({"diffusers": ">=0.35,<0.44", "transformers": ">=4.51,<6"})


def name_of(rule: Rewrite) -> str:
    """The name of a rule's record: ``flux.FluxTransformerBlock`` for its forward or call."""
    stem = rule.module.rpartition(".")[2].removeprefix("transformer_").removeprefix("modeling_")
    stem = re.sub(r"_transformer(_[0-9]d)?$", "", stem)
    return f"{stem}.{rule.qualname.removesuffix('.forward').removesuffix('.__call__')}"


def rows(
    table: str, kinds: Mapping[str, Kind], home: Callable[[str], str], method: str = ""
) -> Iterator[Rewrite]:
    """The rules of a table whose lines are a module, a function, and counts such as ``n2``.

    Args:
        table: the lines; empty ones are none.
        kinds: what the letters of the counts mean, in the order in which they are looked for.
        home: the dotted name of a module as the table has it.
        method: what follows each function's name.
    """
    for line in filter(None, table.splitlines()):
        module, qualname, *counts = line.split()
        by_letter = {count[0]: int(count[1:]) for count in counts}
        yield Rewrite(
            module=home(module),
            qualname=qualname + method,
            counts={kind: by_letter[key] for key, kind in kinds.items() if key in by_letter},
        )


def _versions(rule: Rewrite) -> MappingProxyType[str, str]:
    library = rule.module.partition(".")[0]
    return MappingProxyType({library: VERSIONS[library]})


def records(
    rules: Iterable[Rewrite],
    *,
    family: str,
    becomes: str | Callable[[Rewrite], str],
    why: str,
    when: str,
    numerics: str,
) -> tuple[tuple[Patch, ...], dict[str, Rewrite]]:
    """One record for each rule, and the rules by the names of their records.

    Args:
        rules: what is redirected.
        family: of the records; a module of this package of that name has the ``build``.
        becomes: as in :class:`Patch`, or what says it of a rule.
        why: as in :class:`Patch`.
        when: as in :class:`Patch`.
        numerics: as in :class:`Patch`.
    """
    by_name = {name_of(rule): rule for rule in rules}
    return (
        tuple(
            Patch(
                name=name,
                family=family,
                module=rule.module,
                attribute=rule.qualname,
                after=rule.module,
                becomes=becomes if isinstance(becomes, str) else becomes(rule),
                build=f"mindiesd.patches.{family}:build",
                reference=INSIDE,
                why=why,
                when=when,
                numerics=numerics,
                requires=_versions(rule),
                # The whole source is compared, the signature with it.
                parameters=(),
            )
            for name, rule in by_name.items()
        ),
        by_name,
    )


def builder(rules: dict[str, Rewrite]) -> Callable[[Any, Site], Callable[..., Any]]:
    """The ``build`` of a family of rewritten functions."""

    def build(original: Any, site: Site) -> Callable[..., Any]:
        """The stand-in of the function that the site's record names."""
        from mindiesd.patches.rewriting.stub import stand_in

        return stand_in(original, rules[site.name], site)

    return build
