"""Bands and masks against predicates of (row, column)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd.ops.masks import (
    CAUSAL,
    TOP_LEFT_CAUSAL,
    AttentionMask,
    Band,
    attention_mask,
    broadcasts,
    for_sdpa,
)
from tests import oracles

CPU = torch.device("cpu")
bound = st.none() | st.integers(-8, 8)
bands = st.builds(Band, bound, bound)
size = st.integers(0, 7)


def kept(band, queries, keys):
    def rule(i, j):
        after = band.lower is None or j - i >= band.lower
        return after and (band.upper is None or j - i <= band.upper)

    return oracles.predicate(queries, keys, rule)


@given(bands, size, size)
def test_matrix(band, queries, keys):
    assert torch.equal(band.matrix(queries, keys, CPU), kept(band, queries, keys))


@given(bands, bands, size, size)
def test_intersect(one, other, queries, keys):
    both = kept(one, queries, keys) & kept(other, queries, keys)
    assert torch.equal(kept(one.intersect(other), queries, keys), both)


@given(bands, size, size)
def test_within_changes_nothing(band, queries, keys):
    small = band.within(queries, keys)
    assert torch.equal(kept(small, queries, keys), kept(band, queries, keys))
    if kept(band, queries, keys).all() and queries and keys:
        assert small == Band(None, None)


@given(st.integers(-1, 8), st.integers(-1, 8), size, size)
def test_window(left, right, queries, keys):
    found = kept(Band.window(left, right, queries, keys), queries, keys)
    assert torch.equal(found, oracles.window(queries, keys, left, right))


@given(size, size)
def test_alignments(queries, keys):
    assert torch.equal(kept(TOP_LEFT_CAUSAL, queries, keys), oracles.top_left(queries, keys))
    bottom = Band.window(-1, 0, queries, keys)
    assert torch.equal(kept(bottom, queries, keys), oracles.bottom_right(queries, keys))


@given(bands, size, size, st.sampled_from(["none", "keep", "bias", "both"]))
def test_for_sdpa_means_the_same(band, queries, keys, kind):
    generator = torch.Generator().manual_seed(queries * 8 + keys)
    keep = bias = None
    if kind in ("keep", "both"):
        keep = torch.rand(queries, keys, generator=generator) > 0.4
    if kind in ("bias", "both"):
        bias = torch.randn(queries, keys, generator=generator)
    mask = AttentionMask(keep, bias, band)
    found, is_causal = for_sdpa(mask, queries, keys, torch.float32, CPU)
    expected = torch.zeros(queries, keys) if bias is None else bias
    expected = expected.masked_fill(~kept(band, queries, keys), -math.inf)
    if keep is not None:
        expected = expected.masked_fill(~keep, -math.inf)
    if is_causal:
        assert found is None
        actual = torch.zeros(queries, keys).masked_fill(~oracles.top_left(queries, keys), -math.inf)
    elif found is None:
        actual = torch.zeros(queries, keys)
    elif found.dtype is torch.bool:
        actual = torch.zeros(queries, keys).masked_fill(~found, -math.inf)
    else:
        actual = found
    assert torch.equal(actual.expand(queries, keys), expected)


@pytest.mark.parametrize(
    ("band", "queries", "keys", "expected"),
    [
        (Band(None, 0), 5, 5, (None, True)),
        (Band(None, 0), 5, 9, (None, True)),
        (Band(None, 0), 9, 5, (None, True)),
        (Band(-4, 0), 5, 5, (None, True)),
        (Band.window(-1, 0, 1, 7), 1, 7, (None, False)),
        (Band.window(-1, 0, 6, 6), 6, 6, (None, True)),
        (Band.window(-1, -1, 6, 3), 6, 3, (None, False)),
        (Band(-20, 20), 6, 3, (None, False)),
    ],
)
def test_no_matrix_where_a_flag_is_enough(monkeypatch, band, queries, keys, expected):
    def never(*_):
        raise AssertionError("built a matrix")

    monkeypatch.setattr(Band, "matrix", never)
    assert for_sdpa(AttentionMask(band=band), queries, keys, torch.float32, CPU) == expected


def test_the_callers_mask_is_passed_on_itself():
    for tensor in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(1, 1, 3, 4)):
        mask = attention_mask(tensor)
        assert for_sdpa(mask, 3, 4, torch.float32, CPU)[0] is tensor


def test_bias_dtypes_that_sdpa_takes():
    def lowered(bias_dtype, query_dtype):
        mask = attention_mask(torch.zeros(2, 2, dtype=bias_dtype))
        return for_sdpa(mask, 2, 2, query_dtype, CPU)[0].dtype

    assert lowered(torch.float32, torch.float16) is torch.float32
    assert lowered(torch.float16, torch.float16) is torch.float16
    assert lowered(torch.bfloat16, torch.float16) is torch.float32
    assert lowered(torch.float16, torch.float32) is torch.float32


def test_attention_mask_values():
    keep, bias = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    assert attention_mask(None) is None
    assert attention_mask(None, True) == CAUSAL
    assert attention_mask(keep).keep is keep
    assert attention_mask(keep).bias is None
    assert attention_mask(bias).bias is bias
    assert attention_mask(bias).keep is None
    assert attention_mask(bias, True, Band(-3, 2)).band == Band(-3, 0)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=5),
    st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 4),
)
def test_broadcasts_is_torch_broadcasting(shape, scores):
    try:
        fits = torch.broadcast_shapes(tuple(shape), scores) == scores
    except RuntimeError:
        fits = False
    # SDPA takes no mask of fewer than two dimensions.
    assert broadcasts(torch.Size(shape), *scores) == (fits and 2 <= len(shape) <= 4)
