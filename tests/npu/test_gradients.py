"""Gradients through the operations that have them: those of the CPU, in float64.

Attention is forward-only and refuses; norms, modulations, rotary embeddings and activations are
differentiable on every device, through fused kernels as well. None is detached.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mindiesd

DIM = 16


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = build()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def _norm(build: Callable[[], nn.Module]):
    def case(like: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        module = _seeded(build).to(like.device, like.dtype)
        return module(x), list(module.parameters())

    return case, [(2, 6, DIM)]


def _rotary(mode: str, turned: bool):
    def case(like: Tensor, x: Tensor, angles: Tensor) -> tuple[Tensor, list[Tensor]]:
        if mode == "rotated_half":
            angles = torch.cat([angles, angles], -1)
        else:
            angles = torch.stack([angles, angles], -1).flatten(-2)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        if turned:
            x, cos, sin = x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2)
        rotate = mindiesd.rotary_position_embedding
        return rotate(x, cos, sin, rotated_mode=mode, head_first=turned), []

    return case, [(2, 6, 3, DIM), (6, DIM // 2)]


def _layer_norm(call: Callable[..., Tensor], affine: bool):
    def case(like: Tensor, *given: Tensor) -> tuple[Tensor, list[Tensor]]:
        norm = _seeded(lambda: nn.LayerNorm(DIM, elementwise_affine=affine))
        norm.to(like.device, like.dtype)
        return call(norm, *given), list(norm.parameters())

    return case


def _activation(name: str):
    def case(like: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return mindiesd.get_activation_layer(name)(x), []

    return case, [(2, 6, DIM)]


ONE, MANY = [(1, 6, DIM), (1, DIM), (1, DIM)], [(2, 6, DIM), (2, DIM), (2, DIM)]
CASES = {
    "rms_norm": _norm(lambda: mindiesd.RMSNorm(DIM)),
    **{
        f"rotary-{mode}-{'BNSD' if turned else 'BSND'}": _rotary(mode, turned)
        for mode in ("rotated_half", "rotated_interleaved")
        for turned in (True, False)
    },
    **{
        f"{call.__name__}-{len(shapes)}-{shapes[0][0]}-{affine}": (
            _layer_norm(call, affine),
            shapes,
        )
        for affine in (True, False)
        for call, shapes in (
            (mindiesd.fast_layernorm, [(2, 6, DIM)]),
            (mindiesd.layernorm_scale_shift, ONE),
            (mindiesd.layernorm_scale_shift, MANY),
        )
    },
    **{name: _activation(name) for name in ("silu", "gelu", "gelu-tanh", "gelu-fast", "mish")},
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name: str) -> None:
    case, shapes = CASES[name]
    torch.manual_seed(1)
    given = [torch.randn(shape) for shape in shapes]
    if name == "gelu-fast":
        # Off the device it is another formula, by specification: its own derivative is compared.
        expected = _gradients(lambda like, x: (x * torch.sigmoid(1.702 * x), []), given, "cpu")
    else:
        expected = _gradients(case, given, "cpu")
    ours = _gradients(case, given, "npu")
    assert len(ours) == len(expected)
    # The device may compute erf by its tanh form.
    tolerance = 1e-3 if name == "gelu" else 2e-5
    for one, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), exact, rtol=2e-4, atol=tolerance)


def _gradients(case: Callable[..., tuple[Tensor, list[Tensor]]], given: list[Tensor], kind: str):
    dtype = torch.float64 if kind == "cpu" else torch.float32
    leaves = [tensor.to(kind, dtype).requires_grad_() for tensor in given]
    out, parameters = case(leaves[0], *leaves)
    assert out.requires_grad
    # Every output with a weight of its own, or the gradient of a norm is nearly nothing.
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape).to(kind)
    return torch.autograd.grad((out * weights).sum(), [*leaves, *parameters])
