"""The statistics of the demo, against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from scripts import _scores


@given(st.integers(1, 500).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_interval_is_wilsons(case):
    right, of = case
    oracle = binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert _scores.wilson(right, of) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=60))
def test_paired_counts_and_mcnemar(rows):
    first, second, truth = (np.array(column) for column in zip(*rows, strict=True))
    found = _scores.paired(first, second, truth)
    lost = sum(a == t and b != t for a, b, t in rows)
    won = sum(a != t and b == t for a, b, t in rows)
    assert (found.lost, found.won, found.of) == (lost, won, len(rows))
    assert found.same == sum(a == b for a, b, _ in rows)
    oracle = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert found.p == pytest.approx(oracle, abs=1e-12)


def test_noise_ends_where_the_test_says():
    truth = np.zeros(200, int)
    five, six = truth.copy(), truth.copy()
    five[:5], six[:6] = 1, 1
    assert _scores.paired(truth, five, truth).within_noise  # p = 0.0625
    assert not _scores.paired(truth, six, truth).within_noise  # p = 0.03125
