"""sageattn and sageattn_varlen, and FlashAttention 3."""

from __future__ import annotations

import pytest
import torch

from mindiesd import ParametersInvalid
from mindiesd.patches.front_doors import flash_attn_3 as fa3
from mindiesd.patches.front_doors import sageattention as sage
from tests import oracles


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sageattn(layout, causal, dtype) -> None:
    q, k, v = (torch.randn(2, heads, 6, 8).to(dtype) for heads in (4, 2, 2))
    keep = oracles.top_left(6, 6) if causal else None
    want = oracles.attention(q, k, v, keep, scale=0.4)
    want_lse = oracles.log_sum_exp(q, k, keep, scale=0.4)
    if layout == "NHD":
        q, k, v, want = (t.transpose(1, 2) for t in (q, k, v, want))
    kept = k.clone()
    out = sage.sageattn(q, k, v, tensor_layout=layout, is_causal=causal, sm_scale=0.4)
    oracles.assert_close(out, want)
    assert torch.equal(k, kept)  # upstream smooths the caller's keys in place
    out, lse = sage.sageattn(q, k, v, layout, causal, 0.4, smooth_k=False, return_lse=True)
    oracles.assert_close(out, want)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_sageattn_varlen(causal) -> None:
    lengths = [3, 0, 5]
    q, k = torch.randn(8, 4, 8), torch.randn(8, 2, 8)
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    out = sage.sageattn_varlen(q, k, k, cu, cu.clone(), 5, 5, is_causal=causal)
    want = oracles.attention_varlen(
        q, k, k, lengths, lengths, oracles.top_left if causal else lambda n, m: None
    )
    oracles.assert_close(out, want)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"attn_mask": None}, "attn_mask"),
        ({"dropout_p": 0.0}, "dropout_p"),
        ({"tensor_layout": torch.ones(1)}, "tensor_layout"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_what_upstream_would_drop_is_refused(wrong, argument) -> None:
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 4, 8)
    sage.sageattn(q, k, k, pv_accum_dtype="fp32")
    with pytest.raises(ParametersInvalid) as caught:
        sage.sageattn(q, k, k, **wrong)
    assert caught.value.argument == argument
    with pytest.raises(ParametersInvalid) as caught:
        sage.sageattn_varlen(q[0], k[0], k[0], [0, 2], [0, 1, 2], 2, 2, is_causal=True)
    assert caught.value.argument == "is_causal"


def test_flash_attention_3() -> None:
    q, k, v = torch.randn(2, 4, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 5)
    one = [t.transpose(1, 2) for t in (q, k, v)]
    keep = oracles.window(4, 6, 2, 0)
    want = oracles.attention(*one, keep, softcap=2.0).transpose(1, 2)
    want_lse = oracles.log_sum_exp(*one[:2], keep, softcap=2.0)
    more = {"causal": True, "window_size": (2, -1), "softcap": 2.0, "num_splits": 3}
    oracles.assert_close(fa3.flash_attn_func(q, k, v, **more), want)
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True, **more)
    oracles.assert_close(out, want)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    cu_q, cu_k = torch.tensor([0, 4, 8]), torch.tensor([0, 6, 12])
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    out = fa3.flash_attn_varlen_func(*flat, cu_q, cu_k, 4, 6, **more)
    oracles.assert_close(out, want.flatten(0, 1))

    qkv = torch.randn(2, 5, 8, 8)
    parts = [qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]]
    want = oracles.attention(*(t.transpose(1, 2) for t in parts)).transpose(1, 2)
    oracles.assert_close(fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=4), want)
    qkv = torch.randn(2, 5, 3, 4, 8)
    want = oracles.attention(*(t.transpose(1, 2) for t in qkv.unbind(2))).transpose(1, 2)
    oracles.assert_close(fa3.flash_attn_qkvpacked_func(qkv), want)


@pytest.mark.parametrize("name", ["qv", "q_descale", "k_descale", "v_descale", "attention_chunk"])
def test_flash_attention_3_refuses_what_it_does_not_compute(name) -> None:
    q = torch.ones(1, 2, 2, 8)
    value = 4 if name == "attention_chunk" else torch.ones(1, 2)
    with pytest.raises(ParametersInvalid) as caught:
        fa3.flash_attn_func(q, q, q, **{name: value})
    assert caught.value.argument == name
    with pytest.raises(ParametersInvalid) as caught:
        fa3.flash_attn_varlen_func(q[0], q[0], q[0], [0, 2], [0, 2], 2, 2, seqused_k=torch.ones(1))
    assert caught.value.argument == "seqused_k"
