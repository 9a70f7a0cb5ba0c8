"""Activation functions by name."""

import math

import pytest
import torch
from torch import nn

from mindiesd import ParametersInvalid, get_activation_layer
from mindiesd.ops.activation import GELU
from tests import oracles


def erf_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "swish": (nn.SiLU, lambda x: x / (1 + torch.exp(-x))),
    "silu": (nn.SiLU, lambda x: x / (1 + torch.exp(-x))),
    "mish": (nn.Mish, lambda x: x * torch.tanh(torch.log1p(torch.exp(x)))),
    "gelu": (GELU, erf_gelu),
    "relu": (nn.ReLU, lambda x: torch.where(x > 0, x, 0.0)),
    "gelu-tanh": (GELU, tanh_gelu),
    "gelu-fast": (GELU, lambda x: x / (1 + torch.exp(-1.702 * x))),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_formula(name, dtype):
    kind, formula = FORMULAS[name]
    module = get_activation_layer(name)
    assert type(module) is kind
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64).to(dtype)
    before = x.clone()
    out = module(x)
    assert out.dtype is dtype
    assert torch.equal(x, before)
    oracles.assert_close(out, formula(x.double()))
    strided = torch.randn(4, 6).to(dtype).t()
    oracles.assert_close(module(strided), formula(strided.double()))
    assert module(x[:0]).shape == (0,)


def test_gelu_fast_rounds_half_once():
    x = torch.randn(4096).half()
    right = FORMULAS["gelu-fast"][1](x.double()).half()
    assert (get_activation_layer("gelu-fast")(x) != right).float().mean() < 2e-3


@pytest.mark.parametrize("name", FORMULAS)
def test_any_case_and_a_new_instance_each_time(name):
    one, other = get_activation_layer(name), get_activation_layer(name.upper())
    assert one is not other
    assert repr(one) == repr(other)


@pytest.mark.parametrize("name", ["", "gelu_fast", "tanh", None, 3, nn.SiLU, ["gelu"], b"gelu"])
def test_unknown(name):
    with pytest.raises(ParametersInvalid, match=r"act_type.*gelu-fast"):
        get_activation_layer(name)


def test_gelu_approximate():
    assert repr(GELU("fast")) == "GELU(approximate='fast')"
    with pytest.raises(ParametersInvalid, match="approximate"):
        GELU("quick")
