"""The report as text, as data, and merged over processes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd import ParametersInvalid, Report
from mindiesd.patches.report import render


@pytest.fixture
def report() -> Report:
    migration = mindiesd.patch_all(only=["sdpa", "torch_rms_norm"])
    q = torch.randn(1, 2, 3, 8)
    for _ in range(1204):
        F.scaled_dot_product_attention(q, q, q)
    F.scaled_dot_product_attention(q[0], q[0], q[0])
    return migration.report()


def test_summary(report: Report) -> None:
    assert report.summary() == "mindiesd: 2 patches, 1 204 calls redirected, 1 fell back"


def test_table_names_targets_counts_reasons_and_what_was_never_called(report: Report) -> None:
    text = render(report, width=200)
    assert text.splitlines()[0] == report.summary()
    for part in (
        "torch.nn.functional.scaled_dot_product_attention → mindiesd.attention_forward",
        "1 204",
        "fell back 1 ×: 3-D input",
        "never called",
        "applied",
    ):
        assert part in text, part
    assert "\x1b" not in text
    assert str(report).splitlines()[0] == report.summary()
    assert max(map(len, render(report, width=80).splitlines())) <= 80


def test_dictionary_round_trip(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["schema"] == 2
    assert data["summary"] == {"patches": 2, "redirected": 1204, "traced": 0, "fell_back": 1}
    assert data["patches"][0]["fell_back"] == {"3-D input": 1}
    assert data["versions"]["torch"].startswith("2.")
    assert Report.from_dict(data).to_dict() == data
    with pytest.raises(ParametersInvalid, match="schema"):
        Report.from_dict({**data, "schema": 99})


def test_merged_adds_counts_and_prefers_applied(report: Report) -> None:
    other = Report.from_dict(report.to_dict())
    other.patches[0].status, other.patches[0].reason = "pending", "not imported"
    other.patches[0].fell_back = {"3-D input": 2, "dropout": 1}
    merged = Report.merged([other, report])
    assert merged.processes == 2
    assert merged.patches[0].status == "applied" and merged.patches[0].reason == ""
    assert merged.redirected == 2 * 1204
    assert merged.patches[0].fell_back == {"3-D input": 3, "dropout": 1}
    assert merged.summary().endswith("2 processes")
    with pytest.raises(ParametersInvalid):
        Report.merged([])


def test_report_after_the_end_keeps_the_counts(report: Report) -> None:
    migration = mindiesd.patch_all(only=["sdpa", "torch_rms_norm"])
    mindiesd.unpatch_all()
    assert migration.report().redirected == 1204
    assert {patch.status for patch in migration.report().patches} == {"applied"}
