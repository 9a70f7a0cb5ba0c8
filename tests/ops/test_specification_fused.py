"""The specification of the fused operators, a statement a test; see test_specification.py."""

import inspect
from typing import ClassVar

import pytest
import torch
from torch import nn

from mindiesd import (
    RMSNorm,
    fast_layernorm,
    get_activation_layer,
    layernorm_scale_shift,
    rotary_position_embedding,
)
from tests import oracles
from tests.ops.test_specification import close, rejects

B, S, N, D = 2, 5, 4, 8


class TestRotary:
    """rotary_position_embedding"""

    # x, then cos and sin that fit it, then head_first.
    LAYOUTS: ClassVar = {
        "BNSD": ((B, N, S, D), (1, 1, S, D), True),
        "BSND": ((B, S, N, D), (1, S, 1, D), False),
        "SBND": ((S, B, N, D), (S, 1, 1, D), False),
    }

    @pytest.mark.parametrize("mode", ["rotated_half", "rotated_interleaved"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("fused", [True, False])
    def test_four_dimensional_tables(self, layout, mode, fused):
        """x [B,N,S,D], [B,S,N,D] or [S,B,N,D] with 4D tables [1,1,S,D], [1,S,1,D] or [S,1,1,D]."""
        shape, table, head_first = self.LAYOUTS[layout]
        x, cos, sin = torch.randn(shape), torch.randn(table), torch.randn(table)
        out = rotary_position_embedding(x, cos, sin, mode, head_first, fused)
        close(out, oracles.rope(x, cos, sin, mode == "rotated_interleaved"))

    @pytest.mark.parametrize("layout", ["BNSD", "BSND"])
    def test_two_dimensional_tables(self, layout):
        """cos and sin are 2D [S,D]; `head_first` says which dimension of x is S."""
        shape, table, head_first = self.LAYOUTS[layout]
        x, cos, sin = torch.randn(shape), torch.randn(S, D), torch.randn(S, D)
        out = rotary_position_embedding(x, cos, sin, head_first=head_first)
        close(out, oracles.rope(x, cos.view(table), sin.view(table), False))
        rejects("cos", rotary_position_embedding, x, cos, sin, head_first=not head_first)

    def test_sequence_first_needs_four(self):
        """2D tables do not fit x [S,B,N,D], even if B is S."""
        x, table = torch.randn(S, B, N, D), torch.randn(S, D)
        rejects("cos", rotary_position_embedding, x, table, table)

    def test_same_dimensions(self):
        """sin has the same dimensions as cos."""
        x, cos = torch.randn(B, S, N, D), torch.randn(S, D)
        rejects("sin", rotary_position_embedding, x, cos, cos[None, :, None])

    @pytest.mark.parametrize("rank", [3, 5])
    def test_x_has_four_dimensions(self, rank):
        """x is a 4D tensor."""
        x, table = torch.randn((1,) * (rank - 2) + (S, D)), torch.randn(S, D)
        rejects("x", rotary_position_embedding, x, table, table)

    def test_half(self):
        """`rotated_half` splits x into front and back halves: rot(x) = [-x2, x1]."""
        x = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
        zero, one = torch.zeros(1, 4), torch.ones(1, 4)
        out = rotary_position_embedding(x, zero, one, "rotated_half")
        assert out.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]

    def test_interleaved(self):
        """`rotated_interleaved` interleaves adjacent elements: rot(x) = (-x1, x0, -x3, x2, ...)."""
        x = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
        zero, one = torch.zeros(1, 4), torch.ones(1, 4)
        out = rotary_position_embedding(x, zero, one, "rotated_interleaved")
        assert out.flatten().tolist() == [-2.0, 1.0, -4.0, 3.0]

    def test_default_mode(self):
        """`rotated_mode` defaults to "rotated_half"; another name is an error."""
        x, cos, sin = torch.randn(B, S, N, D), torch.randn(S, D), torch.randn(S, D)
        expected = rotary_position_embedding(x, cos, sin, "rotated_half")
        assert torch.equal(rotary_position_embedding(x, cos, sin), expected)
        rejects("rotated_mode", rotary_position_embedding, x, cos, sin, "half")

    def test_defaults(self):
        """`head_first` defaults to False and `fused` to True."""
        parameters = inspect.signature(rotary_position_embedding).parameters
        assert parameters["head_first"].default is False
        assert parameters["fused"].default is True

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_result(self, dtype):
        """Returns the shape of x (and its dtype)."""
        x, table = torch.randn(B, S, N, D).to(dtype), torch.randn(S, D)
        out = rotary_position_embedding(x, table, table)
        assert (out.shape, out.dtype) == (x.shape, dtype)


class TestRMSNorm:
    """RMSNorm"""

    def test_constructor(self):
        """RMSNorm(hidden_size, eps=1e-6)."""
        norm = RMSNorm(16)
        assert norm.weight.shape == (16,) and norm.variance_epsilon == 1e-6
        assert RMSNorm(16, eps=0.5).variance_epsilon == 0.5

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("rank", range(2, 9))
    def test_ranks(self, rank, fused):
        """forward: hidden_states of 2 to 8 dimensions."""
        norm = RMSNorm(16).requires_grad_(False)
        norm.weight.copy_(torch.randn(16))
        x = torch.randn(*(2,) * (rank - 1), 16)
        close(norm(x, if_fused=fused), oracles.rms_norm(x, norm.weight, 1e-6))

    @pytest.mark.parametrize("rank", [1, 9])
    def test_other_ranks(self, rank):
        """forward: another number of dimensions is an error."""
        rejects("hidden_states", RMSNorm(2), torch.randn((2,) * rank))

    def test_like_t5(self):
        """Equivalent to T5LayerNorm: no mean is subtracted."""
        t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5LayerNorm(16, 1e-6)
        x = torch.randn(2, 3, 16) + 5.0
        torch.testing.assert_close(RMSNorm(16)(x), t5(x))

    def test_fused_by_default(self):
        """`if_fused` defaults to True."""
        assert inspect.signature(RMSNorm.forward).parameters["if_fused"].default is True


class TestFastLayerNorm:
    """fast_layernorm"""

    def arranged(self, dtype=torch.float32):
        norm = nn.LayerNorm(16, eps=1e-5).requires_grad_(False)
        norm.weight.copy_(torch.randn(16))
        norm.bias.copy_(torch.randn(16))
        return norm.to(dtype), torch.randn(2, 5, 16).to(dtype)

    @pytest.mark.parametrize("mode", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_modes(self, mode, dtype):
        """`impl_mode`: 0 high precision (default), 1 high performance."""
        norm, x = self.arranged(dtype)
        out = fast_layernorm(norm, x, impl_mode=mode)
        close(out, oracles.layer_norm(x, norm.weight, norm.bias, 1e-5))

    def test_default_mode(self):
        """`impl_mode` defaults to 0 and `fused` to True."""
        parameters = inspect.signature(fast_layernorm).parameters
        assert (parameters["impl_mode"].default, parameters["fused"].default) == (0, True)

    def test_float16_mode(self):
        """`impl_mode=2`: float16 mode, only available when all inputs are float16."""
        norm, x = self.arranged(torch.float16)
        out = fast_layernorm(norm, x, impl_mode=2)
        assert out.dtype is torch.float16
        close(out, oracles.layer_norm(x, norm.weight, norm.bias, 1e-5))
        rejects("x", fast_layernorm, norm, x.float(), 2)
        rejects("norm.weight", fast_layernorm, norm.float(), x, 2)

    @pytest.mark.parametrize("mode", [3, -1, True, 0.0, None])
    def test_other_modes(self, mode):
        """Another `impl_mode` is an error."""
        rejects("impl_mode", fast_layernorm, *self.arranged(), mode)

    def test_unfused(self):
        """`fused=False` falls back to standard torch.nn.LayerNorm."""
        norm, x = self.arranged()
        assert torch.equal(fast_layernorm(norm, x, fused=False), norm(x))

    @pytest.mark.parametrize("rank", [2, 4])
    def test_three_dimensions(self, rank):
        """x is 3D, [B,S,H]."""
        norm, x = self.arranged()
        rejects("x", fast_layernorm, norm, x[0] if rank == 2 else x[None])

    def test_a_module(self):
        """norm is a torch.nn.LayerNorm instance."""
        _, x = self.arranged()
        rejects("norm", fast_layernorm, nn.Linear(16, 16), x)

    def test_result(self):
        """Returns the same shape as x."""
        norm, x = self.arranged()
        assert fast_layernorm(norm, x).shape == x.shape


class TestScaleShift:
    """layernorm_scale_shift"""

    def arranged(self):
        norm = nn.LayerNorm(16, eps=1e-5).requires_grad_(False)
        norm.weight.copy_(torch.randn(16))
        return norm, torch.randn(2, 5, 16)

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("flat_scale", [True, False])
    @pytest.mark.parametrize("flat_shift", [True, False])
    def test_formula(self, flat_scale, flat_shift, fused):
        """out = layernorm(x) * (1 + scale) + shift; scale, shift 2D [B,H] or 3D [B,1,H]."""
        norm, x = self.arranged()
        scale, shift = torch.randn(2, 2, 1, 16)
        normed = oracles.layer_norm(x, norm.weight, norm.bias, 1e-5)
        expected = normed * (1 + scale.double()) + shift.double()
        given_ = (scale[:, 0] if flat_scale else scale, shift[:, 0] if flat_shift else shift)
        close(layernorm_scale_shift(norm, x, *given_, fused=fused), expected)

    @pytest.mark.parametrize("name", ["scale", "shift"])
    def test_last_dimension(self, name):
        """The last dimension of x must equal the last dimensions of scale and shift."""
        norm, x = self.arranged()
        good = {"scale": torch.randn(2, 16), "shift": torch.randn(2, 16)}
        rejects(name, layernorm_scale_shift, norm, x, **good | {name: torch.randn(2, 15)})

    @pytest.mark.parametrize("name", ["scale", "shift"])
    def test_second_dimension(self, name):
        """If scale or shift is a 3D tensor, the second dimension must be 1."""
        norm, x = self.arranged()
        good = {"scale": torch.randn(2, 16), "shift": torch.randn(2, 16)}
        for wrong in (5, 2):
            rejects(
                name, layernorm_scale_shift, norm, x, **good | {name: torch.randn(2, wrong, 16)}
            )

    @pytest.mark.parametrize("name", ["scale", "shift"])
    def test_batch(self, name):
        """The batch of scale and shift is that of x: nothing is broadcast silently."""
        norm, x = self.arranged()
        good = {"scale": torch.randn(2, 16), "shift": torch.randn(2, 16)}
        for wrong in ((1, 16), (3, 16), (16,)):
            rejects(name, layernorm_scale_shift, norm, x, **good | {name: torch.randn(wrong)})

    @pytest.mark.parametrize("rank", [2, 4])
    def test_three_dimensions(self, rank):
        """x is 3D, [B,S,H]."""
        norm, x = self.arranged()
        scale = torch.randn(2, 16)
        rejects("x", layernorm_scale_shift, norm, x[0] if rank == 2 else x[None], scale, scale)

    def test_fused_by_default(self):
        """`fused` defaults to True."""
        assert inspect.signature(layernorm_scale_shift).parameters["fused"].default is True


class TestActivation:
    """get_activation_layer"""

    FORMULAS: ClassVar = {
        "swish": lambda x: x * torch.sigmoid(x),
        "silu": lambda x: x * torch.sigmoid(x),
        "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "relu": lambda x: x.clamp(min=0),
        "gelu-tanh": lambda x: (
            0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        ),
        "gelu-fast": lambda x: x * torch.sigmoid(1.702 * x),
    }

    @pytest.mark.parametrize("name", FORMULAS)
    def test_formula(self, name):
        """The seven activation functions by name; "gelu-fast" keeps its own formula everywhere."""
        x = torch.linspace(-6, 6, 997)
        close(get_activation_layer(name)(x), self.FORMULAS[name](x.double()))

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("swish", nn.SiLU), ("silu", nn.SiLU), ("mish", nn.Mish), ("relu", nn.ReLU)],
    )
    def test_implementation(self, name, kind):
        """swish and silu are nn.SiLU, mish is nn.Mish, relu is nn.ReLU."""
        assert type(get_activation_layer(name)) is kind

    @pytest.mark.parametrize("name", FORMULAS)
    def test_case_insensitive(self, name):
        """`act_type` is case-insensitive."""
        assert type(get_activation_layer(name.upper())) is type(get_activation_layer(name))
        assert repr(get_activation_layer(name.title())) == repr(get_activation_layer(name))

    @pytest.mark.parametrize("name", FORMULAS)
    def test_new_instance(self, name):
        """Returns an instance of nn.Module, a new one at each call."""
        first = get_activation_layer(name)
        assert isinstance(first, nn.Module) and first is not get_activation_layer(name)

    @pytest.mark.parametrize("name", ["geglu", "", None, 3])
    def test_unknown(self, name):
        """Another name is an error."""
        rejects("act_type", get_activation_layer, name)
