"""Wrappers take and pass on what the wrapped function takes, however it is called."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindiesd.patches import faults, verify
from mindiesd.patches.wrapper import Template, alike

PASSING = Template.here(
    """\
def make(_wrapped, _original, _seen):
    def passing({parameters}):
        _seen.append((({given}), {{{named}}}))
        return _wrapped({arguments}), _original({originals})
    return passing
"""
)


def plain(a, b):
    return a, b


def optional(a, b=2, c=3):
    return a, b, c


def by_keyword(a, *, b, c=3):
    return a, b, c


def positional(a, b=2, /, c=3):
    return a, b, c


def any_number(a, *more, b=2):
    return a, more, b


def others(a, b=2, **others):
    return a, b, others


CALLS = (
    (plain, (1, 2), {}),
    (plain, (1,), {"b": 5}),
    (optional, (1,), {}),
    (optional, (1, 5), {}),
    (optional, (), {"a": 1, "c": 5}),
    (by_keyword, (1,), {"b": 5}),
    (by_keyword, (), {"a": 1, "b": 5, "c": 6}),
    (positional, (1,), {}),
    (positional, (1, 5), {"c": 6}),
    (any_number, (1,), {}),
    (any_number, (1, 5, 6), {"b": 7}),
    (others, (1,), {"x": 5}),
    (others, (1, 5), {"x": 6, "y": 7}),
)


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS)
def test_what_is_passed_on(function: Any, args: Any, kwargs: Any) -> None:
    seen: list[Any] = []
    wrapper = PASSING.around(function, function, function, seen)
    expected = function(*args, **kwargs)
    assert wrapper(*args, **kwargs) == (expected, expected)
    ((given, named),) = seen
    assert function(*given, **named) == expected
    assert inspect.signature(wrapper) == inspect.signature(function)
    assert wrapper.__name__ == function.__name__
    assert alike(function, function)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (plain, (1,), {}),
        (plain, (1, 2, 3), {}),
        (plain, (1, 2), {"b": 3}),
        (optional, (), {}),
        (optional, (1,), {"x": 2}),
        (by_keyword, (1, 2), {}),
        (by_keyword, (1,), {}),
        (positional, (), {"a": 1}),
        (positional, (1,), {"b": 1}),
        (any_number, (), {"b": 2}),
        (any_number, (1,), {"x": 2}),
        (others, (), {"x": 2}),
    ],
)
def test_what_is_refused(function: Any, args: Any, kwargs: Any) -> None:
    wrapper = PASSING.around(function, function, function, [])
    for refusing in (function, wrapper):
        with pytest.raises(TypeError, match=function.__name__):
            refusing(*args, **kwargs)


@pytest.mark.parametrize("template", [PASSING, faults._GUARDED, verify._WATCHED])
def test_a_template_knows_its_line(template: Template) -> None:
    lines = Path(template.file).read_text(encoding="utf-8").splitlines()
    text = template.text.splitlines()
    assert lines[template.line - 1 : template.line - 1 + len(text)] == text


def test_errors_name_the_line_of_the_template() -> None:
    def broken(a):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        PASSING.around(broken, broken, broken, [])(1)
    called = PASSING.line + 3
    assert (__file__, called) in [(str(one.path), one.lineno + 1) for one in caught.traceback]


def test_alike() -> None:
    def named(a, c, b=2):
        return a, c, b

    def renamed(x, y=2, z=3):
        return x, y, z

    def fewer(a):
        return a

    takes_all = SimpleNamespace(f=lambda *args, **kwargs: None).f
    assert alike(plain, lambda x, y: None)
    assert not alike(plain, fewer)
    assert not alike(optional, fewer)
    assert not alike(optional, renamed)
    assert not alike(by_keyword, fewer)
    assert not alike(optional, positional)
    assert alike(optional, takes_all) and alike(by_keyword, takes_all)
    assert not alike(named, plain)
    assert not alike(any_number, fewer)
