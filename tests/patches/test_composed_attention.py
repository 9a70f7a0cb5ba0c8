"""Attention that models write out: as accurate as the original, and the original where it must."""

from __future__ import annotations

import copy
import inspect
import linecache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mindiesd
from mindiesd.patches import composed_attention, law, verify
from mindiesd.patches.rewriting.source import SourceUnknown
from tests import oracles
from tests.emulator.tiny_models import move
from tests.patches.composed_cases import CASES, attention, build

ONLY = ("composed_attention", "embeddings.IPAdapterTimeImageProjectionBlock")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def cast(value, dtype):
    return move(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def inputs(name: str, dtype=torch.float32, seed: int = 1):
    torch.manual_seed(seed)
    return cast(CASES[name].inputs(), dtype)


@torch.no_grad()
def run(module, given) -> torch.Tensor:
    args, kwargs = given
    return module(*args, **kwargs)


def rms(values) -> float:
    return torch.cat([value.flatten() for value in values]).square().mean().sqrt().item()


def taken(migration, name: str) -> tuple[int, dict[str, int]]:
    (patch,) = [p for p in migration.report().patches if p.name == CASES[name].record]
    return patch.redirected, patch.fell_back


# Modules.


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_original(name: str, monkeypatch) -> None:
    modules = {dtype: build(name, dtype) for dtype in DTYPES}
    calls = [(dtype, inputs(name, dtype, seed)) for dtype in DTYPES for seed in (1, 2, 3)]
    plain = [run(modules[dtype], given) for dtype, given in calls]
    migration = mindiesd.patch_all(only=ONLY)
    patched = [run(modules[dtype], given) for dtype, given in calls]
    expected = CASES[name].attentions + CASES[name].others
    assert taken(migration, name) == (len(calls) * expected, {})
    mindiesd.unpatch_all()
    again = [run(modules[dtype], given) for dtype, given in calls]
    assert all(map(torch.equal, again, plain)), "undone"
    # Several of them compute their softmax in what .float() gives.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact_modules = {dtype: copy.deepcopy(module).double() for dtype, module in modules.items()}
    exact = [run(exact_modules[dtype], cast(given, torch.float64)) for dtype, given in calls]
    for dtype in DTYPES:
        chosen = [index for index, call in enumerate(calls) if call[0] is dtype]
        for index in chosen:
            got, original = patched[index], plain[index]
            assert (got.dtype, got.shape) == (original.dtype, original.shape)
        ours = rms([patched[index].double() - exact[index] for index in chosen])
        theirs = rms([plain[index].double() - exact[index] for index in chosen])
        largest = max(exact[index].abs().max().item() for index in chosen)
        floor = torch.finfo(torch.float32).eps * max(1.0, largest)
        assert ours <= 1.05 * theirs + floor, dtype
        assert theirs < largest / 4, "what is compared says something"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_originals(name: str) -> None:
    module, (args, kwargs) = build(name), inputs(name)
    expected = module(*args, **kwargs)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    migration = mindiesd.patch_all(only=ONLY)
    got = module(*args, **kwargs)
    got.square().sum().backward()
    assert torch.equal(got, expected)
    fell_back = CASES[name].attentions + CASES[name].others
    assert taken(migration, name) == (0, {law.GRADIENTS: fell_back})
    again = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients and all(map(torch.equal, again, gradients))


@pytest.mark.parametrize("name", ["unet_1d", "pooling", "masked", "siglip"])
def test_autocast_decides(name: str) -> None:
    module, given = build(name), inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(module, given)
        migration = mindiesd.patch_all(only=ONLY)
        assert torch.equal(run(module, given), expected)
    assert taken(migration, name) == (0, {law.AUTOCAST: 1})


@pytest.mark.parametrize("name", [name for name in CASES if "siglip" not in name])
def test_float64_stays(name: str) -> None:
    module, given = build(name, torch.float64), inputs(name, torch.float64)
    expected = run(module, given)
    migration = mindiesd.patch_all(only=ONLY)
    assert torch.equal(run(module, given), expected)
    redirected, reasons = taken(migration, name)
    assert redirected == 0
    assert sum(reasons.values()) == CASES[name].attentions + CASES[name].others


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("unet_1d", "eager"),
        ("masked", "aot_eager"),
        ("siglip", "aot_eager"),
        *(
            pytest.param(name, backend, marks=pytest.mark.slow)
            for name in ("projection", "pooling", "ltx2_audio", "added", "perceiver")
            for backend in ("eager", "aot_eager")
        ),
    ],
)
def test_compiled(name: str, backend: str) -> None:
    module, given = build(name), inputs(name)
    expected = run(module, given)
    torch.compiler.reset()
    migration = mindiesd.patch_all(only=ONLY)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-4, atol=1e-4)
    (patch,) = [p for p in migration.report().patches if p.name == CASES[name].record]
    assert (patch.traced, patch.fell_back) == (1 + CASES[name].others, {})
    mindiesd.unpatch_all()
    assert torch.equal(run(compiled, given), expected)
    torch.compiler.reset()


