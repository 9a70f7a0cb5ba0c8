"""The replacements, by the parameters of what they replace.

Each asks whether it is in force, reads the tables, has the call counted and turns, or calls the
original with what it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

from torch import Tensor

from mindiesd.patches import law
from mindiesd.patches.rope.family import Family
from mindiesd.patches.rope.rotation import Rotation
from mindiesd.patches.scope import Site

REAL_TABLE = "real tables, which no model passes to this function"


def _reason(*found: Any) -> str | None:
    """The first reason among what was read."""
    for one in found:
        if isinstance(one, str):
            return one
    return None


def one(family: Family, original: FunctionType, site: Site, steps: Rotation) -> Callable[..., Any]:
    """(x, table), whatever they are called."""
    read, turn, _ = steps
    pair = family.sources == 2

    def rotary(x: Any, table: Any) -> Any:
        if site.everywhere or site.in_force():
            found: Any
            if not pair:
                found = read(x, (table,))
            elif type(table) in (tuple, list) and len(table) == 2:
                found = read(x, table)
            else:
                found = law.UNUSUAL_ARGUMENT
            if site.takes(_reason(found)):
                return turn(x, found)
        return original(x, table)

    return named_as(cast(FunctionType, rotary), original)


def both(family: Family, original: FunctionType, site: Site, steps: Rotation) -> Callable[..., Any]:
    """Query and key at once, with one table argument."""
    read, turn, _ = steps
    pair = family.sources == 2

    def rotary(xq: Any, xk: Any, freqs_cis: Any) -> Any:
        if site.everywhere or site.in_force():
            sources = freqs_cis if pair else (freqs_cis,)
            of_query: Any
            of_key: Any
            if type(sources) not in (tuple, list) or len(sources) != family.sources:
                of_query = of_key = law.UNUSUAL_ARGUMENT
            else:
                of_query, of_key = read(xq, sources), read(xk, sources)
            if site.takes(_reason(of_query, of_key)):
                return turn(xq, of_query), turn(xk, of_key)
        return original(xq, xk, freqs_cis)

    return rotary


def complex_or_real(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """Qwen-Image's copy of the shared helper; its real branch has no caller."""
    read, turn, _ = steps

    def rotary(
        x: Tensor,
        freqs_cis: Any,
        use_real: bool = True,
        use_real_unbind_dim: int = -1,
    ) -> Any:
        if site.everywhere or site.in_force():
            found: Any = REAL_TABLE if use_real else read(x, (freqs_cis,))
            if site.takes(_reason(found)):
                return turn(x, found)
        return original(x, freqs_cis, use_real, use_real_unbind_dim)

    return rotary


def three(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """One tensor, cos and sin."""
    read, turn, _ = steps

    def rotary(hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if site.everywhere or site.in_force():
            found: Any = read(hidden_states, (cos, sin))
            if site.takes(_reason(found)):
                return turn(hidden_states, found)
        return original(hidden_states, cos, sin)

    return rotary


def unsqueezed(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """One tensor, cos and sin, and where they get a dimension."""
    read, turn, _ = steps

    def rotary(hidden_states: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if site.everywhere or site.in_force():
            found: Any = law.UNUSUAL_ARGUMENT
            if type(unsqueeze_dim) is int:
                found = read(hidden_states, (cos, sin), unsqueeze_dim)
            if site.takes(_reason(found)):
                return turn(hidden_states, found)
        return original(hidden_states, cos, sin, unsqueeze_dim)

    return rotary


def both_unsqueezed(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """Query, key, cos and sin, and where those get a dimension: transformers' text models.

    Before version 5 they take ``position_ids`` too, and do not look at them.
    """
    read, turn, _ = steps

    def rotary_with_ids(
        q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: Any = 1
    ) -> Any:
        if site.everywhere or site.in_force():
            of_query: Any = law.UNUSUAL_ARGUMENT
            of_key: Any = of_query
            if position_ids is None and type(unsqueeze_dim) is int:
                tables = (cos, sin)
                of_query, of_key = read(q, tables, unsqueeze_dim), read(k, tables, unsqueeze_dim)
            if site.takes(_reason(of_query, of_key)):
                return turn(q, of_query), turn(k, of_key)
        return original(q, k, cos, sin, position_ids, unsqueeze_dim)

    if "position_ids" in inspect.signature(original).parameters:
        return rotary_with_ids

    def rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
        if site.everywhere or site.in_force():
            of_query: Any = law.UNUSUAL_ARGUMENT
            of_key: Any = of_query
            if type(unsqueeze_dim) is int:
                tables = (cos, sin)
                of_query, of_key = read(q, tables, unsqueeze_dim), read(k, tables, unsqueeze_dim)
            if site.takes(_reason(of_query, of_key)):
                return turn(q, of_query), turn(k, of_key)
        return original(q, k, cos, sin, unsqueeze_dim)

    return rotary


def both_with_pair(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """Query, key, cos and sin: transformers' vision towers."""
    read, turn, _ = steps

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if site.everywhere or site.in_force():
            tables = (cos, sin)
            of_query: Any = read(q, tables)
            of_key: Any = read(k, tables)
            if site.takes(_reason(of_query, of_key)):
                return turn(q, of_query), turn(k, of_key)
        return original(q, k, cos, sin)

    return rotary


def with_positions(
    family: Family, original: FunctionType, site: Site, steps: Rotation
) -> Callable[..., Any]:
    """One tensor, a pair of tables an axis, and the positions along each axis."""
    read, turn, _ = steps

    def rotary(x: Tensor, freqs_cis: Any, positions: Any) -> Any:
        if site.everywhere or site.in_force():
            found: Any = law.UNUSUAL_ARGUMENT
            if (
                type(freqs_cis) in (tuple, list)
                and type(positions) in (tuple, list)
                and len(freqs_cis) == len(positions) == 3
                and all(type(axis) in (tuple, list) and len(axis) == 2 for axis in freqs_cis)
            ):
                time, height, width = freqs_cis
                found = read(x, (*time, *height, *width, *positions))
            if site.takes(_reason(found)):
                return turn(x, found)
        return original(x, freqs_cis, positions)

    return rotary


def named_as(function: FunctionType, original: FunctionType) -> FunctionType:
    """``function`` with its parameters called as the original's are, as many and in this order.

    Models call some of these by keyword, and a dozen functions differ in nothing else. The names of
    a function's parameters are the first local names of its code.
    """
    code, theirs = function.__code__, original.__code__
    names = theirs.co_varnames[: theirs.co_argcount]
    rest = code.co_varnames[code.co_argcount :]
    if len(names) != code.co_argcount or set(names) & {*rest, *code.co_freevars}:
        raise law.SignatureChanged(f"has the parameters {', '.join(names)}")
    function.__code__ = code.replace(co_varnames=(*names, *rest))
    function.__annotations__ = {}
    return function
