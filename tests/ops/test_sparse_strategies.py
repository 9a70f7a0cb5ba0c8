"""rf_v2 and ada_bsa: which blocks are kept, by rules written out, and how good the result is."""

import math
from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd import ParametersInvalid, attention_forward, sparse_attention
from mindiesd.ops.sparse import adaptive, compiled, kernel, rainfusion
from mindiesd.ops.sparse.rearrange import sequence_order
from mindiesd.ops.sparse.selection import BLOCK, Selection, blocks_of, kept, largest
from tests import oracles
from tests.ops.test_sparse_kernels import token_mask, wide
from tests.video import local_video

SHARES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.9, 0.95, 1.0])


@given(st.integers(1, 300), st.integers(0, 100))
def test_the_share_is_exact_in_decimals(blocks, percent):
    exact = math.ceil(Fraction(100 - percent, 100) * blocks)
    assert kept(blocks, percent / 100) == max(1, exact)


def test_largest_takes_the_first_of_equals():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert largest(scores, 2).tolist() == [[False, True, True, False, False]]


LATENTS = st.sampled_from([(2, 16, 16), (3, 10, 9), (1, 7, 30), (4, 8, 24), (1, 1, 3)])


@given(LATENTS, LATENTS, st.sampled_from([0, 1, 77, 130]), st.booleans(), SHARES, st.booleans())
def test_rainfusion_keeps_the_best_means_and_all_text(q_shape, k_shape, text, last, share, frame):
    query = torch.randn(1, 4, math.prod(q_shape) + text, 8)
    key = torch.randn(1, 2, math.prod(k_shape) + text, 8)
    chosen = rainfusion.select(query, key, -0.3, q_shape, k_shape, text, text, last, share, frame)

    def means(x, shape):
        placed = x[:, :, sequence_order(shape, text, last, x.device)].double()
        return torch.stack([part.mean(2) for part in placed.split(BLOCK, 2)], 2)

    heads = [head // 2 for head in range(4)]
    scores = torch.einsum("bnid,bnjd->bnij", means(query, q_shape), means(key, k_shape)[:, heads])
    scores = -0.3 * scores
    count = kept(scores.shape[-1], share)
    # The kept means are the best; a rounding apart, which of two equals is kept is free.
    worst_kept = scores.masked_fill(~chosen.keep, math.inf).amin(-1)
    kth = scores.sort(-1, descending=True).values[..., count - 1]
    best_left = scores.masked_fill(chosen.keep, -math.inf).amax(-1)
    assert (best_left <= kth + 1e-5).all()
    forced = torch.zeros_like(chosen.keep)
    for length, shape, dim in ((query.shape[2], q_shape, -2), (key.shape[2], k_shape, -1)):
        for block in range(blocks_of(length)):
            with_text = (block + 1) * BLOCK > length - text and text > 0
            in_frame = frame and block * BLOCK < shape[1] * shape[2]
            if with_text or in_frame:
                forced.select(dim, block)[:] = True
    assert chosen.keep[forced].all()
    free = ~forced.any(-1) if not forced.any() else ~forced.all(-1)
    only_best = chosen.keep & ~forced
    assert (only_best.sum(-1)[free] <= count).all()
    if not forced.any():
        assert (chosen.keep.sum(-1) == count).all()
        assert (worst_kept >= kth - 1e-5).all()


ESTIMATES = {"aten": None}
if compiled.functions() is not None:
    ESTIMATES |= {"compiled": compiled.functions(), "wide": wide()}


@contextmanager
def estimated_by(name):
    with mock.patch.object(compiled, "functions", return_value=ESTIMATES[name]):
        yield


@pytest.mark.parametrize("by", ESTIMATES)
@given(
    st.sampled_from([5, 128, 300, 1032, 1100]),
    st.sampled_from([8, 128, 250, 1000, 1029]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.booleans(),
)
def test_the_estimate_is_the_softmax_of_antidiagonal_sums(
    by, queries, keys, dtype, causal, head_first
):
    query, key = torch.randn(1, 2, queries, 6).to(dtype), torch.randn(1, 1, keys, 6).to(dtype)
    if not head_first:
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    with estimated_by(by):
        scores = adaptive.estimate(query, key, 0.7, causal)
    wide = torch.nn.functional.pad
    q = wide(query.double(), (0, 0, 0, -queries % 8)).view(2, -1, 8, 6)
    k = wide(key.double(), (0, 0, 0, -keys % 8)).view(1, -1, 8, 6)
    sums = 0
    for i in range(8):
        sums = sums + torch.einsum("ngd,mhd->ngh", q[:, :, 7 - i], k[:, :, i])
    sums = sums * 0.7 / 8
    if causal:
        sums = sums.masked_fill(~oracles.top_left(*sums.shape[1:]), -math.inf)
    shares = torch.softmax(sums, -1)
    shares = wide(shares, (0, -shares.shape[2] % 16, 0, -shares.shape[1] % 16))
    expected = shares.view(2, shares.shape[1] // 16, 16, -1, 16).sum((2, 4))[None]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ESTIMATES)
def test_equal_scores_are_estimated_equal(by):
    with estimated_by(by):
        scores = adaptive.estimate(torch.zeros(1, 1, 512, 8), torch.randn(1, 1, 512, 8), 1.0, False)
    torch.testing.assert_close(scores, torch.full((1, 1, 4, 4), 4.0))


# With 4097 and 4105 queries, a last block of one and of two groups.
@pytest.mark.parametrize("by", ESTIMATES)
@pytest.mark.parametrize(
    ("queries", "keys"), [(4096, 4096), (300, 4200), (4100, 4100), (4097, 4096), (4105, 4103)]
)
def test_a_long_estimate_looks_at_a_quarter_of_the_groups(by, queries, keys, monkeypatch):
    query, key = torch.randn(1, 1, queries, 8), torch.randn(1, 1, keys, 8)
    with estimated_by(by):
        sampled = adaptive.estimate(query, key, 0.3, False)
        monkeypatch.setattr(adaptive, "LONG", 1 << 30)
        full = adaptive.estimate(query, key, 0.3, False)
    assert sampled.shape == full.shape and (sampled.sum(-1) > 0).all()
    whole = slice(0, queries // BLOCK)
    torch.testing.assert_close(sampled.sum(-1)[..., whole] * 4, full.sum(-1)[..., whole])


@given(
    st.sampled_from([(5, 5), (12, 12), (3, 7), (7, 3)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    SHARES,
)
def test_adaptive_selection(shape, causal, sink, recent, threshold, share):
    scores = torch.rand(1, 2, *shape)
    chosen = adaptive.choose(scores, causal, sink, recent, threshold, share)
    for head in range(2):
        for row in range(shape[0]):
            seen = min(row + 1, shape[1]) if causal else shape[1]
            values = scores[0, head, row, :seen].double().tolist()
            first = ([0] if sink else []) + ([seen - 1] if recent else [])
            first = list(dict.fromkeys(first))
            rest = sorted(set(range(seen)) - set(first), key=lambda j: -values[j])
            expected, mass = set(first), sum(values[j] for j in first)
            most = max(kept(seen, share), len(first) + (kept(seen, share) + 1) // 2)
            for block in rest:
                full = len(expected) >= most
                enough = threshold < 1 and mass >= threshold * sum(values)
                if expected and (full or enough):
                    break
                expected.add(block)
                mass += values[block]
            assert set(chosen[0, head, row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rf_v2_is_exact_attention_over_what_it_keeps(layout, dtype):
    latent_q, latent_k, text = (3, 10, 9), (2, 12, 16), 77
    query = torch.randn(2, 4, 347, 16).to(dtype)
    key, value = (torch.randn(2, 2, 461, size).to(dtype) for size in (16, 24))
    given_ = [t if layout == "BNSD" else t.transpose(1, 2) for t in (query, key, value)]
    out = sparse_attention(
        *given_,
        head_num=4,
        input_layout=layout,
        sparse_type="rf_v2",
        sparsity=0.6,
        txt_len=text,
        latent_shape_q=latent_q,
        latent_shape_k=list(latent_k),
    )
    chosen = rainfusion.select(query, key, 0.25, latent_q, latent_k, text, text, False, 0.6)
    expected = oracles.attention(query, key, value, keep=token_mask(chosen, 347, 461))
    oracles.assert_close(out if layout == "BNSD" else out.transpose(1, 2), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep_sink": False}, {"cdf_threshold": 0.4}])
def test_ada_bsa_is_exact_attention_over_what_it_keeps(causal, options):
    query, key, value = torch.randn(3, 1, 2, 900, 16)
    out = sparse_attention(
        query, key, value, sparse_type="ada_bsa", sparsity=0.5, is_causal=causal, **options
    )
    every = {"keep_sink": True, "keep_recent": True, "cdf_threshold": 1.0} | options
    chosen = adaptive.select(query, key, 0.25, causal, sparsity=0.5, **every)
    assert not chosen.keep.all()
    expected = oracles.attention(query, key, value, keep=token_mask(chosen, 900, 900))
    oracles.assert_close(out, expected)


def test_so_little_sparsity_that_nothing_is_dropped_is_dense():
    query, key, value = torch.randn(3, 1, 2, 250, 16)
    out = sparse_attention(query, key, value, sparse_type="ada_bsa", sparsity=0.4)
    oracles.assert_close(out, oracles.attention(query, key, value))


@pytest.mark.parametrize("sparse_type", ["rf_v2", "ada_bsa"])
def test_everything_sparse_still_attends_to_a_block(sparse_type):
    query, key, value = torch.randn(3, 1, 1, 512, 16)
    out = sparse_attention(
        query, key, value, sparse_type=sparse_type, sparsity=1.0, latent_shape_q=(2, 16, 16)
    )
    assert out.isfinite().all()


WRONG = [
    ("latent_shape_q", {"latent_shape_q": None}),
    ("latent_shape_q", {"latent_shape_q": (2, 4, 4)}),
    ("latent_shape_k", {"latent_shape_k": (2, 4, 4)}),
    ("latent_shape_q", {"txt_len": 30}),
    ("is_causal", {"is_causal": True}),
    ("protect_first_frame", {"protect_first_frame": 1}),
]


@pytest.mark.parametrize(("argument", "changes"), WRONG)
def test_wrong_arguments_of_rf_v2(argument, changes):
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    arguments = {"sparse_type": "rf_v2", "sparsity": 0.5, "latent_shape_q": (2, 3, 4)}
    with pytest.raises(ParametersInvalid) as caught:
        sparse_attention(q, k, v, **{**arguments, **changes})
    assert caught.value.argument == argument


def test_keys_of_another_length_need_a_latent_shape():
    q, k = torch.randn(1, 2, 24, 8), torch.randn(1, 2, 48, 8)
    arguments = {"sparse_type": "rf_v2", "sparsity": 0.5, "latent_shape_q": (2, 3, 4)}
    with pytest.raises(ParametersInvalid, match="latent_shape_k"):
        sparse_attention(q, k, k, **arguments)
    assert sparse_attention(q, k, k, latent_shape_k=(4, 3, 4), **arguments).shape == q.shape


@pytest.mark.parametrize("lengths", [(0, 24), (24, 0)])
def test_empty_sequences(lengths):
    q, k = torch.randn(1, 2, lengths[0], 8), torch.randn(1, 2, lengths[1], 8)
    out = sparse_attention(q, k, k, sparse_type="ada_bsa", sparsity=0.5)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("sparse_type", ["rf_v2", "ada_bsa"])
def test_an_empty_batch(sparse_type):
    q = torch.randn(0, 2, 24, 8)
    arguments = {"sparse_type": sparse_type, "sparsity": 0.5, "latent_shape_q": (2, 3, 4)}
    assert sparse_attention(q, q, q, **arguments).shape == q.shape


@pytest.mark.parametrize("sparse_type", ["rf_v2", "ada_bsa"])
def test_autocast_decides_the_dtype_as_for_dense(sparse_type):
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    arguments = {"sparse_type": sparse_type, "sparsity": 0.5, "latent_shape_q": (2, 16, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_attention(q, k, v, **arguments)
        dense = attention_forward(q, k, v, head_first=True)
    assert out.dtype is dense.dtype is torch.bfloat16
    halves = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(out, sparse_attention(*halves, **arguments))


LATENT = (6, 32, 32)


def relative_error(out, dense):
    return ((out - dense).norm() / dense.norm()).item()


def at_random(q, k, v, share, latent, text, seed):
    """The same number of blocks, text included, chosen by dice."""
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(q.shape[2])
    dice = torch.rand(*q.shape[:2], blocks, blocks, generator=generator)
    keep = largest(dice, kept(blocks, share))
    if text:
        first = (q.shape[2] - text) // BLOCK
        keep[..., first:] = True
        keep[..., first:, :] = True
    order = sequence_order(latent, text, False, q.device)
    return kernel.over_blocks(q, k, v, Selection(keep, order, order), q.shape[-1] ** -0.5)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
@pytest.mark.parametrize(("sparse_type", "text"), [("rf_v2", 0), ("rf_v2", 90), ("ada_bsa", 0)])
def test_far_better_than_chance_on_local_attention(sparse_type, text, share):
    q, k, v = local_video(LATENT, 1, 64, text, reach=3.0)
    dense = attention_forward(q, k, v, head_first=True)
    out = sparse_attention(
        q, k, v, sparse_type=sparse_type, sparsity=share, txt_len=text, latent_shape_q=LATENT
    )
    chance = min(
        relative_error(at_random(q, k, v, share, LATENT, text, seed), dense) for seed in range(3)
    )
    assert relative_error(out, dense) < 0.5 * chance


def test_more_blocks_are_never_much_worse():
    q, k, v = local_video(LATENT, 1, 64, reach=3.0)
    dense = attention_forward(q, k, v, head_first=True)
    for sparse_type in ("rf_v2", "ada_bsa"):
        errors = [
            relative_error(
                sparse_attention(
                    q, k, v, sparse_type=sparse_type, sparsity=share, latent_shape_q=LATENT
                ),
                dense,
            )
            for share in (0.25, 0.5, 0.75, 0.9)
        ]
        assert errors == sorted(errors), (sparse_type, errors)