def test_one_module_only() -> None:
    module, other, given = build("masked"), build("masked"), inputs("masked")
    expected = run(other, given)
    with mindiesd.patch_pipeline(module, only=ONLY) as migration:
        assert torch.equal(run(other, given), expected)
        assert taken(migration, "masked") == (0, {})
        torch.testing.assert_close(run(module, given), expected, rtol=1e-5, atol=1e-5)
        assert taken(migration, "masked") == (1, {})
    assert torch.equal(run(module, given), expected)


# verify=N.


ATTENTION = ("matmul(", "@", "einsum(", "bmm(", "get_attention_scores(", "self.attention(")


@pytest.mark.parametrize("name", CASES)
def test_verified_at_the_line_of_the_attention(name: str) -> None:
    modules = {dtype: build(name, dtype) for dtype in DTYPES}
    migration = mindiesd.patch_all(only=ONLY, verify=24)
    for dtype in DTYPES:
        run(modules[dtype], inputs(name, dtype))
    lines = {}
    for place in migration.verification.places(CASES[name].record):
        assert not place.failure and not place.unjudged, place
        path, _, line = place.where.rpartition(":")
        text = linecache.getline(path, int(line))
        lines[any(word in text for word in ATTENTION), line] = place.verified
    case = CASES[name]
    assert sum(count for key, count in lines.items() if key[0]) == 3 * case.attentions
    assert sum(lines.values()) == 3 * (case.attentions + case.others)


def test_a_line_that_is_wrong_goes_back_to_the_original(monkeypatch) -> None:
    from mindiesd.ops import attention as ops

    module, given = build("unet_1d"), inputs("unet_1d")
    expected = run(module, given)
    right = ops.attend
    monkeypatch.setattr(ops, "attend", lambda *args: right(*args) * 1.01)
    migration = mindiesd.patch_all(only=ONLY, verify=2)
    for _ in range(2):
        assert torch.equal(run(module, given), expected)
    assert taken(migration, "unet_1d") == (1, {verify.FAILED: 1})


# What leads to the original.


def test_scores_of_somebody_else() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    seen = []

    class Own(Attention):
        def get_attention_scores(self, query, key, attention_mask=None):
            seen.append(query.shape)
            return super().get_attention_scores(query, key, attention_mask) * 2

    theirs = Own(32, heads=4, dim_head=8, processor=AttnProcessor())
    instance = attention()
    scores = instance.get_attention_scores
    instance.get_attention_scores = lambda *args: seen.append(args[0].shape) or scores(*args)
    x = torch.randn(2, 9, 32)
    for module in (theirs, instance):
        expected = run(module, ((x,), {}))
        seen.clear()
        migration = mindiesd.patch_all(only=ONLY)
        assert torch.equal(run(module, ((x,), {})), expected)
        assert seen == [(8, 9, 8)]
        assert taken(migration, "self") == (0, {composed_attention.SCORES: 1})
        mindiesd.unpatch_all()


