"""Sparse attention on the emulated device: its block-sparse kernel, and what goes round it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd import sparse_attention
from mindiesd.emulator import trace
from mindiesd.ops.backends.npu import block_sparse, soc
from mindiesd.ops.sparse import adaptive, kernel
from mindiesd.ops.sparse.selection import Selection
from tests import oracles
from tests.ops.test_sparse_kernels import random_selection, token_mask

KERNEL = "npu::npu_block_sparse_attention"


def on_device(selection):
    moved = (None if t is None else t.npu() for t in selection[:3])
    return Selection(*moved, selection[3])


def parts(selection):
    return selection.keep, selection.order_q, selection.order_k, selection.causal


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 128, 300]),
    st.sampled_from([1, 128, 129, 400]),
    st.sampled_from([(1, 1), (4, 2)]),
    st.sampled_from([(64, 64), (40, 24), (72, 128), (160, 16)]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(["plain", "ordered", "causal"]),
    st.booleans(),
)
def test_any_shape(queries, keys, heads, dims, dtype, kind, head_first):
    query = torch.randn(2, heads[0], queries, dims[0]).to(dtype)
    key = torch.randn(2, heads[1], keys, dims[0]).to(dtype)
    value = torch.randn(2, heads[1], keys, dims[1]).to(dtype)
    selection = random_selection(2, heads[0], queries, keys, kind == "causal", kind == "ordered")
    moved = [(t if head_first else t.transpose(1, 2)).npu() for t in (query, key, value)]
    with trace() as counted:
        out = kernel.over_blocks(*moved, on_device(parts(selection)), 0.2, head_first)
    fits = dtype is not torch.float32 and max(dims) <= 128 and kind != "causal"
    assert counted.launches[KERNEL] == (1 if fits else 0)
    assert out.dtype is dtype and out.device == moved[0].device
    mask = token_mask(selection, queries, keys)
    expected = oracles.attention(query, key, value, keep=mask, scale=0.2)
    out = out.cpu()
    oracles.assert_close(out if head_first else out.transpose(1, 2), expected)


@pytest.mark.parametrize("sparse_type", ["rf_v2", "ada_bsa"])
@pytest.mark.parametrize("precise", [0, 1])
def test_one_kernel_for_the_whole_call(sparse_type, precise):
    tensors = torch.randn(3, 2, 2, 300, 64, dtype=torch.float16)
    options = {
        "sparse_type": sparse_type,
        "sparsity": 0.5,
        "latent_shape_q": (3, 10, 10),
        "inner_precise": precise,
    }
    with trace() as counted:
        out = sparse_attention(*(t.npu() for t in tensors), **options)
    assert counted.launches[KERNEL] == 1
    oracles.assert_close(out.cpu(), sparse_attention(*tensors, **options).double(), extra=1e-3)


def test_a_causal_call_goes_to_the_dense_kernels_with_a_band():
    tensors = torch.randn(3, 1, 2, 600, 64, dtype=torch.float16)
    options = {"sparse_type": "ada_bsa", "sparsity": 0.5, "is_causal": True}
    with trace() as counted:
        out = sparse_attention(*(t.npu() for t in tensors), **options)
    assert not counted.launches[KERNEL]
    assert counted.launches["npu::npu_fusion_attention"] > 0
    oracles.assert_close(out.cpu(), sparse_attention(*tensors, **options).double(), extra=1e-3)


def test_refusals_name_the_limit():
    query = torch.randn(1, 1, 128, 64, dtype=torch.float16)
    plain = Selection(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    causal = Selection(plain.keep, causal=True)

    def refusal(query=query, selection=plain, scale=0.1, series=soc.A2):
        return block_sparse.refusal(query, query, selection, scale, series)

    assert refusal() is None and refusal(series=soc.A3) is None
    assert "series" in refusal(series=soc.I310P)
    assert "series" in refusal(series=soc.A950)
    assert "dtype" in refusal(query.float())
    assert "head dimension" in refusal(torch.randn(1, 1, 128, 129).half())
    assert refusal(selection=causal) == "causal"
    assert "float32" in refusal(scale=1e39)


def test_the_estimate_is_that_of_the_host():
    query, key = torch.randn(2, 1, 2, 700, 16)
    there = adaptive.estimate(query.npu(), key.npu(), 0.3, True).cpu()
    torch.testing.assert_close(there, adaptive.estimate(query, key, 0.3, True))
