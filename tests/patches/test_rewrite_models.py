"""Every rewritten function of diffusers: its source is the known one, its result as accurate."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
import wrapt
from torch import nn

import mindiesd
from mindiesd.patches import (
    composed_attention,
    conditioning,
    group_norm,
    inline_rope,
    modulation,
    registry,
    tables,
)
from mindiesd.patches.rewriting.rewrite import rewrite
from mindiesd.patches.scope import Site
from tests import oracles
from tests.emulator.tiny_models import MODELS, first_tensor

FAMILIES = {
    "composed_attention": composed_attention,
    "inline_rope": inline_rope,
    "modulation": modulation,
    "conditioning": conditioning,
    "group_norm": group_norm,
    "tables": tables,
}
RECORDS = [(family, record) for family in FAMILIES for record in FAMILIES[family].RECORDS]


@pytest.mark.parametrize(
    ("family", "record"), [pytest.param(*pair, id=pair[1].name) for pair in RECORDS]
)
def test_the_installed_source_is_the_known_one(family: str, record) -> None:
    importlib.import_module(record.module)
    function = wrapt.resolve_path(record.module, record.attribute)[2]
    site = Site(record.name)
    site.arm()
    made = rewrite(function, FAMILIES[family]._BY_NAME[record.name].counts, site)
    assert made is not function
    if family != "tables":  # those are redirected whole
        assert inspect.signature(made) == inspect.signature(function)


def test_names_are_unique() -> None:
    names = [record.name for _, record in RECORDS]
    assert len(set(names)) == len(names)


def test_a_function_is_rewritten_once() -> None:
    """The second to rewrite it would start from the source, without what the first redirected."""
    rewritten = [r.target for r in registry.records() if r.reference == registry.INSIDE]
    assert len(rewritten) > 150
    assert len(set(rewritten)) == len(rewritten)


# Whole models.

FAST = ("flux", "wan", "mochi", "cogview4")
SLOW = (
    *("auraflow", "bria", "chroma", "chronoedit", "cogvideox", "easyanimate", "flux2", "dit"),
    *(
        "allegro",
        "hidream",
        "sana_video",
        "sd3",
        "hunyuan_video",
        "hunyuan15",
        "joyimage",
        "krea2",
        "longcat",
        "longcat_audio",
        "ltx",
    ),
    *("lumina2", "lumina_next", "ovis", "pixart", "prx", "qwenimage", "sana", "sd35"),
    *("skyreels", "stable_audio3", "wan_vace", "latte", "cogview3", "glm", "ernie", "t5_film"),
)
# Linear attention divides by sums near zero: one picture in float16 says little.
SEEDS = {"sana": tuple(range(1, 13))}


def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast(entry, dtype) for entry in value)
    return value


@torch.no_grad()
def run(model, inputs) -> torch.Tensor:
    return first_tensor(model(**inputs))


def rms(values) -> float:
    return torch.cat([value.flatten() for value in values]).square().mean().sqrt().item()


def check(name: str, dtype: torch.dtype, only=("inline_rope", "modulation")) -> None:
    """Ours against the original, both against the same weights and inputs in float64."""
    model = MODELS[name].build().to(dtype)
    draws = []
    for seed in SEEDS.get(name, (1, 2)):
        torch.manual_seed(seed)
        draws.append({key: cast(value, dtype) for key, value in MODELS[name].inputs().items()})
    plain = [run(model, inputs) for inputs in draws]
    migration = mindiesd.patch_all(only=only)
    patched = [run(model, inputs) for inputs in draws]
    report = migration.report()
    mindiesd.unpatch_all()
    assert report.redirected
    assert not any("rewritten" in reason for p in report.patches for reason in p.fell_back)
    assert torch.equal(run(model, draws[0]), plain[0]), "undone"
    model.double()
    exact = [run(model, {k: cast(v, torch.float64) for k, v in inputs.items()}) for inputs in draws]
    ours, theirs = [], []
    for here, there, right in zip(patched, plain, exact, strict=True):
        assert (here.dtype, here.shape) == (there.dtype, there.shape)
        ours.append(here.double() - right)
        theirs.append(there.double() - right)
    largest = max(right.abs().max().item() for right in exact)
    floor = torch.finfo(torch.float32).eps * max(1.0, largest)
    assert rms(ours) <= 1.1 * rms(theirs) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAST)
def test_as_accurate(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SLOW)
def test_as_accurate_too(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z_image", "kandinsky5", "motif"])
def test_close_in_float32(name: str) -> None:
    """Their own forward cannot be run in another dtype as a whole."""
    model, inputs = MODELS[name].build(), MODELS[name].make_inputs()
    plain = run(model, inputs)
    migration = mindiesd.patch_all(only=("inline_rope", "modulation"))
    patched = run(model, inputs)
    assert migration.report().redirected
    torch.testing.assert_close(patched, plain, rtol=1e-5, atol=1e-5)


# Single expressions, against float64.


class Recorder:
    """A site that keeps the reasons."""

    everywhere = True

    def __init__(self) -> None:
        self.reasons: list = []

    def takes(self, reason) -> bool:
        self.reasons.append(reason)
        return reason is None


def norm_modulate(norm, x, scale, shift):
    return norm(x) * (1 + scale) + shift


def modulate(x, scale, shift):
    return x * (1 + scale) + shift


def gated(x, y, gate):
    return x + y * gate


def operands(dtype, batch=2, per_token=False):
    torch.manual_seed(3)
    x, y = torch.randn(2, batch, 40, 48).to(dtype).unbind()
    rows = 40 if per_token else 1
    scale, shift, gate = (torch.randn(3, batch, rows, 48) * 0.5).to(dtype).unbind()
    return x, y, scale, shift, gate


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_modulated_norm(dtype, affine: bool, batch: int, per_token: bool) -> None:
    x, _, scale, shift, _ = operands(dtype, batch, per_token)
    norm = nn.LayerNorm(48, eps=1e-6, elementwise_affine=affine).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.1)
    site = Recorder()
    made = modulation.build_norm_modulate(norm_modulate, site)
    got = made(norm, x, scale, shift)
    exact = oracles.layer_norm(x, norm.weight, norm.bias, norm.eps)
    exact = exact * (1 + scale.double()) + shift.double()
    plain = norm_modulate(norm, x, scale, shift)
    assert site.reasons == [None]
    assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
    assert rms([got - exact]) <= 1.02 * rms([plain - exact]) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_modulation_and_gate(dtype) -> None:
    x, y, scale, shift, gate = operands(dtype)
    d = [tensor.double() for tensor in (x, y, scale, shift, gate)]
    for made, original, given, exact in (
        (modulation.build_modulate, modulate, (x, scale, shift), d[0] * (1 + d[2]) + d[3]),
        (modulation.build_gated_residual, gated, (x, y, gate), d[0] + d[1] * d[4]),
    ):
        site = Recorder()
        got, plain = made(original, site)(*given), original(*given)
        assert site.reasons == [None]
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape)
        assert rms([got - exact]) <= 1.02 * rms([plain - exact]) + 1e-7


@pytest.mark.parametrize("half", HALF)
@torch.no_grad()
def test_a_float32_stream_with_half_operands(half) -> None:
    x, y, scale, shift, gate = operands(torch.float32)
    norm = nn.LayerNorm(48, elementwise_affine=False)
    narrow = [tensor.to(half) for tensor in (y, scale, shift, gate)]
    for made, original, given in (
        (modulation.build_modulate, modulate, (x, narrow[1], narrow[2])),
        (modulation.build_norm_modulate, norm_modulate, (norm, x, narrow[1], narrow[2])),
        (modulation.build_gated_residual, gated, (x, narrow[0], gate)),
        (modulation.build_gated_residual, gated, (x, y, narrow[3])),
    ):
        site = Recorder()
        got, plain = made(original, site)(*given), original(*given)
        exact = original(*(v.double() if isinstance(v, torch.Tensor) else v for v in given))
        assert site.reasons == [None]
        assert got.dtype is plain.dtype is torch.float32
        assert rms([got - exact]) <= 1.02 * rms([plain - exact]) + 1e-7


def unusual():
    x, y, _, _, gate = operands(torch.float32)
    wide = gate.double()
    learned = gate.clone().requires_grad_()
    yield "dtype", (x.double(), y.double(), wide)
    yield "mixed", (x, y, wide)
    yield "mixed", (x.bfloat16(), y, gate)
    yield "half product", (x, y.bfloat16(), gate.bfloat16())
    yield "gradients", (x, y, learned)
    yield "number", (x, y, 2.0)
    yield "integers", (x, y.long(), gate)


@pytest.mark.parametrize(("kind", "given"), [pytest.param(*case, id=case[0]) for case in unusual()])
def test_everything_else_is_the_original(kind: str, given) -> None:
    site = Recorder()
    got, plain = modulation.build_gated_residual(gated, site)(*given), gated(*given)
    assert site.reasons[0] is not None
    assert got.dtype is plain.dtype
    assert torch.equal(got, plain)
    assert got.requires_grad is plain.requires_grad


def test_autocast_decides() -> None:
    x, y, scale, shift, gate = operands(torch.float32)
    site = Recorder()
    norm = nn.LayerNorm(48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for made, original, given in (
            (modulation.build_gated_residual, gated, (x, y, gate)),
            (modulation.build_norm_modulate, norm_modulate, (norm, x, scale, shift)),
        ):
            assert torch.equal(made(original, site)(*given), original(*given))
    assert all(reason is not None for reason in site.reasons)


@torch.no_grad()
def test_a_norm_with_hooks_is_called() -> None:
    x, _, scale, shift, _ = operands(torch.float32)
    norm = nn.LayerNorm(48)
    seen = []
    handle = norm.register_forward_hook(lambda *args: seen.append(1))
    site = Recorder()
    made = modulation.build_norm_modulate(norm_modulate, site)
    plain = norm_modulate(norm, x, scale, shift)
    torch.testing.assert_close(made(norm, x, scale, shift), plain)
    assert len(seen) == 2
    handle.remove()
    norm.forward = lambda value: value * 0
    torch.testing.assert_close(made(norm, x, scale, shift), shift.expand_as(x))
    assert site.reasons == [None, None]


@torch.no_grad()
def test_other_norms_are_called_once() -> None:
    x, _, scale, shift, _ = operands(torch.float32)

    class Counting(nn.LayerNorm):
        calls = 0

        def forward(self, value):
            type(self).calls += 1
            return super().forward(value) + 1

    norm = Counting(48)
    made = modulation.build_norm_modulate(norm_modulate, Recorder())
    for operand in (scale, scale.double()):
        Counting.calls = 0
        got = made(norm, x, operand, shift)
        assert Counting.calls == 1
        torch.testing.assert_close(got, norm_modulate(norm, x, operand, shift))


@pytest.mark.parametrize("name", ["flux", "wan"])
@torch.no_grad()
def test_one_pipeline_only(name: str) -> None:
    tiny = MODELS[name]
    model, other, inputs = tiny.build(), tiny.build(), tiny.make_inputs()
    expected = run(model, inputs)
    with mindiesd.patch_pipeline(model, only=("inline_rope", "modulation")) as migration:
        got = run(model, inputs)
        inside = migration.report().redirected
        assert torch.equal(run(other, inputs), expected)
        assert migration.report().redirected == inside > 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(model, inputs), expected)


def test_undone_exactly() -> None:
    def found():
        return [
            vars(wrapt.resolve_path(r.module, r.attribute)[0])[r.attribute.rpartition(".")[2]]
            for _, r in RECORDS
        ]

    for _, record in RECORDS:
        importlib.import_module(record.module)
    before = found()
    migration = mindiesd.patch_all()
    assert not any(ours is theirs for ours, theirs in zip(found(), before, strict=True))
    assert all(p.status == "applied" for p in migration.report().patches if "." in p.name)
    mindiesd.unpatch_all()
    assert all(ours is theirs for ours, theirs in zip(found(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["flux", "wan", "mochi", "sd3"])
@torch.no_grad()
def test_compiled(name: str, backend: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    expected = run(model, inputs)
    torch.compiler.reset()
    migration = mindiesd.patch_all(only=tuple(FAMILIES))
    run(model, inputs)
    eager = {p.name: p.redirected for p in migration.report().patches}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), expected, rtol=1e-4, atol=1e-4)
    assert {p.name: p.traced for p in migration.report().patches} == eager
    torch.compiler.reset()