def test_a_changed_method_of_scores_is_not_guessed_at(monkeypatch) -> None:
    from diffusers.models import attention as mixins
    from diffusers.models.attention_processor import Attention

    def doubled(self, query, key, attention_mask=None):
        return torch.softmax(query @ key.transpose(1, 2) * 2, dim=-1)

    monkeypatch.setattr(Attention, "get_attention_scores", doubled)
    monkeypatch.setattr(mixins.AttentionModuleMixin, "get_attention_scores", doubled)
    module, given = attention().eval(), ((torch.randn(2, 9, 32),), {})
    expected = run(module, given)
    migration = mindiesd.patch_all(only=ONLY)
    assert torch.equal(run(module, given), expected)
    reason = "not rewritten: get_attention_scores: another source than the known"
    assert taken(migration, "self") == (0, {reason: 1})
    with pytest.raises(SourceUnknown, match="get_attention_scores"):
        composed_attention.build_scored(None, None)


def test_strict_raises_where_a_source_is_unknown(monkeypatch) -> None:
    """In the process and in one block; a block that is not strict goes on beside it."""
    from diffusers.models import attention as mixins
    from diffusers.models.attention_processor import Attention

    module, other, given = attention().eval(), attention().eval(), ((torch.randn(2, 9, 32),), {})

    def doubled(self, query, key, attention_mask=None):
        return torch.softmax(query @ key.transpose(1, 2) * 2, dim=-1)

    monkeypatch.setattr(Attention, "get_attention_scores", doubled)
    monkeypatch.setattr(mixins.AttentionModuleMixin, "get_attention_scores", doubled)
    expected = run(module, given)
    message = "AttnProcessor: .*AttnProcessor.__call__ not rewritten: get_attention_scores"
    with mindiesd.patch_pipeline(module, only=ONLY, strict=True):
        with pytest.raises(mindiesd.PatchError, match=message):
            run(module, given)
        run(other, given)
        with mindiesd.patch_pipeline(other, only=ONLY):
            run(other, given)
    assert torch.equal(run(module, given), expected)
    mindiesd.patch_all(only=ONLY, strict=True)
    with pytest.raises(mindiesd.PatchError, match=message):
        run(module, given)
    mindiesd.unpatch_all()
    assert torch.equal(run(module, given), expected)


def test_a_method_of_scores_that_is_replaced_later(monkeypatch) -> None:
    from diffusers.models.attention_processor import Attention

    module, given = attention().eval(), ((torch.randn(2, 9, 32),), {})
    migration = mindiesd.patch_all(only=ONLY)
    run(module, given)
    monkeypatch.setattr(Attention, "get_attention_scores", lambda self, q, k, m=None: q @ k.mT)
    got = run(module, given)
    assert taken(migration, "self") == (1, {composed_attention.SCORES: 1})
    mindiesd.unpatch_all()
    assert torch.equal(run(module, given), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [[-torch.inf], [torch.inf], [torch.nan], [0.0, -torch.inf], [-4.0], [torch.nan, 0.0]],
    ids=str,
)
def test_a_row_that_sees_no_key_is_nan_as_in_the_original(rows: list[float], dtype) -> None:
    """And infinities and NaN in the mask come out where they do there."""
    module = attention().to(dtype).eval()
    x, states = torch.randn(2, 9, 32, dtype=dtype), torch.randn(2, 4, 32, dtype=dtype)
    mask = torch.zeros(2, 9, 4, dtype=dtype)
    mask[0, 3] = torch.tensor([*rows, *[rows[-1]] * (4 - len(rows))], dtype=dtype)
    mask[1, 5, 2:] = -torch.inf
    given = (x,), {"encoder_hidden_states": states, "attention_mask": mask}
    expected = run(module, given)
    migration = mindiesd.patch_all(only=ONLY)
    got = run(module, given)
    assert taken(migration, "self") == (1, {})
    assert got.isnan().any() == (not torch.isfinite(torch.tensor(rows[0])) or rows[-1] != rows[-1])
    tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, equal_nan=True, atol=tolerance, rtol=tolerance)


