"""Patch records for rewritten functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

from mindiesd.patches.registry import Patch
from mindiesd.patches.rewriting.rules import Rewrite
from mindiesd.patches.scope import Site

# Sources are compared, so a version that was not tested is no risk; it is a record skipped with a
# reason of its own.
VERSIONS = MappingProxyType({"diffusers": ">=0.35,<0.44"})


def name_of(rule: Rewrite, suffix: str) -> str:
    """The name of a rule's record: module, class and suffix, as ``wan_transformer_block_gates``.

    The module is left out where the class's name starts with it.
    """
    owner = rule.qualname.split(".")[0]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])", "_", owner).lower()
    family = rule.module.rpartition(".")[2].removeprefix("transformer_").partition("_trans")[0]
    plain = words.replace("_", "")
    if not plain.startswith(family.replace("_", "")):
        words = f"{family}_{words}"
    return f"{words}_{suffix}"


def records(
    rules: Iterable[Rewrite],
    *,
    family: str,
    suffix: str,
    becomes: str,
    why: str,
    when: str,
    numerics: str,
) -> tuple[tuple[Patch, ...], dict[str, Rewrite]]:
    """One record for each rule, and the rules by the names of their records."""
    by_name = {name_of(rule, suffix): rule for rule in rules}
    return (
        tuple(
            Patch(
                name=name,
                family=family,
                module=rule.module,
                attribute=rule.qualname,
                after=rule.module,
                becomes=becomes,
                build=f"mindiesd.patches.{family}:build",
                why=why,
                when=when,
                numerics=numerics,
                requires=VERSIONS,
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
