"""RMSNorm, fast_layernorm and the unchecked norms, against the oracle and torch's own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mindiesd import ParametersInvalid, RMSNorm, fast_layernorm
from mindiesd.ops import norm
from tests import oracles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL = (*DTYPES, torch.float64)


@st.composite
def tensors(draw, ranks=(1, 8)):
    rank = draw(st.integers(*ranks))
    shape = [draw(st.integers(0, 3)) for _ in range(rank - 1)] + [draw(st.integers(1, 33))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    x = x.to(draw(st.sampled_from(DTYPES)))
    if rank > 1 and draw(st.booleans()):
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    if draw(st.booleans()):
        x = torch.cat((x, x), -1)[..., : shape[-1]]
    return x, generator


@given(tensors(), st.sampled_from([None, *DTYPES]), st.sampled_from([1e-6, 1e-3, 0.0]))
def test_rms_norm(case, weight_dtype, eps):
    x, generator = case
    weight = None
    if weight_dtype is not None:
        weight = torch.randn(x.shape[-1], generator=generator).to(weight_dtype)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = norm.rms_norm(x, weight, eps)
        theirs = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    assert ours.dtype is x.dtype
    assert torch.equal(x, before)
    oracle = oracles.rms_norm(x, weight, eps)
    if weight is None or weight.dtype is x.dtype:
        assert torch.equal(ours, theirs)
    oracles.assert_as_accurate(ours, theirs, oracle)
    oracles.assert_close(ours, oracle)


@given(
    tensors((1, 4)),
    st.sampled_from([None, *DTYPES]),
    st.sampled_from([None, *DTYPES]),
    st.integers(1, 2),
)
def test_layer_norm(case, weight_dtype, bias_dtype, dims):
    x, generator = case
    dims = min(dims, x.dim())
    shape = x.shape[-dims:]
    if 0 in shape:
        shape, dims = x.shape[-1:], 1

    def parameter(dtype):
        return None if dtype is None else torch.randn(shape, generator=generator).to(dtype)

    weight, bias = parameter(weight_dtype), parameter(bias_dtype)
    ours = norm.layer_norm(x, tuple(shape), weight, bias, 1e-5)
    assert ours.dtype is x.dtype
    oracle = oracles.layer_norm(x, weight, bias, 1e-5, dims)
    theirs = F.layer_norm(
        x,
        shape,
        None if weight is None else weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        1e-5,
    )
    if all(p is None or p.dtype is x.dtype for p in (weight, bias)):
        assert torch.equal(ours, theirs)
    oracles.assert_as_accurate(ours, theirs, oracle)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_half_precision_is_rounded_once(dtype, weight_dtype):
    x = torch.randn(64, 512).to(dtype)
    weight, bias = torch.randn(2, 512).to(weight_dtype)
    for ours, oracle in (
        (norm.rms_norm(x, weight, 1e-6), oracles.rms_norm(x, weight, 1e-6)),
        (
            norm.layer_norm(x, (512,), weight, bias, 1e-6),
            oracles.layer_norm(x, weight, bias, 1e-6),
        ),
    ):
        # float32 inside errs on a few values that lie next to a rounding boundary.
        assert (ours != oracle.to(dtype)).float().mean() < 2e-3


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("weight_dtype", ALL)
def test_every_pair_of_dtypes_gives_that_of_x(dtype, weight_dtype):
    x, weight = torch.randn(4, 8).to(dtype), torch.randn(8).to(weight_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm.rms_norm(x, weight, 1e-6).dtype is dtype
        assert norm.layer_norm(x, (8,), weight, weight, 1e-6).dtype is dtype
        assert norm.layer_norm(x, (8,), weight, weight.to(dtype), 1e-6).dtype is dtype
        assert norm.layer_norm(x, (8,), weight, None, 1e-6).dtype is dtype
        assert norm.layer_norm(x, (8,), None, weight, 1e-6).dtype is dtype


@pytest.mark.parametrize("rank", range(2, 9))
@pytest.mark.parametrize("if_fused", [True, False])
def test_rms_norm_module(rank, if_fused):
    module = RMSNorm(8, eps=1e-3)
    with torch.no_grad():
        module.weight.copy_(torch.randn(8))
    x = torch.randn(*[2] * (rank - 1), 8).half()
    out = module(x, if_fused=if_fused)
    assert out.dtype is torch.float16
    oracles.assert_close(out, oracles.rms_norm(x, module.weight, 1e-3))


def test_rms_norm_module_state():
    module = RMSNorm(8)
    assert torch.equal(module.weight, torch.ones(8))
    assert isinstance(module.weight, nn.Parameter)
    assert module.variance_epsilon == 1e-6
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "RMSNorm(8, eps=1e-06)"


def test_rms_norm_module_trains():
    module, x = RMSNorm(8), torch.randn(3, 8, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((4, 4),), "hidden_size"),
        ((0,), "hidden_size"),
        ((True,), "hidden_size"),
        ((8.0,), "hidden_size"),
        ((8, -1.0), "eps"),
        ((8, None), "eps"),
        ((8, float("nan")), "eps"),
    ],
)
def test_rms_norm_wrong_construction(arguments, name):
    with pytest.raises(ParametersInvalid) as caught:
        RMSNorm(*arguments)
    assert caught.value.argument == name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((None,), "hidden_states"),
        ((torch.randn(8),), "hidden_states"),
        ((torch.randn(*[1] * 8, 8),), "hidden_states"),
        ((torch.randn(2, 7),), "hidden_states"),
        ((torch.ones(2, 8, dtype=torch.int64),), "hidden_states"),
        ((torch.randn(2, 8, device="meta"),), "hidden_states"),
        ((torch.randn(2, 8), 1), "if_fused"),
    ],
)
def test_rms_norm_wrong_call(arguments, name):
    with pytest.raises(ParametersInvalid) as caught:
        RMSNorm(8)(*arguments)
    assert caught.value.argument == name


def layer(shape=(16,), **options):
    module = nn.LayerNorm(shape, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(shape))
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl_mode", [0, 1])
@pytest.mark.parametrize(
    "module",
    [
        layer(),
        layer(bias=False),
        layer(elementwise_affine=False),
        layer((3, 16), eps=1e-3),
        layer((2, 3, 16)),
    ],
)
def test_fast_layernorm(module, impl_mode, dtype):
    x = torch.randn(2, 3, 16).to(dtype)
    out = fast_layernorm(module, x, impl_mode)
    assert out.dtype is dtype
    shape = module.normalized_shape
    oracle = oracles.layer_norm(x, module.weight, module.bias, module.eps, len(shape))
    oracles.assert_as_accurate(out, module(x.float()).to(dtype), oracle)


def test_fast_layernorm_float16_mode():
    x = torch.randn(2, 3, 16).half()
    assert torch.equal(fast_layernorm(layer().half(), x, 2).isnan(), x.isnan())
    fast_layernorm(nn.LayerNorm(16, elementwise_affine=False), x, 2)
    mixed = layer().half()
    mixed.bias.data = mixed.bias.data.float()
    for module, tensor, name in (
        (layer().half(), x.float(), "x"),
        (layer(), x, "norm.weight"),
        (mixed, x, "norm.bias"),
        (layer().bfloat16(), x, "norm.weight"),
    ):
        with pytest.raises(ParametersInvalid) as caught:
            fast_layernorm(module, tensor, 2)
        assert caught.value.argument == name


def test_fast_layernorm_unfused_is_the_module():
    module, x = layer(), torch.randn(2, 3, 16)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fast_layernorm(module, x, fused=False), module(x))
    assert len(calls) == 2
    fast_layernorm(module, x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"norm": nn.RMSNorm(16)}, "norm"),
        ({"norm": None}, "norm"),
        ({"x": torch.randn(3, 16)}, "x"),
        ({"x": torch.randn(2, 3, 15)}, "x"),
        ({"x": torch.ones(2, 3, 16, dtype=torch.int32)}, "x"),
        ({"x": torch.randn(2, 3, 16, device="meta")}, "x"),
        ({"x": None}, "x"),
        ({"norm": nn.LayerNorm((1, 2, 3, 16))}, "x"),
        ({"impl_mode": 3}, "impl_mode"),
        ({"impl_mode": "0"}, "impl_mode"),
        ({"impl_mode": True}, "impl_mode"),
        ({"fused": 0}, "fused"),
    ],
)
def test_fast_layernorm_wrong_arguments(changes, name):
    with pytest.raises(ParametersInvalid) as caught:
        fast_layernorm(**{"norm": layer(), "x": torch.randn(2, 3, 16), **changes})
    assert caught.value.argument == name
