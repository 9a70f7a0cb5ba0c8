"""sparse_attention: what it refuses, and that without sparsity it is dense attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd import ParametersInvalid, attention_forward, sparse_attention
from tests import oracles


@given(
    st.sampled_from(["BNSD", "BSND"]),
    st.booleans(),
    st.sampled_from([None, "rf_v2", "ada_bsa"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([(1, 1), (4, 4), (4, 2)]),
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
    st.sampled_from([None, 0.5]),
)
def test_without_sparsity_it_is_dense(layout, causal, sparse_type, dtype, heads, lengths, scale):
    query = torch.randn(2, heads[0], lengths[0], 8).to(dtype)
    key, value = (torch.randn(2, heads[1], lengths[1], 8).to(dtype) for _ in range(2))
    head_first = layout == "BNSD"
    inputs = [t if head_first else t.transpose(1, 2) for t in (query, key, value)]
    dense = attention_forward(*inputs, scale=scale, head_first=head_first, is_causal=causal)
    for head_num in (1, heads[0]):
        out = sparse_attention(
            *inputs,
            scale=scale,
            is_causal=causal,
            head_num=head_num,
            input_layout=layout,
            sparse_type=sparse_type,
            sparsity=0.0,
        )
        assert torch.equal(out, dense)
    keep = oracles.top_left(*lengths) if causal else None
    out = out if head_first else out.transpose(1, 2)
    oracles.assert_close(out, oracles.attention(query, key, value, keep=keep, scale=scale))


def test_no_type_is_dense_whatever_the_sparsity():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    dense = attention_forward(q, k, v, head_first=True)
    assert torch.equal(sparse_attention(q, k, v, sparsity=0.9), dense)


def good():
    return dict(zip(("q", "k", "v"), torch.randn(3, 2, 4, 24, 8), strict=True))


WRONG = [
    ("q", {"q": None}),
    ("q", {"q": torch.randn(4, 24, 8)}),
    ("k", {"k": torch.randn(2, 4, 24, 8).half()}),
    ("k", {"k": torch.randn(1, 4, 24, 8)}),
    ("k", {"k": torch.randn(2, 4, 24, 4)}),
    ("k", {"k": torch.randn(2, 3, 24, 8), "v": torch.randn(2, 3, 24, 8)}),
    ("v", {"v": torch.randn(2, 4, 23, 8)}),
    ("v", {"v": torch.randn(3, 4, 24, 8)}),
    ("attn_mask", {"attn_mask": torch.ones(24, 24, dtype=torch.bool)}),
    ("scale", {"scale": math.nan}),
    ("is_causal", {"is_causal": 0}),
    ("head_num", {"head_num": 2}),
    ("head_num", {"head_num": 0}),
    ("head_num", {"head_num": 4.0}),
    ("head_num", {"head_num": True}),
    ("head_num", {"head_num": 4, "input_layout": "BSND"}),
    ("input_layout", {"input_layout": "BSH"}),
    ("input_layout", {"input_layout": None}),
    ("inner_precise", {"inner_precise": 2}),
    ("inner_precise", {"inner_precise": False}),
    ("sparse_type", {"sparse_type": "rf_v1"}),
    ("sparse_type", {"sparse_type": 0}),
    ("txt_len", {"txt_len": -1}),
    ("txt_len", {"txt_len": 1.0}),
    ("block_size", {"block_size": 64}),
    ("latent_shape_q", {"latent_shape_q": 24}),
    ("latent_shape_q", {"latent_shape_q": [4, 6]}),
    ("latent_shape_q[2]", {"latent_shape_q": [4, 6, 0]}),
    ("latent_shape_q", {"latent_shape_q": [2, 3, 5], "sparse_type": "rf_v2"}),
    ("latent_shape_k", {"latent_shape_k": [2, 3, 4], "sparse_type": "rf_v2", "txt_len": 1}),
    ("keep_sink", {"keep_sink": 1}),
    ("keep_recent", {"keep_recent": None}),
    ("cdf_threshold", {"cdf_threshold": 1.5}),
    ("cdf_threshold", {"cdf_threshold": math.nan}),
    ("sparsity", {"sparsity": -0.1}),
    ("sparsity", {"sparsity": 1.01}),
    ("sparsity", {"sparsity": None}),
    ("video_spans", {"video_spans": []}),
]


@pytest.mark.parametrize(("argument", "changes"), WRONG)
def test_wrong_arguments(argument, changes):
    with pytest.raises(ParametersInvalid) as caught:
        sparse_attention(**{**good(), **changes})
    assert caught.value.argument == argument


def test_good_latent_shapes():
    arguments = good()
    dense = attention_forward(*arguments.values(), head_first=True)
    out = sparse_attention(
        **arguments, sparse_type="rf_v2", txt_len=4, latent_shape_q=[1, 4, 5], head_num=4
    )
    assert torch.equal(out, dense)


def test_gradients_are_refused():
    arguments = good()
    arguments["v"].requires_grad_()
    with pytest.raises(ParametersInvalid, match=r"v.*forward-only"):
        sparse_attention(**arguments)
