"""Every redirected rotary function against its original and against float64."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import re
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches import law
from mindiesd.patches.rope import LEFT, encoders, forms
from mindiesd.patches.rope.kept import SOURCES
from mindiesd.patches.scope import Site
from tests import oracles
from tests.emulator.tiny_models import first_tensor
from tests.patches.rope_cases import CASES, HALF, Case, Sizes, one_a_convention, polar, uniform
from tests.patches.rope_models import MODELS_WITH_ROPE
from tests.patches.rope_pair import RECORDS, Pair, listed, pair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(map(copied, value)) if isinstance(value, tuple) else value


def test_every_record_has_a_case() -> None:
    assert {*CASES, "diffusers_rope"} == {*RECORDS}


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in another memory."""
    if how == "sliced":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    if how == "chunk of qkv":
        return torch.stack((x, x, x), -2).select(-2, 1)
    if how == "contiguous":
        return x.contiguous()
    return x


def check(case: Case, ours: Any, theirs: Any, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    expected = case.expect(*args)
    assert len(listed(ours)) == len(listed(theirs)) == len(expected)
    for mine, other, oracle in zip(listed(ours), listed(theirs), expected, strict=True):
        assert mine.dtype is other.dtype is dtype
        assert mine.shape == other.shape
        oracles.assert_as_accurate(mine, other, oracle)
        oracles.assert_close(mine, oracle)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function(name: str, dtype: torch.dtype) -> None:
    case, both = CASES[name], pair(name)
    torch.manual_seed(0)
    args = case.make(Sizes(), dtype)
    redirected = both.counts()[0]
    check(case, both.ours(*args), both.original(*args), args, dtype)
    assert both.counts()[0] == redirected + (dtype in case.exact), both.counts()


@pytest.mark.parametrize("name", one_a_convention())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_against_the_original_and_float64(name: str, data: st.DataObject) -> None:
    case, both = CASES[name], pair(name)
    sizes = Sizes(
        batch=data.draw(st.integers(1, 3)),
        length=data.draw(st.integers(1, 5)),
        heads=data.draw(st.integers(1, 3)),
        half=data.draw(st.integers(1, 5)),
        per_batch=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    hows = ["as the model", "contiguous", "sliced", "chunk of qkv"]
    if name == "sana_wm_rope":
        del hows[1:]  # the original raises for most other memory
    how = data.draw(st.sampled_from(hows))
    torch.manual_seed(data.draw(st.integers(0, 1 << 20)))
    args = list(case.make(sizes, dtype))
    for at in case.inputs:
        args[at] = strided(args[at], how)
    before = copied(tuple(args))
    redirected = both.counts()[0]
    theirs = both.original(*args)
    ours = both.ours(*args)
    assert both.counts()[0] == redirected + (dtype in case.exact), both.counts()
    check(case, ours, theirs, tuple(args), dtype)
    # Arguments are not written to, and results share no memory with them.
    for left, right in zip(_tensors(args), _tensors(before), strict=True):
        assert torch.equal(left, right)
    for mine, other in zip(listed(ours), listed(theirs), strict=True):
        if name not in ("phi3_rope", "glm_rope", "glm4_rope"):
            assert mine.is_contiguous() or not other.is_contiguous()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@pytest.mark.parametrize("name", one_a_convention())
def test_the_other_convention_would_be_noticed(name: str) -> None:
    """The same checks fail for a family whose pairs are taken the other way round."""
    case = CASES[name]
    wrong = Pair(name, interleaved=not pair(name).family.interleaved)
    dtype = torch.bfloat16
    torch.manual_seed(0)
    args = case.make(Sizes(), dtype)
    with pytest.raises(AssertionError, match="error"):
        check(case, wrong.ours(*args), wrong.original(*args), args, dtype)
    assert wrong.counts()[0] == 1


@pytest.mark.parametrize("name", CASES)
def test_parameters_can_be_given_by_name(name: str) -> None:
    case, both = CASES[name], pair(name)
    args = case.make(Sizes(), torch.bfloat16)
    names = list(inspect.signature(both.original).parameters)
    assert list(inspect.signature(both.ours, follow_wrapped=False).parameters) == names
    redirected = both.counts()[0]
    by_name = both.ours(**dict(zip(names, args, strict=False)))
    assert both.counts()[0] == redirected + 1
    for one, other in zip(listed(by_name), listed(both.ours(*args)), strict=True):
        assert torch.equal(one, other)


# What is kept of tables.


def complex_pair() -> tuple[Pair, torch.Tensor, torch.Tensor]:
    both = Pair("qwenimage_rope")
    return both, torch.randn(2, 5, 3, 8), polar(5, 4)


def kept(both: Pair) -> Any:
    """The store behind a replacement."""
    cells = inspect.getclosurevars(both.ours).nonlocals
    return inspect.getclosurevars(cells["read"]).nonlocals["kept"]


def test_tables_are_made_once_for_all_layers(monkeypatch) -> None:
    made = []
    real = forms._twice
    monkeypatch.setattr(forms, "_twice", lambda halves: made.append(1) or real(halves))
    both, x, table = complex_pair()
    for _ in range(5):
        both.ours(x, table, False)
        both.ours(x[:1], table, False)
    assert len(made) == 1
    assert both.counts()[0] == 10


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(1j),
        lambda t: t[2:].zero_(),
        lambda t: torch.view_as_real(t).neg_(),
        lambda t: setattr(t, "data", polar(5, 4)),
    ],
)
def test_a_table_that_was_written_to_is_read_again(write) -> None:
    both, x, table = complex_pair()
    for _ in range(2):
        oracles.assert_close(
            both.ours(x, table, False), CASES["qwenimage_rope"].expect(x, table, 0)[0]
        )
        write(table)
    oracles.assert_close(both.ours(x, table, False), CASES["qwenimage_rope"].expect(x, table, 0)[0])


