"""flash_attn's functions against float64 references."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd import ParametersInvalid
from mindiesd.patches.front_doors import composed
from mindiesd.patches.front_doors import flash_attn as fa
from tests import oracles

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
few = settings(max_examples=35, deadline=None)


@st.composite
def rules(draw):
    """Keyword arguments, and the same for the oracle as (left, right)."""
    left, right = draw(st.sampled_from([(-1, -1), (0, 0), (2, -1), (-1, 3), (1, 2), (40, 40)]))
    causal = draw(st.booleans())
    given = {
        "causal": causal,
        "window_size": (left, right),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
        "softmax_scale": draw(st.sampled_from([None, 0.3])),
    }
    return given, (left, 0 if causal else right)


@st.composite
def shapes(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "batch": draw(st.integers(1, 3)),
        "queries": draw(st.integers(1, 9)),
        "keys": draw(st.integers(0, 9)),
        "heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "kv_heads": kv_heads,
        "dim": draw(st.sampled_from([1, 8, 12])),
    }


def tensors(shape, dtype, strided=False):
    b, d = shape["batch"], shape["dim"]
    q = torch.randn(b, shape["queries"], shape["heads"], d).to(dtype)
    k, v = (torch.randn(b, shape["keys"], shape["kv_heads"], d).to(dtype) for _ in range(2))
    if strided:
        # Memory [B, N, S, D], and every second column.
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k = torch.stack([k, k], -1).flatten(-2)[..., ::2]
    return q, k, v


def expected(q, k, v, given, window, slopes=None):
    """Output and log-sum-exp in float64, [B, S, N, D] and [B, N, S]."""
    b, n, queries, keys = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    keep = oracles.window(queries, keys, *window)
    bias = None if slopes is None else oracles.alibi(slopes, b, n, queries, keys)
    one = (q.transpose(1, 2), k.transpose(1, 2))
    more = {"scale": given["softmax_scale"], "softcap": given["softcap"]}
    out = oracles.attention(*one, v.transpose(1, 2), keep, bias, **more)
    return out.transpose(1, 2), oracles.log_sum_exp(*one, keep, bias, **more)


@few
@given(rules(), shapes(), st.sampled_from(DTYPES), st.sampled_from([0, 1, 2]), st.booleans())
def test_dense(rule, shape, dtype, slopes, strided) -> None:
    given_, window = rule
    q, k, v = tensors(shape, dtype, strided)
    alibi = None
    if slopes:
        alibi = torch.rand(*([shape["batch"]] if slopes == 2 else []), shape["heads"])
    want, want_lse = expected(q, k, v, given_, window, alibi)
    out = fa.flash_attn_func(q, k, v, alibi_slopes=alibi, **given_)
    assert out.dtype is dtype and out.is_contiguous()
    oracles.assert_close(out, want)
    again, lse, weights = fa.flash_attn_func(
        q, k, v, alibi_slopes=alibi, return_attn_probs=True, **given_
    )
    oracles.assert_close(again, want)
    assert lse.dtype is torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert weights.numel() == 0


@few
@given(rules(), st.data(), st.sampled_from(DTYPES), st.sampled_from([0, 1, 2]), st.booleans())
def test_varlen(rule, data, dtype, slopes, lists) -> None:
    given_, window = rule
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4))
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 4)]))
    heads, d = kv_heads * groups, 8
    n, m = [a for a, _ in pairs], [b for _, b in pairs]
    q = torch.randn(sum(n), heads, d).to(dtype)
    k, v = (torch.randn(sum(m), kv_heads, d).to(dtype) for _ in range(2))
    alibi = None
    if slopes:
        alibi = torch.rand(*([len(pairs)] if slopes == 2 else []), heads)
    cu_q, cu_k = [0, *accumulate(n)], [0, *accumulate(m)]
    if not lists:
        cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k))
    arguments = (q, k, v, cu_q, cu_k, max(n, default=0), max(m, default=0))
    more = {"alibi_slopes": alibi, **given_}
    parts, lses = [torch.zeros(0, heads, d).double()], [torch.zeros(heads, 0).double()]
    at_q = at_k = 0
    for row, (a, b) in enumerate(pairs):
        own = alibi if slopes != 2 else alibi[row]
        out, lse = expected(
            q[None, at_q : at_q + a], k[None, at_k : at_k + b], v[None, at_k : at_k + b],
            given_, window, own,
        )  # fmt: skip
        parts.append(out[0])
        lses.append(lse[0])
        at_q, at_k = at_q + a, at_k + b
    want, want_lse = torch.cat(parts), torch.cat(lses, -1)
    oracles.assert_close(fa.flash_attn_varlen_func(*arguments, **more), want)
    again, lse, _ = fa.flash_attn_varlen_func(*arguments, return_attn_probs=True, **more)
    oracles.assert_close(again, want)
    assert lse.shape == (heads, q.shape[0])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_packed_forms_are_the_same_calls() -> None:
    qkv = torch.randn(2, 7, 3, 4, 8)
    q, k, v = (part.contiguous() for part in qkv.unbind(2))
    want = oracles.attention(
        *(t.transpose(1, 2) for t in (q, k, v)), oracles.bottom_right(7, 7)
    ).transpose(1, 2)
    oracles.assert_close(fa.flash_attn_qkvpacked_func(qkv, causal=True), want)
    oracles.assert_close(fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), want)
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = qkv.flatten(0, 1)
    out = fa.flash_attn_varlen_qkvpacked_func(flat, cu, 7, causal=True)
    oracles.assert_close(out, want.flatten(0, 1))
    out = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 7, 7, causal=True)
    oracles.assert_close(out, want.flatten(0, 1))


def test_block_table() -> None:
    page, lengths = 4, [7, 0, 4, 9]
    k, v = torch.randn(8, page, 2, 8), torch.randn(8, page, 2, 8)
    table = torch.tensor([[5, 1, 0], [0, 0, 0], [2, 0, 0], [7, 3, 6]], dtype=torch.int32)
    q = torch.randn(4, 4, 8)
    cu_q = torch.arange(5, dtype=torch.int32)
    cu_k = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    out = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, 9, causal=True, block_table=table)
    for row, length in enumerate(lengths):
        own_k, own_v = (
            torch.cat([t[number] for number in table[row].tolist()])[None, :length].transpose(1, 2)
            for t in (k, v)
        )
        want = oracles.attention(q[row][None, :, None], own_k, own_v)
        oracles.assert_close(out[row][None, :, None], want)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (0, 0)])
def test_gradients(softcap, window) -> None:
    # More queries than keys: some rows see nothing, and must not make NaN of the others.
    q = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v):
        return fa.flash_attn_func(q, k, v, causal=True, window_size=window, softcap=softcap)

    assert torch.autograd.gradcheck(run, (q, k, v), eps=1e-6, atol=1e-6)
    cu_q, cu_k = torch.tensor([0, 3, 4]), torch.tensor([0, 1, 3])

    def packed(q, k, v):
        return fa.flash_attn_varlen_func(
            q[0], k[0], v[0], cu_q, cu_k, 3, 2, causal=True, window_size=window, softcap=softcap
        )

    assert torch.autograd.gradcheck(packed, (q, k, v), eps=1e-6, atol=1e-6)


def test_gradient_where_there_is_no_key() -> None:
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    k = torch.randn(1, 0, 2, 8)
    fa.flash_attn_func(q, k, k).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_dropout_is_right_on_average_and_says_what_it_dropped() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    want, _ = expected(q, k, v, {"softmax_scale": None, "softcap": 0.0}, (-1, -1))
    total, kept, count = torch.zeros_like(q), 0, 1500
    for _ in range(count):
        out, _, weights = fa.flash_attn_func(q, k, v, dropout_p=0.25, return_attn_probs=True)
        total += out
        kept += (weights >= 0).sum().item()
    # 4 standard errors of a value that varies by less than 2.
    assert (total / count - want).abs().max() < 8 / math.sqrt(count)
    every = weights.numel() * count
    assert abs(kept / every - 0.75) < 4 * math.sqrt(0.25 * 0.75 / every)
    # The last call's result follows from what it says it dropped.
    again = torch.einsum("bnij,bjnd->bind", weights.clamp(min=0) / 0.75, v)
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(weights.abs().sum(-1), torch.ones(1, 2, 5))


def test_dropout_varlen() -> None:
    q = torch.randn(5, 2, 8)
    cu = torch.tensor([0, 2, 5])
    _, lse, weights = fa.flash_attn_varlen_func(
        q, q, q, cu, cu, 3, 3, dropout_p=0.5, return_attn_probs=True
    )
    assert lse.shape == (2, 5) and weights.shape == (2, 2, 3, 3)
    torch.testing.assert_close(weights.abs().sum(-1)[1], torch.ones(2, 3))
    assert torch.equal(weights[0, :, 2], torch.zeros(2, 3))


@pytest.mark.parametrize("more", [{}, {"softcap": 50.0}, {"causal": True}])
def test_autocast_has_no_say(more) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 2, 5])
    want = fa.flash_attn_func(q, k, v, **more)
    want_packed = fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 3, 3, **more)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fa.flash_attn_func(q, k, v, **more), want)
        packed = fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 3, 3, **more)
    assert torch.equal(packed, want_packed)


def test_a_long_window_is_computed_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr(composed, "_BLOCK", 64)
    seen = []
    block = composed._block

    def spy(query, key, *rest):
        seen.append((query.shape[2], key.shape[2]))
        return block(query, key, *rest)

    monkeypatch.setattr(composed, "_block", spy)
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    slopes = torch.rand(2)
    given_ = {"softcap": 2.0, "window_size": (3, 1), "softmax_scale": None}
    out, lse, _ = fa.flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True, **given_)
    want, want_lse = expected(q, k, v, given_, (3, 1), slopes)
    oracles.assert_close(out, want)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert len(seen) > 10 and max(rows * keys for rows, keys in seen) <= 64


BAD = [
    ({"q": torch.ones(2, 3, 4)}, "q"),
    ({"k": torch.ones(1, 5, 3, 8), "v": torch.ones(1, 5, 3, 8)}, "k"),
    ({"k": torch.ones(2, 5, 4, 8)}, "k"),
    ({"v": torch.ones(1, 4, 2, 8)}, "v"),
    ({"v": torch.ones(1, 5, 2, 8).half()}, "v"),
    ({"dropout_p": 1.0}, "dropout_p"),
    ({"dropout_p": torch.ones(3)}, "dropout_p"),
    ({"softmax_scale": "1"}, "softmax_scale"),
    ({"causal": torch.ones(3)}, "causal"),
    ({"window_size": 3}, "window_size"),
    ({"window_size": (1, None)}, "window_size"),
    ({"softcap": math.inf}, "softcap"),
    ({"alibi_slopes": torch.ones(3)}, "alibi_slopes"),
    ({"alibi_slopes": torch.ones(1, 1, 4)}, "alibi_slopes"),
    ({"return_attn_probs": 1}, "return_attn_probs"),
]


@pytest.mark.parametrize(("wrong", "argument"), BAD)
def test_bad_arguments_are_named(wrong, argument) -> None:
    right = {"q": torch.ones(1, 3, 4, 8), "k": torch.ones(1, 5, 2, 8), "v": torch.ones(1, 5, 2, 8)}
    fa.flash_attn_func(**right)
    with pytest.raises(ParametersInvalid) as caught:
        fa.flash_attn_func(**{**right, **wrong})
    assert caught.value.argument == argument


def test_bad_lengths_are_named() -> None:
    q = torch.ones(4, 2, 8)
    good = torch.tensor([0, 4])
    for cu_k, argument in [
        (torch.tensor([0, 3]), "cu_seqlens_k"),
        (torch.tensor([1, 4]), "cu_seqlens_k"),
        (torch.tensor([0, 2, 4]), "cu_seqlens_k"),
        (torch.tensor([0.0, 4.0]), "cu_seqlens_k"),
    ]:
        for more in ({}, {"softcap": 1.0}):
            with pytest.raises(ParametersInvalid) as caught:
                fa.flash_attn_varlen_func(q, q, q, good, cu_k, 4, 4, **more)
            assert caught.value.argument == argument
    for more in ({}, {"softcap": 1.0}):
        with pytest.raises(ParametersInvalid) as caught:
            fa.flash_attn_varlen_func(q, q, q, good, good, 4, 3, **more)
        assert caught.value.argument == "max_seqlen_k"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "more", [{}, {"causal": True}, {"window_size": (2, 1)}, {"softcap": 2.0, "causal": True}]
)
def test_compiles_into_one_graph(backend, more) -> None:
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))

    @torch.compile(backend=backend, fullgraph=True)
    def run(q, k, v):
        return fa.flash_attn_func(q * 2, k, v, **more)

    torch.testing.assert_close(run(q, k, v), fa.flash_attn_func(q * 2, k, v, **more))


def test_varlen_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    q, cu = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, cu):
        return fa.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True)

    want = fa.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True)
    torch.testing.assert_close(run(q, cu), want)
