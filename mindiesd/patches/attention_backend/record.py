"""The records of this family, without what all of them have in common."""

from __future__ import annotations

from collections.abc import Mapping

from mindiesd.patches.registry import NOT_COMPARED, Patch


def record(
    name: str,
    target: tuple[str, str],
    build: str,
    *,
    why: str,
    when: str,
    numerics: str,
    requires: Mapping[str, str],
    parameters: tuple[str, ...],
    after: str = "",
    becomes: str = "mindiesd.attention_forward",
    tables: tuple[str, ...] = (),
) -> Patch:
    """A way to choose attention that leads to SDPA; SDPA's own patch is what is verified.

    Args:
        name: as of :class:`Patch`, and so are the others.
        target: module and attribute.
        build: likewise.
        why: likewise.
        when: likewise.
        numerics: likewise.
        requires: likewise.
        parameters: likewise.
        after: likewise; the target's module by default.
        becomes: likewise.
        tables: likewise.
    """
    module, attribute = target
    return Patch(
        name=name,
        family="attention_backend",
        module=module,
        attribute=attribute,
        after=after or module,
        becomes=becomes,
        build=build,
        reference=NOT_COMPARED,
        why=why,
        when=when,
        numerics=numerics,
        requires=requires,
        parameters=parameters,
        tables=tables,
    )