def test_a_view_is_read_again_when_its_base_was_written_to() -> None:
    both, x, base = complex_pair()
    view = base[:5]
    before = both.ours(x, view, False)
    base.conj_physical_()
    after = both.ours(x, view, False)
    assert not torch.equal(before, after)
    oracles.assert_close(after, CASES["qwenimage_rope"].expect(x, base, 0)[0])


@pytest.mark.parametrize("name", ["qwenimage_rope", "llama_rope", "ltx_rope", "allegro_rope"])
def test_tables_are_not_kept_alive(name: str) -> None:
    both = Pair(name)
    args = CASES[name].make(Sizes(), torch.float32)
    both.ours(*args)
    assert len(kept(both)) == 1
    references = [weakref.ref(tensor) for tensor in _tensors(args)]
    del args
    gc.collect()
    assert not any(reference() is not None for reference in references)
    assert len(kept(both)) == 0


def test_as_many_tables_are_kept_as_stated() -> None:
    both, x, _ = complex_pair()
    tables = [polar(5, 4) for _ in range(SOURCES + 3)]
    for table in tables:
        both.ours(x, table, False)
    assert len(kept(both)) <= SOURCES


def test_nothing_is_kept_of_inference_tensors() -> None:
    both, x, _ = complex_pair()
    with torch.inference_mode():
        table = polar(5, 4)
        first = both.ours(x, table, False)
        table.mul_(1j)
        second = both.ours(x, table, False)
    assert len(kept(both)) == 0
    assert both.counts()[0] == 2
    assert not torch.equal(first, second)
    oracles.assert_close(second, CASES["qwenimage_rope"].expect(x, table, 0)[0])


def test_what_was_made_in_inference_mode_serves_outside_of_it() -> None:
    both, x, table = complex_pair()
    with torch.inference_mode():
        both.ours(x, table, False)
    out = both.ours(x, table, False)
    assert not out.is_inference()
    assert len(kept(both)) == 1


