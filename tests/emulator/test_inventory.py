"""Every ``npu::`` operator that mindiesd calls exists, with the arguments that it is given.

In the installed torch_npu, whose dispatcher is asked, and in the releases whose schemas were read
from their wheels (``scripts/_schemas.py``).
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from mindiesd.emulator import ops, trace
from mindiesd.ops import attention
from mindiesd.ops.backends.npu import dense, fusion, inventory
from mindiesd.ops.masks import Band, attention_mask
from scripts import _schemas
from tests import oracles

FILES = {
    path.stem.partition("-")[2]: json.loads(path.read_text("utf-8"))
    for path in sorted(_schemas.FOLDER.glob("torch_npu-*.json"))
}
CALLS = _schemas.calls()


@pytest.fixture(autouse=True)
def _fresh():
    dense._plans.clear()
    inventory._known.clear()
    yield
    dense._plans.clear()
    inventory._known.clear()


def parsed(release, operator):
    """The schema of an operator in a release, or None where it has none."""
    text = FILES[release]["schemas"].get(operator)
    return None if text is None else torch._C.parse_schema("npu::" + text)


def disagreement(schema, positional, keywords):
    """What of a call the schema does not take; empty if it takes it."""
    names = [argument.name for argument in schema.arguments]
    by_position = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if positional > len(by_position):
        return f"{positional} arguments by position, {len(by_position)} are allowed"
    unknown = set(keywords) - set(names)
    twice = set(keywords) & set(by_position[:positional])
    missing = [
        argument.name
        for argument in schema.arguments
        if not argument.has_default_value()
        and argument.name not in keywords
        and argument.name not in by_position[:positional]
    ]
    return "; ".join(
        f"{what}: {sorted(found)}"
        for what, found in (("unknown", unknown), ("twice", twice), ("missing", missing))
        if found
    )


def test_the_oldest_supported_release_the_installed_one_and_later_ones_are_here():
    releases = sorted(map(Version, FILES))
    assert releases[0].release[:2] == (2, 5), "the lower bound of the extra `npu`"
    assert len(releases) >= 4
    import torch_npu

    assert str(Version(torch_npu.__version__).base_version) in FILES


def test_every_operator_in_question_is_in_every_file():
    wanted = set(_schemas.operators())
    for release, data in FILES.items():
        assert wanted <= set(data["schemas"]), f"{release}: run {data['made_by']}"


def test_the_file_of_the_installed_release_is_what_the_dispatcher_knows():
    import torch_npu

    release = Version(torch_npu.__version__).base_version
    for operator in _schemas.operators():
        live = getattr(torch.ops.npu, operator).default._schema
        assert str(parsed(release, operator)) == str(live)


def test_reading_finds_every_schema_of_the_installed_library():
    """Not only those in question: the reading itself is right."""
    import torch_npu

    library = (Path(torch_npu.__file__).parent / "lib" / "libtorch_npu.so").read_bytes()
    live = {
        schema.name.removeprefix("npu::"): str(schema)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("npu::npu_") and not schema.overload_name
    }
    read = _schemas.read(library, live)
    found = {name: text for name, text in read.items() if text is not None}
    assert len(found) > 0.9 * len(live) > 100  # some are registered piece by piece
    for name, text in found.items():
        assert str(torch._C.parse_schema("npu::" + text)) == live[name]


def test_reading_does_not_take_one_operator_for_another():
    library = (
        b"\0npu_x_more(Tensor a) -> Tensor\0_npu_x(Tensor b) -> Tensor\0npu_x.out(int c) -> int\0"
    )
    assert _schemas.read(library, ["npu_x", "npu_x_more", "more"]) == {
        "npu_x": None,
        "npu_x_more": "npu_x_more(Tensor a) -> Tensor",
        "more": None,
    }
    with pytest.raises(ValueError, match="several schemas"):
        _schemas.read(b"\0f(int a) -> int\0f(int b) -> int\0", ["f"])


@pytest.mark.parametrize(
    "call", [c for c in CALLS if len(c.operators) == 1], ids=lambda call: call.where
)
@pytest.mark.parametrize("release", FILES)
def test_written_calls(call, release):
    (operator,) = call.operators
    schema = parsed(release, operator)
    if schema is None:
        assert operator in inventory.NEWER, f"{call.where}: {release} has no {operator}"
        return
    assert not disagreement(schema, call.positional, call.keywords), call.where


def test_what_is_said_to_be_newer_is_newer():
    for operator in inventory.NEWER:
        have = [release for release in FILES if parsed(release, operator) is not None]
        assert 0 < len(have) < len(FILES)
        assert {operator} & {name for call in CALLS for name in call.operators}


def test_disagreements_are_seen():
    schema = torch._C.parse_schema("npu::f(Tensor a, int b, *, int c=1) -> Tensor")
    assert not disagreement(schema, 2, {"c"})
    assert "unknown: ['d']" in disagreement(schema, 2, {"d"})
    assert "missing: ['b']" in disagreement(schema, 1, {"c"})
    assert "twice: ['b']" in disagreement(schema, 2, {"b"})
    assert "by position" in disagreement(schema, 3, set())


def test_collecting_sees_what_is_written(tmp_path):
    (tmp_path / "one.py").write_text(
        "def f(x):\n"
        "    options = {'a': 1}\n"
        "    options['b'] = 2\n"
        "    names = ('c', 'd')\n"
        "    options.update(zip(names, x))\n"
        "    return torch.ops.npu.npu_one.default(x, *x, e=1, **options)\n"
    )
    (call,) = _schemas.calls(tmp_path)
    assert call.operators == ("npu_one",)
    assert (call.positional, call.keywords) == (4, frozenset("abcde"))
    (tmp_path / "one.py").write_text("operator = torch.ops.npu.npu_one\n")
    with pytest.raises(ValueError, match=r"one\.py:1"):
        _schemas.calls(tmp_path)


# The one call whose operator is chosen at run time: what it is really given.


class Recorder:
    """Stands for ``torch.ops.npu``, minus what a release lacks, and writes calls down."""

    def __init__(self, lacking=()):
        self.lacking = lacking
        self.calls = []
        self._real = torch.ops.npu

    def __getattr__(self, name):
        if name in self.lacking:
            raise AttributeError(name)
        operator = getattr(self._real, name)

        def call(*args, **kwargs):
            self.calls.append((name, len(args), frozenset(kwargs)))
            return operator(*args, **kwargs)

        return call


def tensors(dtype=torch.float16):
    return [torch.randn(2, 4, 6, 16, dtype=dtype, device="npu") for _ in range(3)]


BOOL = torch.rand(6, 6) > 0.3
BIAS = torch.randn(2, 4, 6, 6)
KINDS = {
    "plain": {},
    "causal": {"is_causal": True},
    "band": {"band": Band(-2, 1)},
    "mask": {"mask": BOOL},
    "bias": {"mask": BIAS},
    "half bias": {"mask": BIAS.half()},
}


def attend(kind, dtype=torch.float16):
    q, k, v = tensors(dtype)
    given = dict(KINDS[kind])
    mask = given.pop("mask", None)
    mask = None if mask is None else mask.npu()
    causal, band = given.get("is_causal", False), given.get("band")
    out = attention.attend(q, k, v, mask, None, causal, band)
    parts = attention_mask(mask, causal, band)
    keep = bias = None
    if parts is not None:
        keep = None if parts.keep is None else parts.keep.cpu()
        bias = None if parts.bias is None else parts.bias.cpu()
        if parts.band is not None:
            keep = parts.band.matrix(6, 6, torch.device("cpu"))
    expected = oracles.attention(q.cpu(), k.cpu(), v.cpu(), keep, bias, None)
    oracles.assert_close(out.cpu(), expected, oracles.slack(None if mask is None else mask.cpu()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("release", FILES)
def test_calls_chosen_at_run_time(monkeypatch, release, frozen):
    """What each release lacks is not called, what is called takes its arguments, and is right."""
    lacking = [name for name in FILES[release]["schemas"] if parsed(release, name) is None]
    recorder = Recorder(lacking)
    monkeypatch.setattr(torch.ops, "npu", recorder)
    if frozen:
        monkeypatch.setattr("mindiesd.ops.backends.npu.call.frozen", lambda tensor: True)
    for kind in KINDS:
        attend(kind)
        attend(kind, torch.float32)
    assert recorder.calls
    for operator, positional, keywords in recorder.calls:
        schema = parsed(release, operator)
        assert schema is not None, operator
        assert not disagreement(schema, positional, keywords), operator
    if not lacking or release == "2.13.0":
        (chosen,) = (call for call in CALLS if len(call.operators) > 1)
        used = {name for name, _, _ in recorder.calls}
        wanted = {fusion.GRAPHS} if frozen else {fusion.NAME, fusion.BIASED}
        assert wanted <= used <= set(chosen.operators)


def test_every_keyword_of_the_chosen_call_was_seen(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.ops, "npu", recorder)
    for frozen in (False, True):
        monkeypatch.setattr("mindiesd.ops.backends.npu.call.frozen", lambda tensor, f=frozen: f)
        for kind in KINDS:
            attend(kind)
    # v2 gets a bias or nothing: its bands go to v1, and are in the source for the 950 alone.
    (chosen,) = (call for call in CALLS if len(call.operators) > 1)
    seen = {keyword for _, _, keywords in recorder.calls for keyword in keywords}
    assert chosen.keywords - seen <= {"pre_tokens", "next_tokens"}


def test_a_traced_call_without_the_kernel_for_graphs_says_why(monkeypatch):
    monkeypatch.setattr(torch.ops, "npu", Recorder([fusion.GRAPHS]))
    monkeypatch.setattr("mindiesd.ops.backends.npu.call.frozen", lambda tensor: True)
    plan = dense.explain(*tensors(torch.float32))
    assert plan.kernel == "composed"
    assert (fusion.NAME, "the installed torch_npu has no version of the kernel for graphs") in (
        plan.refused
    )


def test_a_compiled_call_without_it(monkeypatch):
    q, k, v = tensors(torch.float32)
    inventory._known[fusion.GRAPHS] = False
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: attention.attend(q, k, v), backend="aot_eager")
    with trace() as counted, torch.no_grad():
        out = compiled(q, k, v)
    torch.compiler.reset()
    assert f"npu::{fusion.GRAPHS}" not in counted.launches
    expected = oracles.attention(q.cpu(), k.cpu(), v.cpu(), None, None, None)
    oracles.assert_close(out.cpu(), expected)


# The emulator's own functions.


@pytest.mark.parametrize("name", sorted(ops.TABLE))
def test_the_emulators_functions_have_the_operators_arguments(name):
    base, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, base), overload or "default")._schema
    parameters = list(inspect.signature(ops.TABLE[name]).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    by_position = [a.name for a in schema.arguments if not a.kwarg_only]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        ours = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        shared = [argument for argument in by_position if argument in ours]
        assert ours[: len(shared)] == by_position[: len(shared)] == shared
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        assert {a.name for a in schema.arguments} <= {p.name for p in parameters}
