"""The mechanism that redirects expressions and nested functions, on functions written for it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import linecache
import pickle
import traceback

import pytest
import torch

from mindiesd import PatchError
from mindiesd.patches import law
from mindiesd.patches.ledger import Ledger
from mindiesd.patches.rewriting import pattern
from mindiesd.patches.rewriting.rewrite import rewrite
from mindiesd.patches.rewriting.rules import Expression, Nested, Rewrite, Statements
from mindiesd.patches.rewriting.source import SourceUnknown
from mindiesd.patches.rewriting.stub import stand_in
from mindiesd.patches.scope import Site
from tests.patches import rewrite_targets as targets

HERE = "tests.patches.rewrite_targets"


def gate(build: str = "build_tagged", **more) -> Expression:
    settings = {
        "name": "gated",
        "spellings": ("X + Y * GATE", "Y * GATE + X"),
        "holes": ("X", "Y", "GATE"),
        "calls": ("X", "Y", "GATE"),
        "joins": ("GATE * Y",),
    }
    return Expression(**settings | {"build": f"{HERE}:{build}"} | more)


def site() -> Site:
    made = Site("test")
    made.arm()
    made.everywhere = True
    return made


def apply(function, count: int = 1, build: str = "build_tagged", kind=None):
    return rewrite(function, {kind or gate(build): count}, site())


@pytest.fixture(autouse=True)
def nothing_seen():
    targets.SEEN.clear()


# What is found, and that nothing else changes.


def test_the_expression_is_redirected_and_the_rest_is_not() -> None:
    made = apply(targets.plain)
    assert made(1.0, 2.0) == 1.0 + 2.0 * 2.0 + 1000 - 0.5
    assert targets.plain(1.0, 2.0) == 4.5


def test_it_looks_like_the_original() -> None:
    made = apply(targets.plain)
    original = targets.plain
    assert inspect.signature(made) == inspect.signature(original)
    for name in ("__defaults__", "__kwdefaults__", "__doc__", "__module__", "__qualname__"):
        assert getattr(made, name) == getattr(original, name)
    assert made.__globals__ is original.__globals__
    for name in ("co_firstlineno", "co_filename", "co_name", "co_varnames", "co_flags"):
        if name != "co_flags":  # it has a closure now
            assert getattr(made.__code__, name) == getattr(original.__code__, name)
    assert inspect.getsource(made) == inspect.getsource(original)


def test_lines_are_those_of_the_file() -> None:
    made = apply(targets.several_lines)
    original = {line for *_, line in targets.several_lines.__code__.co_lines() if line}
    assert {line for *_, line in made.__code__.co_lines() if line} <= original
    assert made(1, 2, 3) == 1007


@pytest.mark.parametrize("name", ["failing", "failing_after"])
def test_a_traceback_names_the_line_that_failed(name: str) -> None:
    def frames(function, arguments) -> list[tuple]:
        with pytest.raises((TypeError, AttributeError)) as caught:
            function(*arguments)
        return [
            (frame.filename, frame.lineno, frame.line, frame.name)
            for frame in traceback.extract_tb(caught.value.__traceback__)
            if frame.name == name
        ]

    original = getattr(targets, name)
    arguments = (1, 2, None) if name == "failing" else (1, 2, 3)
    expected = frames(original, arguments)
    assert expected and frames(apply(original, build="build_noting"), arguments) == expected


def test_a_named_product_is_joined_with_its_only_use() -> None:
    made = apply(targets.joined)
    assert made(1, 2, 3) == 1007
    assert "z" not in made.__code__.co_varnames


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (targets.joined_live, (1, 2, 3)),
        (targets.joined_in_loop, (1, 2, 3)),
        (targets.joined_in_branch, (1, 2, 3, True)),
        (targets.joined_in_branch, (1, 2, 3, False)),
        (targets.joined_reassigned, (1, 2, 3)),
    ],
)
def test_a_product_that_is_used_elsewhere_stays(function, arguments) -> None:
    made = apply(function, count=0)
    assert made(*arguments) == function(*arguments)


@pytest.mark.parametrize("flag", [1, 0])
def test_what_follows_a_condition_is_joined_in_its_branches(flag: int) -> None:
    made = apply(targets.sunk_otherwise)
    joined = 1000 if flag else 0
    assert made(5, 2, 3, flag) == targets.sunk_otherwise(5, 2, 3, flag) + joined
    assert inspect.getsource(made) == inspect.getsource(targets.sunk_otherwise)


def test_a_condition_without_else_gets_one() -> None:
    made = apply(targets.sunk_without_else)
    assert made(5, 2, 3, 1) == 11 + 1000
    assert made(5, 2, 3, 0) == 7
    with pytest.raises(ValueError, match="2"):
        made(5, 2, 3, 2)


@pytest.mark.parametrize("flag", [1, 0])
def test_what_does_not_follow_at_once_stays(flag: int) -> None:
    made = apply(targets.not_sunk, count=0)
    assert made(5, 2, 3, flag) == targets.not_sunk(5, 2, 3, flag)


@pytest.mark.parametrize(("names", "count"), [(("second",), 1), (("first", "third"), 1), ((), 0)])
def test_members_of_other_names_are_left(names: tuple[str, ...], count: int) -> None:
    kind = Expression(
        name="pair",
        spellings=("OUTER(INNER(X))",),
        holes=("OUTER", "INNER", "X"),
        calls=("X",),
        members=("OUTER", "INNER"),
        named=(("OUTER", names),),
        joins=("INNER(X)",),
        build=f"{HERE}:build_tagged",
    )
    made = apply(targets.Named.forward, count, kind=kind)
    module, x = targets.Named(), torch.randn(2, 4)
    plain = targets.Named.forward(module, x)
    assert torch.equal(made(module, x), plain) is (count == 0)


def test_nothing_is_moved_past_a_call_of_unknown_effect() -> None:
    made = apply(targets.joined_across, count=0)
    assert made(1, 2, 3, lambda value: value) == targets.joined_across(1, 2, 3, lambda v: v)


@pytest.mark.parametrize("function", [targets.order, targets.order_turned])
def test_operands_are_evaluated_once_and_in_order(function) -> None:
    def run(called) -> tuple[list[int], int]:
        log: list[int] = []

        def note(value: int) -> int:
            log.append(value)
            return value

        return log, called(note)

    made = apply(function, build="build_noting")
    assert run(made) == run(function)
    assert run(made)[0] == [1, 2, 3]
    assert len(targets.SEEN) == 2


def test_what_a_comprehension_does_is_left_alone() -> None:
    made = apply(targets.comprehension, count=0)
    assert made([1, 2], 3) == targets.comprehension([1, 2], 3)


def test_numbers_and_lists_are_no_operands() -> None:
    for text in ("[1] + [2] * n", "(1,) + (2,) * n", "1 + y * n"):
        found = pattern.match(pattern.parse("X + Y * GATE"), pattern.parse(text))
        assert found is not None
        assert not rewriter_fits(found)


def rewriter_fits(found: pattern.Match) -> bool:
    from mindiesd.patches.rewriting.rewrite import _Expressions

    return _Expressions(gate(), None)._fits(found)


# Consecutive statements.


def statements(build: str = "build_noting", **more) -> Statements:
    settings = {
        "name": "attention",
        "spellings": ("W = X @ Y\nW = torch.softmax(W, dim=-1)\nOUT = W @ Z",),
        "holes": ("X", "Y", "Z"),
        "build": f"{HERE}:{build}",
    }
    return Statements(**settings | more)


def squares() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 3), torch.randn(3, 3)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (targets.run, 1),
        (targets.run_onto_itself, 1),
        (targets.run_in_loops, 2),
        (targets.run_assigned_anew, 1),
    ],
)
def test_statements_are_redirected_together(function, count: int) -> None:
    made = apply(function, count=count, kind=statements())
    x, y = squares()
    assert torch.equal(made(x, y), function(x, y))
    assert targets.SEEN and all(len(operands) == 3 for operands, _ in targets.SEEN)
    tagged = apply(function, count=count, kind=statements("build_tagged"))
    assert not torch.equal(tagged(x, y), function(x, y))
    assert inspect.signature(made) == inspect.signature(function)


def test_their_operands_are_what_they_read() -> None:
    x, y = squares()
    apply(targets.run, kind=statements())(x, y)
    ((one, other, third),) = [operands for operands, _ in targets.SEEN]
    assert one is x and other is y
    assert torch.equal(third, x * 2)


@pytest.mark.parametrize(
    "function",
    [
        targets.run_read_later,
        targets.run_read_in_next_round,
        targets.run_deleted,
        targets.run_added_to,
        targets.run_captured,
        targets.run_global,
        targets.run_over_its_operand,
        targets.run_calling,
        targets.run_of_attributes,
    ],
)
def test_statements_that_cannot_be_taken_apart_stay(function) -> None:
    with pytest.raises(SourceUnknown, match="found 0 times, 1 are known"):
        apply(function, kind=statements())


def test_only_what_fits_as_a_whole() -> None:
    made = apply(targets.run_of_expressions, kind=statements())
    x, y = squares()
    assert torch.equal(made([x, None], y), targets.run_of_expressions([x, None], y))
    (((one, _, third), _),) = targets.SEEN
    assert one is x and third is y


def test_statements_keep_their_lines() -> None:
    made = apply(targets.run, kind=statements("build_locating"))
    lines = {line for *_, line in made.__code__.co_lines() if line}
    assert lines <= {line for *_, line in targets.run.__code__.co_lines() if line}
    made(*squares())
    first = inspect.getsourcelines(targets.run)[1] + 3
    assert [first] == targets.SEEN, "called where the first of them stands"


def test_a_traceback_of_the_original_statements_names_the_one_that_failed() -> None:
    made = apply(targets.run_failing, kind=statements())
    x = torch.ones(3, 3, dtype=torch.int64)  # has no softmax
    with pytest.raises(RuntimeError) as caught:
        made(x, x)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.line) == (targets.__file__, "w = torch.softmax(w, dim=-1)")


# Nested functions.


ROTATE_PRINT = pattern.fingerprint(
    pattern.ast.parse(
        "def rotate(x_in: int, by) -> int:\n  'Text.'\n  turned = x_in * by\n  return turned - x_in"
    ).body[0]
)


def nested(build: str = "build_tagged", prints=(ROTATE_PRINT,)) -> Nested:
    return Nested(name="rotate", prints=prints, build=f"{HERE}:{build}")


def test_a_nested_function_is_redirected_by_what_it_does() -> None:
    made = apply(targets.rotated, kind=nested())
    first, second = targets.rotated(2.0, 3.0)
    assert made(2.0, 3.0) == (first + 1000, (first + 1000) * 3.0 - (first + 1000) + 1000)
    assert second == first * 3.0 - first


def test_another_nested_function_of_that_name_is_not() -> None:
    with pytest.raises(SourceUnknown, match="found 0 times, 1 are known"):
        apply(targets.rotated, kind=nested(prints=("0" * 16,)))


def test_a_nested_function_that_uses_the_outer_one_is_refused() -> None:
    tree = pattern.ast.parse(inspect.getsource(targets.uses_outer)).body[0].body[0]
    with pytest.raises(SourceUnknown, match="uses variables"):
        # It would find a global of that name.
        apply(targets.uses_outer, kind=nested(prints=(pattern.fingerprint(tree),)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f(a: int): return a", "def f(a):\n  'doc'\n  return a  # text", True),
        ("x = -1.0", "x = -1", False),
        ("x = 1", "x = True", False),
        ("a - b", "b - a", False),
        ("f(a, b=1)", "f(a, c=1)", False),
        ("x = None", "x = ...", False),
        ("return_ = [a, b]", "return_ = (a, b)", False),
        ("a[1:]", "a[:1]", False),
    ],
)
def test_fingerprints(one: str, other: str, same: bool) -> None:
    prints = [pattern.fingerprint(pattern.ast.parse(text).body[0]) for text in (one, other)]
    assert (prints[0] == prints[1]) is same


def test_fingerprints_are_the_same_on_every_python() -> None:
    assert ROTATE_PRINT == "f6aa0dd00d4ec8e7"


# Where the function lives.


def test_closures_are_kept() -> None:
    original = targets.make_closure(5)
    made = apply(original)
    assert made(1, 2, 3) == 1012
    assert original.__closure__[0] in made.__closure__


def test_super_and_private_names() -> None:
    made = apply(targets.Derived.forward)
    instance = targets.Derived()
    assert made(instance, 1, 2, 3) == -1 - (7 + 1000) * 3
    assert instance.calls == 1


def test_decorators_are_applied_again() -> None:
    x = torch.ones(2, requires_grad=True)
    made = apply(targets.decorated)
    assert made is not targets.decorated
    result = made(x, x, x)
    assert torch.equal(result, (x + x * x + 1000).detach() * 2)
    assert not result.requires_grad
    assert targets.decorated(x, x, x)[0] == 4
    assert inspect.signature(made) == inspect.signature(targets.decorated)


def test_a_decorator_that_hides_the_function_is_refused() -> None:
    with pytest.raises(SourceUnknown, match="does not show"):
        apply(targets.hidden)


# Unknown sources.


def load(path):
    spec = importlib.util.spec_from_file_location("rewrite_written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = "import math\n\ndef scaled(x, y, gate):\n    return x + y * gate - math.floor(0.5)\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("y * gate", "gate * y"),
        lambda text: text.replace("0.5", "1.5"),
        lambda text: "\n" + text,
        lambda text: text.replace("import math", "math = __import__('math')"),
        lambda text: text.replace("    return", "  pass\n  +++"),
        lambda text: "",
    ],
)
def test_a_file_that_was_changed_since_it_was_loaded(tmp_path, change) -> None:
    path = tmp_path / "written.py"
    path.write_text(SOURCE)
    function = load(path).scaled
    assert apply(function)(1, 2, 3) == 1007
    path.write_text(change(SOURCE))
    linecache.checkcache(str(path))
    with pytest.raises(SourceUnknown):
        apply(function)


def test_functions_without_a_file_and_other_kinds() -> None:
    namespace: dict = {}
    exec("def made(x, y, gate): return x + y * gate", namespace)
    for function in (namespace["made"], lambda x, y, gate: x + y * gate):
        with pytest.raises(SourceUnknown):
            apply(function)


def test_another_number_of_matches() -> None:
    for count in (0, 2):
        with pytest.raises(SourceUnknown, match="found 1 times"):
            apply(targets.plain, count=count)


# The stand-in.


def installed(function, counts=None, everywhere=True, strict=False):
    armed = Site("test")
    armed.arm()
    armed.everywhere = everywhere
    armed.strict = strict
    ledger = Ledger()
    armed.count_to(ledger)
    rule = Rewrite(
        module=HERE, qualname=function.__qualname__, counts=counts or {gate("build_law"): 1}
    )
    made = stand_in(function, rule, armed)
    law.dress(made, function, function.__module__, function.__qualname__)
    return made, ledger["test"]


def test_the_stand_in_counts_and_obeys_the_law() -> None:
    made, counts = installed(targets.joined)
    x, y, g = torch.randn(3, 4).unbind()
    assert torch.equal(made(x, y, g), torch.addcmul(x, y, g))
    assert torch.equal(made(x[0], y[0], g[0]), targets.joined(x[0], y[0], g[0]))
    assert counts.snapshot() == (1, 0, {"no dimensions": 1})


def test_the_stand_in_is_inert_where_it_is_not_in_force() -> None:
    made, counts = installed(targets.plain, everywhere=False)
    assert made(1.0, 2.0) == targets.plain(1.0, 2.0)
    assert counts.snapshot() == (0, 0, {})


def test_an_unknown_source_is_told_at_every_call() -> None:
    made, counts = installed(targets.plain, {gate("build_law"): 3})
    assert made(1.0, 2.0) == targets.plain(1.0, 2.0)
    assert made(1.0, y=2.0) == targets.plain(1.0, 2.0)
    reason = "not rewritten: gated found 1 times, 3 are known"
    assert counts.snapshot() == (0, 0, {reason: 2})


def test_an_unknown_source_is_an_error_if_it_was_asked_for() -> None:
    made, counts = installed(targets.plain, {gate("build_law"): 3}, strict=True)
    message = f"test: {HERE}.plain not rewritten: gated found 1 times, 3 are known"
    for _ in range(2):
        with pytest.raises(PatchError, match=message):
            made(1.0, 2.0)
    assert counts.snapshot() == (0, 0, {})


def test_the_stand_in_looks_like_the_original() -> None:
    made, _ = installed(targets.plain)
    for follow in (True, False):
        assert inspect.signature(made, follow_wrapped=follow) == inspect.signature(targets.plain)
    assert inspect.getfullargspec(made) == inspect.getfullargspec(targets.plain)
    assert inspect.getsource(made) == inspect.getsource(targets.plain)
    assert (made.__name__, made.__module__) == ("plain", HERE)


def test_it_pickles_by_name(monkeypatch) -> None:
    made, _ = installed(targets.plain)
    monkeypatch.setattr(targets, "plain", made)
    data = pickle.dumps(made)
    assert pickle.loads(data) is made
    monkeypatch.undo()
    assert pickle.loads(data) is targets.plain


@pytest.fixture
def block(monkeypatch):
    made, counts = installed(targets.Block.forward)
    original = targets.Block.forward
    model = targets.Block()
    x, g = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        expected = original(model, x, g)
    monkeypatch.setattr(targets.Block, "forward", made)
    torch.compiler.reset()
    yield model, x, g, expected, counts
    torch.compiler.reset()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled(block, backend: str, warm: bool) -> None:
    model, x, g, expected, counts = block
    if warm:
        model(x, g)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, gate=g), expected)
    redirected, traced, reasons = counts.snapshot()
    assert (redirected, traced, reasons) == (int(warm), 1, {})
    frames = torch._dynamo.utils.counters["frames"]["total"]
    torch.testing.assert_close(compiled(x, gate=g), expected)
    torch.testing.assert_close(model(x, g), expected)
    torch.testing.assert_close(compiled(x, gate=g), expected)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
    assert counts.snapshot() == (int(warm) + 1, 1, {})


@torch.no_grad()
def test_copies_of_a_module_use_their_own_weights(block) -> None:
    model, x, g, expected, _ = block
    twin = copy.deepcopy(model)
    twin.linear.weight.zero_()
    twin.linear.bias.zero_()
    assert torch.equal(twin(x, g), x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x, g), expected)
