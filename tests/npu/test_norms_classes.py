"""Redirected norms, gates and GELUs on the emulated device: launches, float64, limits, weights."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.emulator import trace
from mindiesd.ops import activation as ops
from mindiesd.ops import norm as norm_ops
from mindiesd.ops.backends.npu import soc
from mindiesd.patches import channel_norm, rms_classes
from tests import oracles
from tests.patches.norm_cases import CENTRED, DTYPES, changes, make, oracle, unpatched

RECORDS = {record.name: record for record in rms_classes.RECORDS}


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def counted(function, *args):
    with torch.no_grad(), trace() as found:
        result = function(*args)
    return result, found


def assert_accurate(ours, theirs, exact):
    slack = 1e-6 * exact.abs().max()
    errors = [(t.cpu().double() - exact).abs().max() for t in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1] + slack, errors


def test_launches_of_every_rms_norm():
    """One kernel, and at most a cast or the vector of 1 + weight beside it."""
    x = torch.randn(2, 4, 32)
    pairs = [(weight, dtype) for weight in DTYPES for dtype in DTYPES]
    modules = {name: make(record, 32, torch.float32) for name, record in RECORDS.items()}

    def run_all():
        found = {}
        for name, module in modules.items():
            kept = copy.deepcopy(module)
            for weight, dtype in pairs:
                one = copy.deepcopy(kept).to(weight).npu()
                counted(one, x.to(dtype).npu())  # constants are made once
                found[name, weight, dtype] = counted(one, x.to(dtype).npu())
        return found

    plain = run_all()
    migration = mindiesd.patch_all(only="rms_norm")
    patched = run_all()
    for (name, weight, dtype), (ours, after) in patched.items():
        theirs, before = plain[name, weight, dtype]
        case = (name, weight, dtype)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), case
        exact = oracle(copy.deepcopy(modules[name]).to(weight), x.to(dtype))
        assert_accurate(ours, theirs, exact)
        kernels = [n for n in after.launches if n.startswith("npu::npu_") and "norm" in n]
        assert sum(after.launches[n] for n in kernels) == 1, case
        if weight is dtype:
            extra = RECORDS[name].attribute[:-8] in CENTRED and dtype is not torch.float32
            assert after.total == 1 + extra, (case, after.launches)
        assert after.total <= 4 < before.total, (case, after.launches, before.launches)
        assert not after.layout_copies
        assert not migration.ledger[name].snapshot()[2], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2_Gemma2RMSNorm", "diffusers_Krea2RMSNorm"])
def test_a_changed_weight_is_never_overlooked(name, dtype):
    mindiesd.patch_all(only=name)
    module = make(RECORDS[name], 16, dtype).npu()
    x = torch.randn(3, 16).to(dtype)
    for change in changes(module):
        with torch.no_grad():
            module(x.npu())
        change()
        with torch.no_grad():
            ours = module(x.npu()).cpu()
        exact = oracle(module.cpu(), x)
        module.npu()
        tolerance = (2**-7 if dtype is torch.bfloat16 else 1e-5) * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= tolerance, change.__name__


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kept", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (1, 1, 1, 1, 1, 1, 1, 2, 40), (0, 40)])
def test_centred_rms_norm(dtype, kept, shape):
    x, weight = torch.randn(shape).to(dtype).npu(), torch.randn(40).to(kept).npu()
    out = norm_ops.centred_rms_norm(x, weight, 1e-6)
    assert out.dtype is dtype and out.shape == x.shape
    oracles.assert_close(out.cpu(), oracles.rms_norm(x.cpu(), 1 + weight.cpu().double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_centred_rms_norm_of_a_transposed_view_copies_nothing(dtype):
    x = torch.randn(2, 9, 4, 16).to(dtype).npu().transpose(1, 2)
    weight = torch.randn(16).to(dtype).npu()
    norm_ops.centred_rms_norm(x, weight, 1e-6)
    out, found = counted(norm_ops.centred_rms_norm, x, weight, 1e-6)
    assert found.total <= 2 and not found.layout_copies
    oracles.assert_close(out.cpu(), oracles.rms_norm(x.cpu(), 1 + weight.cpu().double(), 1e-6))


def test_diffusers_rms_norm_without_a_weight_and_on_the_host():
    """What diffusers' own NPU branch cannot do: it fails on a tensor of the host."""
    from diffusers.models.normalization import RMSNorm

    weighted, plain = RMSNorm(16, 1e-6), RMSNorm(16, 1e-6, elementwise_affine=False)
    x = torch.randn(2, 16)
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError)):
        weighted(x)
    mindiesd.patch_all()
    for dtype in DTYPES:
        for module in (weighted.to(dtype), plain):
            with torch.no_grad():
                for where in ("cpu", "npu"):
                    out = module.to(where)(x.to(dtype).to(where))
                    assert out.dtype is dtype and out.device.type == where
                    weight = None if module.weight is None else module.weight.cpu()
                    oracles.assert_close(out.cpu(), oracles.rms_norm(x.to(dtype), weight, 1e-6))