def test_hooks_see_the_weights() -> None:
    module, given = build("siglip"), inputs("siglip")
    seen = []
    module.attention.register_forward_hook(lambda *args: seen.append(args[-1][1]))
    expected = run(module, given)
    migration = mindiesd.patch_all(only=ONLY)
    assert torch.equal(run(module, given), expected)
    assert torch.equal(seen[0], seen[1])
    assert taken(migration, "siglip") == (0, {composed_attention.MODULE: 1})


def test_dropout_of_the_weights() -> None:
    module, given = build("siglip").train(), inputs("siglip")
    module.attention.dropout = 0.5
    migration = mindiesd.patch_all(only=ONLY)
    torch.manual_seed(3)
    got = run(module, given)
    assert taken(migration, "siglip") == (0, {law.DROPOUT: 1})
    mindiesd.unpatch_all()
    torch.manual_seed(3)
    assert torch.equal(run(module, given), got)


# Single attentions, against float64.


class Recorder:
    """A site that keeps the reasons."""

    everywhere = True

    def __init__(self) -> None:
        self.reasons: list = []

    def takes(self, reason) -> bool:
        self.reasons.append(reason)
        return reason is None


def split(query, key, value, scale):
    weight = (query * scale) @ (key * scale).transpose(-2, -1)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return weight @ value


def channels(query, key, value, scale):
    weight = torch.einsum("bct,bcs->bts", query * scale, key * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, value)


def scores(query, key, value, attn, mask):
    return torch.bmm(attn.get_attention_scores(query, key, mask), value)


def strided(draw, shape, dtype) -> torch.Tensor:
    """A tensor of this shape, perhaps one of a larger or differently ordered memory."""
    order = draw(st.permutations(range(len(shape))))
    memory = torch.randn([shape[axis] + draw(st.integers(0, 1)) for axis in order])
    tensor = memory.permute([order.index(axis) for axis in range(len(shape))])
    return tensor[tuple(slice(size) for size in shape)].to(dtype)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(st.data(), sizes, st.sampled_from(DTYPES), st.sampled_from([0.25, 0.6, 1, 2.0]))
@torch.no_grad()
def test_heads(data, size, dtype, scale) -> None:
    batch, heads, queries, keys = size
    dim, wide = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    shapes = ((queries, dim), (keys, dim), (keys, wide))
    three = [strided(data.draw, (batch, heads, *shape), dtype) for shape in shapes]
    site = Recorder()
    got = composed_attention.build_heads(split, site)(*three, scale)
    assert site.reasons == [None]
    oracle = oracles.attention(*three, scale=scale * scale)
    assert got.dtype is dtype
    oracles.assert_as_accurate(got, split(*three, scale), oracle, _unit(dtype, oracle))
    turned = [tensor.flatten(0, 1).transpose(1, 2) for tensor in three]
    got = composed_attention.build_channels_first(channels, site)(*turned, scale)
    assert site.reasons == [None, None]
    assert got.shape == (batch * heads, wide, queries)
    got = got.transpose(1, 2).reshape(oracle.shape)
    oracles.assert_as_accurate(got, split(*three, scale), oracle, _unit(dtype, oracle))


def _unit(dtype, oracle) -> float:
    """One rounding of the result: over a single key, the original's is exact by chance."""
    return torch.finfo(dtype).eps * oracle.abs().max().item()


@settings(max_examples=60, deadline=None)
@given(
    st.data(), sizes, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([None, 1, 2, 3, 4])
)
@torch.no_grad()
def test_scores_with_masks(data, size, dtype, upcast, mask_kind) -> None:
    batch, heads, queries, keys = size
    attn = attention(heads=heads, upcast_attention=upcast, upcast_softmax=upcast)
    three = [
        strided(data.draw, (batch * heads, rows, 8), dtype) * 2 for rows in (queries, keys, keys)
    ]
    shape = {
        None: None,
        1: (batch * heads, queries, keys),
        2: (batch * heads, 1, keys),
        3: (queries, keys),
        4: (1, 1, keys),
    }[mask_kind]
    mask = None
    if shape is not None:
        mask = strided(data.draw, shape, torch.float32 if upcast else dtype)
        mask = torch.where(mask > 1, torch.full_like(mask, -10000.0), mask)
    site = Recorder()
    got = composed_attention.build_scored(scores, site)(*three, attn, mask)
    assert site.reasons == [None]
    plain = scores(*three, attn, mask)
    bias = None if mask is None else mask[:, None] if mask.dim() == 3 else mask
    oracle = oracles.attention(*(t[:, None] for t in three), bias=bias, scale=attn.scale)[:, 0]
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    extra = _unit(dtype, oracle) + oracles.slack(mask)
    oracles.assert_as_accurate(got, plain, oracle, extra)