def test_function_transforms_see_their_own_tables() -> None:
    both = Pair("qwenimage_rope")
    x, tables = torch.randn(4, 2, 5, 3, 8), polar(4, 5, 4)
    out = torch.vmap(lambda x, t: both.ours(x, t, False))(x, tables)
    for i in range(4):
        oracles.assert_close(out[i], CASES["qwenimage_rope"].expect(x[i], tables[i], 0)[0])
    assert len(kept(both)) == 0


# Calls that are not taken.


def reason(both: Pair) -> str:
    (found,) = both.counts()[2]
    return found


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("qwenimage_rope", lambda: (torch.randn(2, 5, 5, 8), uniform(2, 5, 8)), "real tables"),
        ("qwenimage_rope", lambda: (torch.randn(2, 5, 3, 8).double(), polar(5, 4), False), "dtype"),
        (
            "qwenimage_rope",
            lambda: (torch.randn(1, 5, 3, 8), polar(5, 4, dtype=torch.float64), False),
            "float64",
        ),
        ("anyflow_rope", lambda: (torch.randn(1, 3, 5, 8), polar(1, 1, 5, 4)), "float64"),
        # The original would return more than it was given.
        ("anyflow_rope", lambda: (torch.randn(1, 3, 5, 8).half(), polar(2, 1, 5, 4)), "shape"),
        ("prx_rope", lambda: (torch.randn(1, 1, 5, 8), uniform(2, 1, 5, 4, 2, 2)), "shape"),
        (
            "llama_rope",
            lambda: (*torch.randn(2, 1, 2, 5, 8).bfloat16(), *uniform(2, 1, 5, 8)),
            "dtype",
        ),
        (
            "llama_rope",
            lambda: (*torch.randn(2, 1, 2, 5, 8), *uniform(2, 1, 5, 8).requires_grad_()),
            "gradients",
        ),
        (
            "ltx2_split_rope",
            lambda: (torch.randn(2, 3, 5, 8), tuple(uniform(2, 2, 3, 5, 4))),
            "shape",
        ),
    ],
)
def test_other_calls_go_to_the_original(name: str, args, why: str) -> None:
    both = Pair(name)
    given_args = args()
    try:
        theirs = both.original(*given_args)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            both.ours(*given_args)
        assert both.counts()[0] == 0 and why in reason(both)
        return
    ours = both.ours(*given_args)
    for mine, other in zip(listed(ours), listed(theirs), strict=True):
        assert torch.equal(mine, other) and mine.dtype is other.dtype
    assert both.counts()[0] == 0
    assert why in reason(both)


@pytest.mark.parametrize("name", one_a_convention())
def test_gradients_flow_through_the_original(name: str) -> None:
    case, both = CASES[name], Pair(name)
    args = list(case.make(Sizes(), torch.float32))
    args[0] = args[0].detach().requires_grad_()
    listed(both.ours(*args))[0].sum().backward()
    assert args[0].grad is not None
    assert reason(both) == law.GRADIENTS


def test_a_default_device_changes_nothing() -> None:
    """It is a mode, under which every call looks overridden."""
    both, x, table = complex_pair()
    with torch.device("cpu"):
        both.ours(x, table, False)
    assert both.counts()[0] == 1


def test_subclasses_go_to_the_original() -> None:
    class Marked(torch.Tensor):
        pass

    both, x, table = complex_pair()
    assert type(both.ours(x.as_subclass(Marked), table, False)) is Marked
    assert reason(both) == law.UNUSUAL_ARGUMENT


# The shared helper.


