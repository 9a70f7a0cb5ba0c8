"""layernorm_scale_shift against the oracle and against the three steps it replaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mindiesd import ParametersInvalid, layernorm_scale_shift
from mindiesd.ops.ada_norm import layer_norm_scale_shift
from tests import oracles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def oracle_of(module, x, scale, shift):
    scale, shift = (t if t.dim() == 3 else t[:, None] for t in (scale, shift))
    normed = oracles.layer_norm(x, module.weight, module.bias, module.eps)
    return normed * (1 + scale.double()) + shift.double()


def layer(hidden, **options):
    module = nn.LayerNorm(hidden, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(hidden))
    return module


OPTIONS = ({}, {"bias": False}, {"elementwise_affine": False})


@given(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 17)),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *DTYPES]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.integers(0, 1000),
)
def test_against_the_oracle(sizes, dtype, other, flat_scale, flat_shift, options, fused, seed):
    batch, length, hidden = sizes
    torch.manual_seed(seed)
    module = layer(hidden, **options).to(other or dtype)
    x = torch.randn(batch, hidden, length).to(dtype).transpose(1, 2)
    scale, shift = torch.randn(2, batch, 1, hidden).to(other or dtype)
    scale = scale[:, 0] if flat_scale else scale
    shift = shift[:, 0] if flat_shift else shift
    before = x.clone()
    out = layernorm_scale_shift(module, x, scale, shift, fused)
    assert out.dtype is dtype
    assert torch.equal(x, before)
    oracle = oracle_of(module, x, scale, shift)
    oracles.assert_close(out, oracle)
    if other is None:
        three, four = (t if t.dim() == 3 else t[:, None] for t in (scale, shift))
        theirs = module(x) * (1 + three) + four
        oracles.assert_as_accurate(out, theirs, oracle)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("batch", [1, 3])
def test_half_precision_is_rounded_once(dtype, batch):
    module = layer(256).to(dtype)
    x = torch.randn(batch, 32, 256).to(dtype)
    scale, shift = torch.randn(2, batch, 256).to(dtype)
    out = layernorm_scale_shift(module, x, scale, shift)
    right = oracle_of(module, x, scale, shift).to(dtype)
    assert (out != right).float().mean() < 2e-3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_modulation_per_token(batch, dtype):
    module = layer(16).to(dtype)
    x, scale, shift = torch.randn(3, batch, 5, 16).to(dtype)
    for t in (shift, shift[:, :1]):
        out = layer_norm_scale_shift(x, module.weight, module.bias, module.eps, scale, t)
        oracles.assert_close(out, oracle_of(module, x, scale, t))


def test_float64():
    module = layer(16).double()
    x, scale, shift = torch.randn(3, 2, 1, 16, dtype=torch.float64)
    for rows in (slice(None), slice(1)):
        out = layernorm_scale_shift(module, x[rows], scale[rows], shift[rows])
        assert oracles.error(out, oracle_of(module, x[rows], scale[rows], shift[rows])) < 1e-13


H = {"x": torch.randn(2, 5, 16), "scale": torch.randn(2, 16), "shift": torch.randn(2, 1, 16)}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layernorm": nn.RMSNorm(16)}, "layernorm"),
        ({"layernorm": nn.LayerNorm((5, 16))}, "layernorm"),
        ({"layernorm": nn.LayerNorm(8)}, "x"),
        ({"x": torch.randn(5, 16)}, "x"),
        ({"x": None}, "x"),
        ({"scale": torch.randn(1, 16)}, "scale"),
        ({"scale": torch.randn(1, 1, 16)}, "scale"),
        ({"scale": torch.randn(2, 5, 16)}, "scale"),
        ({"scale": torch.randn(16)}, "scale"),
        ({"scale": torch.randn(2, 1, 1)}, "scale"),
        ({"scale": 1.0}, "scale"),
        ({"shift": torch.randn(2, 15)}, "shift"),
        ({"shift": torch.randn(3, 16)}, "shift"),
        ({"shift": torch.ones(2, 16, dtype=torch.int32)}, "shift"),
        ({"shift": torch.randn(2, 16, device="meta")}, "shift"),
        ({"fused": None}, "fused"),
    ],
)
def test_wrong_arguments(changes, name):
    with pytest.raises(ParametersInvalid) as caught:
        layernorm_scale_shift(**{"layernorm": nn.LayerNorm(16), **H, **changes})
    assert caught.value.argument == name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("which", ["x", "scale", "shift"])
def test_nested_tensors_are_refused(which, layout):
    """Those of the first kind have no shape to ask for."""
    given = {"x": torch.randn(2, 3, 8), "scale": torch.randn(2, 8), "shift": torch.randn(2, 8)}
    given[which] = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    with pytest.raises(ParametersInvalid, match=f"^{which}: .*nested"):
        layernorm_scale_shift(nn.LayerNorm(8), **given)