def unusual():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    yield "a scale that is a tensor", (q, k, v, torch.tensor(0.5)), composed_attention.SCALE
    yield "heads that broadcast", (q, k[:, :1], v[:, :1], 0.5), "head counts differ"
    yield "batches that broadcast", (q, k[:1], v[:1], 0.5), "batch sizes differ"
    yield "three dimensions", (q[0], k[0], v[0], 0.5), "3-D input"
    yield "five dimensions", (q[None], k[None], v[None], 0.5), "not 4-D"
    yield "a parameter", (q, k, v.clone().requires_grad_(), 0.5), law.GRADIENTS


@pytest.mark.parametrize(("what", "operands", "why"), [*unusual()])
def test_the_original_is_called(what: str, operands, why: str) -> None:
    site = Recorder()
    got = composed_attention.build_heads(split, site)(*operands)
    assert torch.equal(got, split(*operands))
    assert len(site.reasons) == 1 and why in site.reasons[0]


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.zeros(8, 5, 5, dtype=torch.float64), composed_attention.MASK_DTYPE),
        (torch.ones(8, 5, 5, dtype=torch.bool), composed_attention.MASK_DTYPE),
        (torch.zeros(3, 5, 5), "mask does not broadcast"),
        (0.0, law.NOT_A_TENSOR),
    ],
)
@torch.no_grad()
def test_masks_that_the_original_refuses(mask, why: str) -> None:
    """It raises; so it does."""
    site, attn = Recorder(), attention()
    three = torch.randn(3, 8, 5, 8).unbind()
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        scores(*three, attn, mask)
    with pytest.raises(type(theirs.value)) as ours:
        composed_attention.build_scored(scores, site)(*three, attn, mask)
    assert str(ours.value) == str(theirs.value)
    assert site.reasons == [why]


def test_a_subclass_of_tensor_sees_every_operator() -> None:
    seen = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    three = [tensor.as_subclass(Seeing) for tensor in torch.randn(3, 1, 2, 5, 8)]
    site = Recorder()
    seen.clear()
    composed_attention.build_heads(split, site)(*three, 0.5)
    assert site.reasons == [law.UNUSUAL_ARGUMENT]
    assert "softmax" in seen


def test_traced_by_jit() -> None:
    module, given = build("unet_1d"), inputs("unet_1d")
    expected = run(module, given)
    migration = mindiesd.patch_all(only=ONLY)
    with torch.no_grad():
        traced = torch.jit.trace(module, given[0])
    assert taken(migration, "unet_1d")[1][law.JIT_TRACE]
    mindiesd.unpatch_all()
    assert torch.equal(run(traced, given), expected)


def test_signatures_are_kept() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    before = inspect.signature(AttnProcessor.__call__)
    original = AttnProcessor.__call__
    mindiesd.patch_all(only=ONLY)
    assert AttnProcessor.__call__ is not original
    assert inspect.signature(AttnProcessor.__call__) == before
    mindiesd.unpatch_all()
    assert AttnProcessor.__call__ is original


def test_its_own_projection_is_used() -> None:
    """Only the weights are left out: separate projections, biases and key lengths stay."""
    module = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True, add_zero_attn=True)
    probe, states = torch.randn(2, 1, 32), torch.randn(2, 6, 24)

    def first(attention, probe, states):
        return attention(probe, states, states)[0]

    site = Recorder()
    with torch.no_grad():
        got = composed_attention.build_pooled(first, site)(module, probe, states)
        torch.testing.assert_close(got, first(module, probe, states), rtol=1e-5, atol=1e-6)
    assert site.reasons == [None]
