"""F.scaled_dot_product_attention on the device: torch_npu's dispatch over the emulated kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindiesd.emulator import trace

FUSED = "npu::npu_fusion_attention_v3"


def qkv(b=2, n=4, nkv=None, sq=12, skv=16, d=32, dv=None):
    return (
        torch.randn(b, n, sq, d),
        torch.randn(b, nkv or n, skv, d),
        torch.randn(b, nkv or n, skv, dv or d),
    )


def bool_mask(*shape):
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def empty_rows():
    mask = bool_mask(12, 16)
    mask[3] = False
    return mask


# name -> inputs, further arguments, whether one fused kernel computes it
CASES = {
    "plain": lambda: (qkv(), {}, True),
    "scale": lambda: (qkv(), {"scale": 0.05}, True),
    "causal": lambda: (qkv(), {"is_causal": True}, True),
    "causal_tall": lambda: (qkv(sq=16, skv=12), {"is_causal": True}, True),
    "grouped": lambda: (qkv(nkv=2), {"enable_gqa": True}, True),
    "mask_2d": lambda: (qkv(), {"attn_mask": bool_mask(12, 16)}, True),
    "mask_keys": lambda: (qkv(), {"attn_mask": bool_mask(2, 1, 1, 16)}, True),
    "mask_heads": lambda: (qkv(), {"attn_mask": bool_mask(2, 4, 12, 16)}, True),
    "mask_one_head": lambda: (qkv(), {"attn_mask": bool_mask(1, 4, 12, 16)}, True),
    "mask_rows_empty": lambda: (qkv(), {"attn_mask": empty_rows()}, True),
    "narrow_values": lambda: (qkv(dv=16), {}, True),
    "one_query": lambda: (qkv(sq=1), {"attn_mask": bool_mask(2, 1, 1, 16)}, True),
    "float_mask": lambda: (qkv(), {"attn_mask": torch.randn(12, 16)}, False),
    "three_dimensions": lambda: (tuple(x[0] for x in qkv()), {}, False),
    "five_dimensions": lambda: (tuple(x[None] for x in qkv()), {}, False),
    "odd_head_dim": lambda: (qkv(d=30), {}, False),
    "large_head_dim": lambda: (qkv(d=768), {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(npu, name):
    tensors, kwargs, fused = CASES[name]()
    expected = F.scaled_dot_product_attention(*tensors, **kwargs)
    there = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with trace() as counted:
        got = F.scaled_dot_product_attention(*(x.npu() for x in tensors), **there)
    torch.testing.assert_close(got.cpu(), expected, atol=2e-6, rtol=2e-6)
    assert counted.launches[FUSED] == int(fused)


def test_training(npu):
    tensors = qkv()
    mask = bool_mask(12, 16)
    here = [x.clone().requires_grad_() for x in tensors]
    F.scaled_dot_product_attention(*here, attn_mask=mask).square().sum().backward()
    there = [x.npu().requires_grad_() for x in tensors]
    F.scaled_dot_product_attention(*there, attn_mask=mask.npu()).square().sum().backward()
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, atol=1e-5, rtol=1e-5)
