"""memory_efficient_attention and the described masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd import ParametersInvalid
from mindiesd.patches.front_doors import attn_bias as ab
from mindiesd.patches.front_doors import xformers as xf
from tests import oracles


def reference(q, k, v, keep=None, bias=None, scale=None):
    out = oracles.attention(*(t.transpose(1, 2) for t in (q, k, v)), keep, bias, scale)
    return out.transpose(1, 2)


def qkv(batch, queries, keys, heads=2, dim=8, value_dim=8, dtype=torch.float32):
    q = torch.randn(batch, queries, heads, dim).to(dtype)
    return (
        q,
        torch.randn(batch, keys, heads, dim).to(dtype),
        torch.randn(batch, keys, heads, value_dim).to(dtype),
    )


# Bias, and the rule (i, j, Sq, Sk) it stands for, as the documentation of each class says it.
DENSE = {
    "top left": (ab.LowerTriangularMask(), lambda i, j, n, m: j <= i),
    "bottom right": (
        ab.LowerTriangularFromBottomRightMask(),
        lambda i, j, n, m: (m - 1 - j) >= (n - 1 - i),
    ),
    "bottom right, 2 keys": (
        ab.LowerTriangularFromBottomRightMask().make_local_attention(2),
        lambda i, j, n, m: 0 <= (m - 1 - j) - (n - 1 - i) < 2,
    ),
    "local": (
        ab.LocalAttentionFromBottomRightMask(1, 2),
        lambda i, j, n, m: i - 1 <= j + n - m <= i + 2,
    ),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_biases(name, queries, keys, dtype) -> None:
    bias, rule = DENSE[name]
    keep = oracles.predicate(queries, keys, lambda i, j: rule(i, j, queries, keys))
    q, k, v = qkv(2, queries, keys, dtype=dtype)
    out = xf.memory_efficient_attention(q, k, v, attn_bias=bias)
    oracles.assert_close(out, reference(q, k, v, keep))
    written = bias.materialize((2, 2, queries, keys))
    assert written.shape == (2, 2, queries, keys)
    assert torch.equal(written == 0, keep.expand(2, 2, -1, -1))
    assert torch.equal(written == -math.inf, ~keep.expand(2, 2, -1, -1))


BLOCKS = {
    "BlockDiagonalMask": ({}, lambda i, j, n, m: True),
    "BlockDiagonalCausalMask": ({}, lambda i, j, n, m: j <= i),
    "BlockDiagonalCausalFromBottomRightMask": ({}, lambda i, j, n, m: j - m <= i - n),
    "BlockDiagonalCausalLocalAttentionMask": (
        {"_window_size": 3},
        lambda i, j, n, m: i - 3 < j <= i,
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        {"_window_size": 3},
        lambda i, j, n, m: 0 <= (i - n) - (j - m) < 3,
    ),
    "BlockDiagonalPaddedKeysMask": ({}, lambda i, j, n, m: True),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": ({}, lambda i, j, n, m: j - m <= i - n),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        {"window_left": 1, "window_right": 2},
        lambda i, j, n, m: (i - n) - 1 <= j - m <= (i - n) + 2,
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        {"_window_size": 2},
        lambda i, j, n, m: 0 <= (i - n) - (j - m) < 2,
    ),
}


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(BLOCKS)),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
)
def test_block_biases(name, pairs, dtype, equal) -> None:
    options, rule = BLOCKS[name]
    n = [a for a, _ in pairs]
    m = n if equal else [a + more for a, more in pairs]
    kind = ab.EVERY[name]
    if "Padded" in name:
        padding = 9
        q_info = ab.SeqLenInfo.from_seqlens(n)
        k_info = ab.PaddedSeqLenInfo.from_seqlens_padded(m, padding)
        starts = [padding * b for b in range(len(m))]
        keys = padding * len(m)
    else:
        q_info, k_info = ab.SeqLenInfo.from_seqlens(n), ab.SeqLenInfo.from_seqlens(m)
        starts, keys = [sum(m[:b]) for b in range(len(m))], sum(m)
    bias = kind(q_seqinfo=q_info, k_seqinfo=k_info, **options)
    keep = torch.zeros(sum(n), keys, dtype=torch.bool)
    for b, start in enumerate(starts):
        at = sum(n[:b])
        inside = oracles.predicate(n[b], m[b], lambda i, j, b=b: rule(i, j, n[b], m[b]))
        keep[at : at + n[b], start : start + m[b]] = inside
    assert torch.equal(bias.materialize((sum(n), keys)) == 0, keep)
    q, k, v = qkv(1, sum(n), keys, dtype=dtype)
    want = reference(q, k, v, keep)
    for b, start in enumerate(starts):  # what is not in use may hold anything
        end = starts[b + 1] if b + 1 < len(starts) else keys
        k[:, start + m[b] : end] = v[:, start + m[b] : end] = float("nan")
    oracles.assert_close(xf.memory_efficient_attention(q, k, v, attn_bias=bias), want)
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias)
    oracles.assert_close(out, want)
    assert lse.shape == (1, 2, sum(n))


def test_block_mask_from_tensors_and_back() -> None:
    tensors = [torch.randn(1, 3, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(1, 1, 2, 8)]
    bias, row = ab.BlockDiagonalMask.from_tensor_list(tensors)
    assert row.shape == (1, 12, 2, 8)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 7, 11, 12]
    out = xf.memory_efficient_attention(row, row, row, attn_bias=bias.make_causal())
    for got, x in zip(bias.split(out), tensors, strict=True):
        keep = oracles.top_left(x.shape[1], x.shape[1])
        oracles.assert_close(got, reference(x, x, x, keep))
    local = bias.make_local_attention(2)
    out = xf.memory_efficient_attention(row, row, row, attn_bias=local)
    for got, x in zip(bias.split(out), tensors, strict=True):
        keep = oracles.window(x.shape[1], x.shape[1], 1, 0)
        oracles.assert_close(got, reference(x, x, x, keep))
    keys = [torch.randn(x.shape[0], x.shape[1] + 2, 2, 8) for x in tensors]
    both, q, k, v = ab.BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys, keys)
    made = both.make_causal_from_bottomright()
    out = xf.memory_efficient_attention(q, k, v, attn_bias=made)
    for got, x, key in zip(both.split_queries(out), tensors, keys, strict=True):
        keep = oracles.bottom_right(x.shape[1], key.shape[1])
        oracles.assert_close(got, reference(x, key, key, keep))
    assert [part.shape for part in both.split_kv(k)] == [key.shape for key in keys]
    with pytest.raises(ValueError, match="split_queries"):
        both.split(out)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 1, 5), (4, 5)])
def test_tensor_bias(bias_dtype, shape) -> None:
    q, k, v = qkv(2, 4, 5, heads=3, value_dim=6, dtype=bias_dtype)
    bias = torch.randn(shape).to(bias_dtype)
    bias[..., 0, 2] = -math.inf
    out = xf.memory_efficient_attention(q, k, v, attn_bias=bias, scale=0.2)
    oracles.assert_close(out, reference(q, k, v, bias=bias, scale=0.2))


def test_triangular_with_tensor_bias() -> None:
    q, k, v = qkv(2, 4, 5)
    tensor = torch.randn(2, 2, 4, 5)
    bias = ab.LowerTriangularMask().add_bias(tensor)
    out = xf.memory_efficient_attention(q, k, v, attn_bias=bias)
    oracles.assert_close(out, reference(q, k, v, oracles.top_left(4, 5), tensor))
    assert torch.equal(bias.materialize((2, 2, 4, 5)).exp(), tensor.exp() * oracles.top_left(4, 5))


def test_one_head_without_a_dimension_for_it() -> None:
    q, k, v = (t.squeeze(2) for t in qkv(2, 4, 5, heads=1))
    bias = torch.randn(2, 4, 5)
    out = xf.memory_efficient_attention(q, k, v, attn_bias=bias)
    want = reference(*(t.unsqueeze(2) for t in (q, k, v)), bias=bias[:, None]).squeeze(2)
    oracles.assert_close(out, want)


@pytest.mark.parametrize("expanded", [True, False])
def test_grouped_heads(expanded) -> None:
    q = torch.randn(2, 4, 2, 3, 8)
    k, v = torch.randn(2, 5, 2, 1, 8), torch.randn(2, 5, 2, 1, 8)
    k, v = (t.expand(2, 5, 2, 3, 8) for t in (k, v))
    if not expanded:
        k, v = torch.randn(2, 5, 2, 3, 8), torch.randn(2, 5, 2, 3, 8)
    bias = torch.randn(2, 2, 3, 4, 5)
    out = xf.memory_efficient_attention(q, k, v, attn_bias=bias)
    want = reference(*(t.flatten(2, 3) for t in (q, k, v)), bias=bias.flatten(1, 2))
    oracles.assert_close(out, want.view(2, 4, 2, 3, 8))


def test_output_dtype_is_not_a_second_rounding() -> None:
    q, k, v = qkv(1, 4, 5, dtype=torch.bfloat16)
    out = xf.memory_efficient_attention(q, k, v, output_dtype=torch.float32)
    assert out.dtype is torch.float32
    oracles.assert_close(out, reference(q, k, v))


def test_gradients_reach_the_bias() -> None:
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 2, 3, dim=2, value_dim=2))
    bias = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: xf.memory_efficient_attention(*t), (q, k, v, bias))
    assert not xf.memory_efficient_attention_forward(q, k, v).requires_grad


def test_dropout() -> None:
    q, k, v = qkv(1, 4, 5)
    torch.manual_seed(0)
    every = [xf.memory_efficient_attention(q, k, v, p=0.5) for _ in range(1500)]
    error = (sum(every) / len(every) - reference(q, k, v)).abs().max()
    assert error < 8 / math.sqrt(len(every))
    assert torch.equal(xf.memory_efficient_attention(q, k, v, p=1.0), torch.zeros_like(q))


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"key": torch.ones(1, 5, 3, 8)}, "key"),
        ({"value": torch.ones(1, 4, 2, 8)}, "value"),
        ({"attn_bias": torch.ones(1, 2, 4, 4)}, "attn_bias"),
        ({"attn_bias": torch.ones(1, 2, 4, 5, dtype=torch.bool)}, "attn_bias"),
        ({"attn_bias": "causal"}, "attn_bias"),
        ({"attn_bias": ab.AttentionBias()}, "attn_bias"),
        ({"attn_bias": ab.BlockDiagonalMask.from_seqlens([3], [5])}, "query"),
        ({"attn_bias": ab.BlockDiagonalMask.from_seqlens([4], [4])}, "key"),
        ({"p": 1.5}, "p"),
        ({"output_dtype": torch.int32}, "output_dtype"),
    ],
)
def test_bad_arguments_are_named(wrong, argument) -> None:
    q, k, v = qkv(1, 4, 5)
    with pytest.raises(ParametersInvalid) as caught:
        xf.memory_efficient_attention(**{"query": q, "key": k, "value": v, **wrong})
    assert caught.value.argument == argument


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend) -> None:
    torch.compiler.reset()
    q, k, v = qkv(1, 4, 5)

    @torch.compile(backend=backend, fullgraph=True)
    def run(q, k, v):
        return xf.memory_efficient_attention(q, k, v, attn_bias=ab.LowerTriangularMask())

    torch.testing.assert_close(run(q, k, v), reference(q, k, v, oracles.top_left(4, 5)).float())