def test_channel_norms():
    migration = mindiesd.patch_all(only="channel_norm")
    for record in channel_norm.RECORDS:
        owner = getattr(importlib.import_module(record.module), record.attribute.split(".")[0])
        video = "Kandinsky" in record.name
        for dtype in DTYPES:
            module = (owner(8) if video else owner(8, images=False)).to(dtype)
            torch.nn.init.normal_(module.gamma)
            x = torch.randn(2, 8, 3, 4, 5).to(dtype)
            exact = x.double() / x.double().square().sum(1, keepdim=True).sqrt()
            exact = exact * 8**0.5 * module.gamma.detach().double()
            module.npu()
            ours, after = counted(module, x.npu())
            theirs, before = counted(unpatched(module), module, x.npu())
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
            assert_accurate(ours, theirs, exact)
            if dtype is torch.float32:
                assert after.total == before.total if video else after.total < before.total
            else:
                assert after.total <= before.total - (1 if video else 2), (
                    record.name,
                    before.launches,
                    after.launches,
                )
                assert after.bytes_read + after.bytes_written < 0.75 * (
                    before.bytes_read + before.bytes_written
                )
    assert migration.report().redirected


def erf(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def test_gelu_is_the_erf_form_where_it_is_asked_for():
    from diffusers.models import activations
    from transformers.activations import GELUActivation

    x = torch.linspace(-6, 6, 4001)
    plain = torch.nn.GELU()
    held = GELUActivation()
    wrong = (plain(x.npu()).cpu() - erf(x.double())).abs().max()
    assert wrong > 4e-4, "the device computes the tanh form"
    mindiesd.patch_all(only="activation")
    tanh = F.gelu(x.double(), approximate="tanh")
    for module in (plain, held, F.gelu):
        assert (module(x.npu()).cpu() - erf(x.double())).abs().max() < 2e-6
    assert (torch.nn.GELU("tanh")(x.npu()).cpu() - tanh).abs().max() < 2e-6
    proj = activations.GELU(8, 8).npu()
    with torch.no_grad():
        y = torch.randn(3, 8)
        ours = proj(y.npu()).cpu()
        proj.cpu()
        oracles.assert_close(ours, erf(proj.proj(y).double()))


def test_geglu_is_the_erf_form_and_works_on_the_host():
    from diffusers.models.activations import GEGLU

    module, x = GEGLU(16, 24).eval(), torch.randn(5, 16)
    with torch.no_grad():
        with pytest.raises((NotImplementedError, RuntimeError)):
            module(x)
        theirs = module.npu()(x.npu()).cpu()
        mindiesd.patch_all(only="activation")
        ours, found = counted(module, x.npu())
        assert found.launches["npu::npu_geglu"] == 1
        hidden, gate = module.cpu().proj(x).double().chunk(2, -1)
        exact = hidden * erf(gate)
        assert (ours.cpu() - exact).abs().max() < 2e-6 < 1e-5 < (theirs - exact).abs().max()
        assert (module(x) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("memory", ["dense", "sliced"])
def test_geglu_and_swiglu(dtype, kind, memory):
    x = (2 * torch.randn(3, 5, 48)).to(dtype)
    if memory == "sliced":
        x = x.repeat_interleave(2, 1)[:, ::2]
        x = torch.cat([x, x], -1)[..., :48]
    left, right = x.double().chunk(2, -1)
    out = ops.geglu(x.npu(), kind)
    assert out.dtype is dtype
    oracles.assert_close(out.cpu(), left * F.gelu(right, approximate=kind))
    out, found = counted(ops.swiglu, x.npu())
    assert out.dtype is dtype and not found.layout_copies
    oracles.assert_close(out.cpu(), F.silu(left) * right)
    if dtype is not torch.float64 and memory == "dense":
        assert found.launches == {"npu::npu_swiglu": 1}


def test_gated_units_within_the_limits(monkeypatch):
    """Empty inputs, and a series without the kernels."""
    for function in (ops.geglu, ops.swiglu):
        assert function(torch.randn(0, 8).npu()).shape == (0, 4)
    monkeypatch.setattr(soc, "series", lambda: soc.I310P)
    x = torch.randn(3, 8)
    for function in (ops.geglu, ops.swiglu):
        _, found = counted(function, x.npu())
        assert not any("glu" in name.replace("gelu", "") for name in found.launches)
    left, right = x.double().chunk(2, -1)
    oracles.assert_close(ops.geglu(x.npu()).cpu(), left * erf(right))


def test_launches_of_activations():
    from diffusers.models.activations import ApproximateGELU
    from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
    from transformers import GlmConfig
    from transformers import activations as text
    from transformers.models.glm.modeling_glm import GlmMLP

    glm = GlmMLP(GlmConfig(hidden_size=16, intermediate_size=24, pad_token_id=0))
    cases = [
        (text.NewGELUActivation(), 8, 1),
        (text.QuickGELUActivation(), 3, 1),
        (ApproximateGELU(16, 16), 4, 2),
        (Flux2SwiGLU(), 2, 1),
        (glm, 4, 3),
    ]
    x = torch.randn(2, 16)
    for module, theirs, mine in cases:
        module.eval().npu()
        plain, before = counted(module, x.npu())
        assert before.total == theirs, (module, before.launches)
        mindiesd.patch_all(only="activation")
        ours, after = counted(module, x.npu())
        mindiesd.unpatch_all()
        assert after.total == mine, (module, after.launches)
        assert (ours - plain).abs().max() < 1e-5


def test_launches_of_adaptive_norms():
    from diffusers.models import normalization as classes

    cases = [
        (classes.AdaLayerNormZero(16), "emb", 4, 2, 3),
        (classes.AdaLayerNormContinuous(16, 16, False), "conditioning_embedding", 4, 2, 3),
        (classes.LuminaRMSNormZero(16, 1e-5, True), "emb", 3, 2, 3),
        (classes.LuminaLayerNormContinuous(16, 16, False), "conditioning_embedding", 3, 2, 3),
    ]
    for module, name, theirs, single, several in cases:
        module.npu()
        for batch, mine in ((1, single), (2, several)):
            x, given = torch.randn(batch, 9, 16).npu(), torch.randn(batch, 16).npu()

            def run(module=module, x=x, name=name, given=given):
                result = module(x, **{name: given})
                return result if isinstance(result, torch.Tensor) else result[0]

            plain, before = counted(run)
            mindiesd.patch_all(only="ada_norm")
            run()
            ours, after = counted(run)
            mindiesd.unpatch_all()
            # SiLU and projection before; after, the SiLU of the same conditioning is remembered.
            assert (before.total, after.total) == (theirs + 2, mine + 1), (
                module,
                before.launches,
                after.launches,
            )
            assert (ours - plain).abs().max() < 1e-5
