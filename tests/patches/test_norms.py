"""Redirected norms and rotary helper: PyTorch's own samples, float64 oracles, every dtype pair."""

from __future__ import annotations

import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import embeddings
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import mindiesd
from mindiesd.patches import law
from tests.patches.test_sdpa import assert_same_outcome, outcome

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In a container: a module-level name bound to a target would itself be rebound by patching.
ORIGINALS = {
    "rope": embeddings.apply_rotary_emb,
    "rms_norm": F.rms_norm,
    RMSNorm: RMSNorm.forward,
    FP32LayerNorm: FP32LayerNorm.forward,
    torch.nn.LayerNorm: torch.nn.LayerNorm.forward,
}


def entry(migration: mindiesd.Migration, name: str) -> SimpleNamespace:
    redirected, _, fell_back = migration.ledger[name].snapshot()
    return SimpleNamespace(redirected=redirected, fell_back=fell_back)


def info(name: str):
    return next(info for info in op_db if info.name == name)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_pytorch_own_rms_norm_samples(dtype: torch.dtype, requires_grad: bool) -> None:
    samples = list(
        info("nn.functional.rms_norm").sample_inputs("cpu", dtype, requires_grad=requires_grad)
    )
    errors = list(info("nn.functional.rms_norm").error_inputs("cpu"))
    migration = mindiesd.patch_all(only="torch_rms_norm")
    assert F.rms_norm is not ORIGINALS["rms_norm"]
    for sample in samples + [error.sample_input for error in errors]:
        call = (sample.input, *sample.args)
        assert_same_outcome(
            outcome(F.rms_norm, *call, **sample.kwargs),
            outcome(ORIGINALS["rms_norm"], *call, **sample.kwargs),
        )
    redirected = entry(migration, "torch_rms_norm").redirected
    assert (redirected > 0) == (dtype is not torch.float64 and not requires_grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_pytorch_own_layer_norm_samples(dtype: torch.dtype) -> None:
    migration = mindiesd.patch_all(only="torch_layer_norm")
    original = ORIGINALS[torch.nn.LayerNorm]
    for sample in info("nn.functional.layer_norm").sample_inputs("cpu", dtype):
        shape = sample.args[0]
        module = torch.nn.LayerNorm(shape, sample.kwargs.get("eps", 1e-5), dtype=dtype)
        for requires_grad in (True, False):
            module.requires_grad_(requires_grad)
            assert_same_outcome(
                outcome(module, sample.input), outcome(original, module, sample.input)
            )
    found = entry(migration, "torch_layer_norm")
    if dtype is torch.float64:
        assert found.redirected == 0 and set(found.fell_back) == {law.DTYPE}
    else:
        assert found.redirected > 0 and found.fell_back[law.GRADIENTS] > 0


def rms_oracle(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float):
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.double()
    return y if bias is None else y + bias.double()


@settings(max_examples=150, deadline=None)
@given(
    x_dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dim=st.sampled_from([1, 2, 8, 33, 128]),
    magnitude=st.sampled_from([1e-4, 1.0, 100.0]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_diffusers_rms_norm(
    x_dtype, weight_dtype, bias, shape, dim, magnitude, strided, seed
) -> None:
    """Dtype of the original, and never less accurate against float64."""
    torch.manual_seed(seed)
    migration = mindiesd.patch_all(only="diffusers_rms_norm")
    module = RMSNorm(dim, eps=1e-6, elementwise_affine=weight_dtype is not None, bias=bias)
    if weight_dtype is not None:
        torch.nn.init.normal_(module.weight)
        if bias:
            torch.nn.init.normal_(module.bias)
        module.to(weight_dtype)
    x = (magnitude * torch.randn(*shape, dim)).to(x_dtype)
    if strided:
        x = x.movedim(0, -2).contiguous().movedim(-2, 0)
    before = entry(migration, "diffusers_rms_norm").redirected
    with torch.no_grad():
        ours, theirs = module(x), ORIGINALS[RMSNorm](module, x)
    assert entry(migration, "diffusers_rms_norm").redirected == before + 1
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    exact = rms_oracle(x, module.weight, module.bias, module.eps)
    # Comparing maxima over few elements: one unit of float32 rounding is no less accurate.
    slack = 4e-7 * exact.abs().max()
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max() + slack


@settings(max_examples=100, deadline=None)
@given(
    x_dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, *DTYPES]),
    dim=st.sampled_from([1, 8, 33, 128]),
    offset=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_fp32_layer_norm(x_dtype, weight_dtype, dim, offset, seed) -> None:
    torch.manual_seed(seed)
    migration = mindiesd.patch_all(only="fp32_layer_norm")
    module = FP32LayerNorm(dim, elementwise_affine=weight_dtype is not None)
    if weight_dtype is not None:
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
        module.to(weight_dtype)
    x = (torch.randn(2, 3, dim) + offset).to(x_dtype)
    before = entry(migration, "fp32_layer_norm").redirected
    with torch.no_grad():
        ours, theirs = module(x), ORIGINALS[FP32LayerNorm](module, x)
    assert entry(migration, "fp32_layer_norm").redirected == before + 1
    assert ours.dtype == theirs.dtype == x_dtype
    wide = x.double()
    exact = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, unbiased=False, keepdim=True) + module.eps
    ).sqrt()
    if weight_dtype is not None:
        exact = exact * module.weight.double() + module.bias.double()
    # float32 evaluates x / sigma - mean / sigma: its rounding is relative to those terms.
    terms = wide.abs() / (wide.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
    if weight_dtype is not None:
        terms = terms * module.weight.double().abs()
    slack = 2**-22 * terms.max()
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max() + slack


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from(DTYPES),
    sequence_dim=st.sampled_from([1, 2]),
    unbind=st.sampled_from([-1, -2]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    dim=st.sampled_from([2, 8, 10, 64]),
    view=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_diffusers_rope(dtype, table_dtype, sequence_dim, unbind, sizes, dim, view, seed) -> None:
    torch.manual_seed(seed)
    migration = mindiesd.patch_all(only="diffusers_rope")
    x = torch.randn(*sizes, 2 * dim).to(dtype)[..., ::2] if view else torch.randn(*sizes, dim)
    x = x.to(dtype)
    tables = torch.randn(2, sizes[sequence_dim], dim).to(table_dtype)
    cos, sin = tables
    kwargs = {"sequence_dim": sequence_dim, "use_real_unbind_dim": unbind}
    before = entry(migration, "diffusers_rope").redirected
    ours = embeddings.apply_rotary_emb(x, (cos, sin), **kwargs)
    assert entry(migration, "diffusers_rope").redirected == before + 1
    assert_same_outcome(ours, ORIGINALS["rope"](x, (cos, sin), **kwargs))


def test_rope_calls_that_stay_with_the_original() -> None:
    from mindiesd.patches.rope import forms, kept, shared

    migration = mindiesd.patch_all(only="diffusers_rope")
    x = torch.randn(1, 2, 3, 8)
    table = torch.randn(3, 8)
    complex_table = torch.polar(torch.ones(1, 2, 4), torch.randn(1, 2, 4))
    calls = [
        ((x, complex_table.to(torch.complex128)), {"use_real": False}, forms.FLOAT64),
        ((x, complex_table[:, :1]), {"use_real": False}, kept.TABLE_SHAPE),
        ((x[0], (table, table)), {}, shared.LAYOUT),
        ((x, (table, table)), {"sequence_dim": 3}, shared.LAYOUT),
        ((x, (table[:2], table[:2])), {}, kept.TABLE_SHAPE),
        ((x, (table.double(), table.double())), {}, law.DTYPE),
        ((x.clone().requires_grad_(), (table, table)), {}, law.GRADIENTS),
        ((x, table), {}, law.UNUSUAL_ARGUMENT),
    ]
    for args, kwargs, reason in calls:
        theirs = outcome(ORIGINALS["rope"], *args, **kwargs)
        assert_same_outcome(outcome(embeddings.apply_rotary_emb, *args, **kwargs), theirs)
        assert entry(migration, "diffusers_rope").fell_back.get(reason), reason
    assert entry(migration, "diffusers_rope").redirected == 0


def test_norm_calls_that_stay_with_the_original() -> None:
    migration = mindiesd.patch_all()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        matrix = RMSNorm((4, 8), 1e-6)
        assert_same_outcome(matrix(x), ORIGINALS[RMSNorm](matrix, x))
        mixed = torch.nn.LayerNorm(8).bfloat16()
        assert_same_outcome(outcome(mixed, x), outcome(ORIGINALS[torch.nn.LayerNorm], mixed, x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for module in (RMSNorm(8, 1e-6), FP32LayerNorm(8), torch.nn.LayerNorm(8)):
                assert_same_outcome(module(x), ORIGINALS[type(module)](module, x))
    assert entry(migration, "diffusers_rms_norm").fell_back == {
        law.WEIGHT_SHAPE: 1,
        law.AUTOCAST: 1,
    }
    assert entry(migration, "torch_layer_norm").fell_back == {law.MIXED_DTYPES: 1, law.AUTOCAST: 1}
    assert entry(migration, "fp32_layer_norm").fell_back == {law.AUTOCAST: 1}


@pytest.mark.parametrize(
    ("place", "original"),
    [
        (lambda: F.rms_norm, ORIGINALS["rms_norm"]),
        (lambda: embeddings.apply_rotary_emb, ORIGINALS["rope"]),
        (lambda: RMSNorm.forward, ORIGINALS[RMSNorm]),
        (lambda: FP32LayerNorm.forward, ORIGINALS[FP32LayerNorm]),
        (lambda: torch.nn.LayerNorm.forward, ORIGINALS[torch.nn.LayerNorm]),
    ],
)
def test_looks_like_the_original(place, original) -> None:
    mindiesd.patch_all()
    function = place()
    assert function is not original and inspect.isfunction(function)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(function, name) == getattr(original, name), name
    assert inspect.signature(function) == inspect.signature(original)
    assert inspect.getsource(function) == inspect.getsource(original)
    own = inspect.signature(function, follow_wrapped=False)
    assert list(own.parameters) == list(inspect.signature(original).parameters)
    data = pickle.dumps(function)
    assert pickle.loads(data) is function
    mindiesd.unpatch_all()
    assert pickle.loads(data) is original


def test_rms_norm_modes_see_the_public_function() -> None:
    from torch.overrides import TorchFunctionMode

    mindiesd.patch_all()
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 8)
    with Mode(), torch.no_grad():
        torch.nn.RMSNorm(8)(x)
        torch.nn.LayerNorm(8)(x)
    assert F.rms_norm in seen and F.layer_norm in seen


class Norms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LayerNorm(8)
        self.rms = torch.nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rms(self.layer(x)) + F.rms_norm(x, [8])


def test_jit_script_jit_trace_and_fx() -> None:
    """A scripted module compiles from the original's source, patched or not."""
    module = Norms().eval()
    x = torch.randn(2, 3, 8)
    expected = module(x)
    mindiesd.patch_all()
    with torch.no_grad():
        assert torch.equal(torch.jit.script(module)(x), expected)
        assert torch.equal(torch.jit.trace(module, x)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(module)(x), expected)