def shared(x: torch.Tensor, freqs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    both = pair("diffusers_rope")
    before = both.counts()[0]
    ours, theirs = both.ours(x, freqs, **options), both.original(x, freqs, **options)
    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
    return ours, theirs, both.counts()[0] - before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
def test_complex_tables_of_the_shared_helper(dtype, wide, batch) -> None:
    x, table = torch.randn(2, 5, 3, 8).to(dtype), polar(batch, 5, 4, dtype=wide)
    ours, theirs, taken = shared(x, table, use_real=False)
    (oracle,) = CASES["anyflow_rope"].expect(x, table[:, :, None])
    assert taken == (wide is torch.float32 or dtype in HALF)
    oracles.assert_as_accurate(ours, theirs, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unbind", [-1, -2])
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_real_tables_of_the_shared_helper(dtype, table, unbind, sequence_dim, length) -> None:
    """A table of one position serves all."""
    x = torch.randn(2, 5, 5, 8).to(dtype)
    cos, sin = uniform(2, length, 8).to(table)
    ours, theirs, taken = shared(
        x, (cos, sin), use_real_unbind_dim=unbind, sequence_dim=sequence_dim
    )
    assert taken == 1
    at = (slice(None), None) if sequence_dim == 1 else (None,)
    oracle = oracles.rope(x, cos[at], sin[at], unbind == -1)
    oracles.assert_as_accurate(ours, theirs, oracle)
    assert torch.equal(ours, theirs)


def test_three_dimensions_of_the_shared_helper() -> None:
    """CogView4's packed training: three dimensions in, four out."""
    x, (cos, sin) = torch.randn(3, 5, 8).bfloat16(), uniform(2, 5, 8)
    ours, theirs, taken = shared(x, (cos, sin), use_real_unbind_dim=-2)
    assert taken == 1 and ours.shape == (1, 3, 5, 8)
    assert torch.equal(ours, theirs)
    oracles.assert_close(ours, oracles.rope(x[None], cos, sin, False))


def test_odd_calls_of_the_shared_helper_raise_as_before() -> None:
    both = Pair("diffusers_rope")
    x, tables = torch.randn(2, 3, 5, 8), tuple(uniform(2, 5, 8))
    for options in ({"sequence_dim": 3}, {"sequence_dim": [1]}, {"use_real_unbind_dim": 0}):
        with pytest.raises(ValueError, match="should be"):
            both.ours(x, tables, **options)
    with pytest.raises(RuntimeError):
        both.ours(x, tuple(uniform(2, 4, 8)))
    assert both.counts()[0] == 0


# Installed.


def test_what_is_left_exists_and_says_why() -> None:
    for target, why in LEFT:
        module, _, attribute = target.rpartition(".")
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError:
            outer, _, inner = module.rpartition(".")
            owner = getattr(importlib.import_module(outer), inner)
        # transformers 5 has this one no more.
        if attribute != "apply_multimodal_rotary_pos_emb":
            assert callable(getattr(owner, attribute)), target
        assert why
        assert target not in {record.target for record in RECORDS.values()}


def test_installed_and_undone_to_the_same_objects() -> None:
    places = {
        name: (importlib.import_module(record.module), record.attribute)
        for name, record in RECORDS.items()
    }
    before = {name: vars(module)[attribute] for name, (module, attribute) in places.items()}
    migration = mindiesd.patch_all(only="rope")
    states = {patch.name: patch.status for patch in migration.report().patches}
    assert set(states.values()) == {"applied"}, states
    during = {name: vars(module)[attribute] for name, (module, attribute) in places.items()}
    assert not any(during[name] is before[name] for name in places)
    copy.deepcopy(during)
    mindiesd.unpatch_all()
    after = {name: vars(module)[attribute] for name, (module, attribute) in places.items()}
    assert all(after[name] is before[name] for name in places)


def test_a_function_that_is_none_any_more_is_skipped_with_the_reason() -> None:
    from transformers.models.llama import modeling_llama

    held = [modeling_llama.apply_rotary_pos_emb]
    modeling_llama.apply_rotary_pos_emb = torch.jit.script(_scripted)
    try:
        states = {p.name: p for p in mindiesd.patch_all(only="rope").report().patches}
        assert states["llama_rope"].status == "skipped"
        assert "not a plain function" in states["llama_rope"].reason
        assert states["qwen2_rope"].status == "applied"
    finally:
        mindiesd.unpatch_all()
        modeling_llama.apply_rotary_pos_emb = held[0]


def _scripted(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q + k


# Whole models.


def run(tiny: Any, model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(**tiny.make_inputs()))


@pytest.mark.parametrize("name", MODELS_WITH_ROPE)
def test_models_are_as_accurate_as_before(name: str) -> None:
    tiny = MODELS_WITH_ROPE[name]
    model = tiny.build()
    expected = run(tiny, model)
    migration = mindiesd.patch_all(only="rope")
    redirected = run(tiny, model)
    report = migration.report()
    mindiesd.unpatch_all()
    assert report.redirected or name == "lumina2", "its tables are complex128"
    assert not report.fell_back or name == "lumina2", report.to_dict()
    torch.testing.assert_close(redirected, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(tiny, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwenimage", "glm"])
def test_compiled_whole(name: str) -> None:
    tiny = MODELS_WITH_ROPE[name]
    model = tiny.build()
    expected = run(tiny, model)
    torch.compiler.reset()
    migration = mindiesd.patch_all(only="rope")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(tiny, compiled), expected, rtol=1e-4, atol=1e-5)
    report = migration.report()
    assert report.traced and not report.fell_back
    mindiesd.unpatch_all()
    torch.testing.assert_close(run(tiny, compiled), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", one_a_convention())
def test_compiled_alone_in_one_graph(name: str) -> None:
    """Also with tables that change between calls: nothing of them is baked in."""
    case, both = CASES[name], Pair(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: both.ours(*args), backend="eager", fullgraph=True)
    for _ in range(2):
        args = case.make(Sizes(), torch.bfloat16)
        for mine, oracle in zip(listed(compiled(*args)), case.expect(*args), strict=True):
            oracles.assert_close(mine, oracle)
    traced = both.counts()[1]
    assert traced and not both.counts()[2]
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    both = Pair("qwenimage_rope")

    class Rotate(torch.nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return both.ours(x, table, False)

    args = torch.randn(2, 5, 3, 8), polar(5, 4)
    both.ours(*args, False)  # already kept: must not be found by the exporter
    with torch.no_grad():
        exported = torch.export.export(Rotate(), args, strict=strict).module()
    others = torch.randn(2, 5, 3, 8), polar(5, 4)
    oracles.assert_close(exported(*others), CASES["qwenimage_rope"].expect(*others, 0)[0])


def test_scoped_to_one_model() -> None:
    tiny = MODELS_WITH_ROPE["qwenimage"]
    one, other = tiny.build(), tiny.build()
    with mindiesd.patch_pipeline(one, only="rope") as migration:
        run(tiny, other)
        assert not migration.report().redirected
        run(tiny, one)
        assert migration.report().redirected


# As transformers 4 writes it: its body has not changed since.


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def with_position_ids(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_position_ids_of_transformers_4(dtype) -> None:
    site = Site("llama_rope")
    site.everywhere = True
    site.arm()
    ours = encoders.TEXT(with_position_ids, site)
    law.dress(ours, with_position_ids, __name__, "with_position_ids")
    assert inspect.signature(ours) == inspect.signature(with_position_ids)
    given = CASES["llama_rope"].make(Sizes(), dtype)
    case, plain = CASES["llama_rope"], with_position_ids(*given)
    check(case, ours(*given), plain, given, dtype)
    counts = site._own.snapshot()
    assert counts[0] == 1 and not counts[2]
    positions = torch.arange(given[0].shape[2])[None]
    for got, theirs in zip(ours(*given, positions), plain, strict=True):
        assert torch.equal(got, theirs)
    assert site._own.snapshot()[2] == {law.UNUSUAL_ARGUMENT: 1}
