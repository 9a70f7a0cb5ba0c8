"""The report as text, as data, and merged over processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd import ParametersInvalid, Report
from mindiesd.ops import norm
from mindiesd.patches.report import SCHEMA, render

DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKAGE = DOCS.parent / "mindiesd" / "patches"


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
    assert data["schema"] == 3
    assert data["summary"] == {
        "patches": 2,
        "redirected": 1204,
        "traced": 0,
        "fell_back": 1,
        "verified": 0,
        "failed_verification": 0,
    }
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


# Single calling lines, and the schema.


def work(calls: int) -> tuple[int, int]:
    """Calls from two lines; the second falls back. Returns the first's number."""
    x = torch.randn(4, 8)
    for _ in range(calls):
        F.rms_norm(x, (8,))
        F.rms_norm(x.double(), (8,))
        F.rms_norm(x, (8,)), F.rms_norm(x, (8,))
    first = work.__code__.co_firstlineno + 4
    return first, first + 1


def sites(migration: mindiesd.Migration) -> dict[int, Any]:
    (patch,) = migration.report().patches
    assert all(site.where.startswith(f"{__file__}:") for site in patch.sites)
    return {int(site.where.rpartition(":")[2]): site for site in patch.sites}


def test_calls_are_counted_by_line_on_request() -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm", sites=True)
    first, second = work(5)
    found = sites(migration)
    assert set(found) == {first, second, second + 1}
    assert (found[first].redirected, found[first].fell_back) == (5, {})
    assert found[second].redirected == 0
    assert found[second].fell_back == {"dtype other than float32, bfloat16, float16": 5}
    assert found[second + 1].redirected == 10, "two calls of one line"
    assert migration.report().verified == 0
    text = render(migration.report(), width=400)
    assert f"{__file__}:{first}: 5 redirected" in text
    assert f"{__file__}:{second}: 0 redirected, 5 fell back: dtype" in text


def test_lines_are_verified_without_being_counted_and_both() -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=2)
    first, second = work(5)
    found = sites(migration)
    assert (found[first].verified, found[first].redirected) == (2, None)
    assert 0 < found[first].largest_error < 1e-6
    mindiesd.unpatch_all()
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=2, sites=True)
    work(5)
    found = sites(migration)
    assert (found[first].verified, found[first].redirected) == (2, 5)
    assert found[second].verified == 0


def test_a_line_that_failed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *args: right(*args) * 1.01)
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=2, sites=True)
    first, _ = work(5)
    line = sites(migration)[first]
    assert "against float64" in line.failure
    assert (line.redirected, line.fell_back) == (1, {"failed verification at this line": 4})


def test_lines_of_calls_that_cannot_be_verified_are_counted() -> None:
    """Records that say NOT_COMPARED have no judge, and still have calling lines."""
    from mindiesd.patches.registry import NOT_COMPARED, records

    pytest.importorskip("diffusers")
    processors = pytest.importorskip("diffusers.models.attention_processor")
    names = [r.name for r in records() if r.reference == NOT_COMPARED and "processors" in r.build]
    migration = mindiesd.patch_all(only=names, verify=1, sites=True)
    sliced = processors.SlicedAttnProcessor(1)
    attention = processors.Attention(16, heads=2, dim_head=8, processor=sliced)
    with torch.no_grad():
        attention(torch.randn(1, 4, 16))
    seen = [site for patch in migration.report().patches for site in patch.sites]
    assert [site.redirected + sum(site.fell_back.values()) for site in seen] == [1]
    assert seen[0].verified == 0


def test_lines_are_merged() -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=1, sites=True)
    first, second = work(3)
    one = migration.report()
    two = Report.from_dict(one.to_dict())
    (patch,) = two.patches
    patch.sites = [site for site in patch.sites if not site.where.endswith(f":{second}")]
    (patch,) = Report.merged([one, two]).patches
    found = {int(site.where.rpartition(":")[2]): site for site in patch.sites}
    assert (found[first].redirected, found[first].verified) == (6, 2)
    assert sum(found[second].fell_back.values()) == 3
    assert one.patches[0].sites[0].redirected == 3, "merging changes none of its parts"


def test_a_compiled_call_has_no_line() -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=1, sites=True)
    compiled = torch.compile(lambda x: F.rms_norm(x, (8,)), backend="eager", fullgraph=True)
    compiled(torch.randn(2, 8))
    (patch,) = migration.report().patches
    assert (patch.traced, patch.sites) == (1, [])


def test_real_reports_are_as_the_schema_says(report: Report) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((PACKAGE / "report.schema.json").read_text("utf-8"))
    assert schema["properties"]["schema"]["const"] == SCHEMA
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    checker.validate(json.loads(report.to_json()))
    mindiesd.unpatch_all()
    migration = mindiesd.patch_all(verify=1, sites=True, sparse="rf_v2:0.5")
    work(2)
    data = json.loads(migration.report().to_json())
    checker.validate(data)
    assert any(patch["sites"] for patch in data["patches"])
    with mindiesd.patch_pipeline(torch.nn.LayerNorm(8)) as scoped:
        checker.validate(json.loads(scoped.report().to_json()))
    for wrong in (
        {**data, "schema": SCHEMA - 1},
        {**data, "more": 1},
        {key: value for key, value in data.items() if key != "notes"},
    ):
        assert not checker.is_valid(wrong)


def test_every_field_is_on_the_page() -> None:
    page = (DOCS / "report.md").read_text("utf-8")
    schema = json.loads((PACKAGE / "report.schema.json").read_text("utf-8"))
    fields = {
        *schema["properties"],
        *schema["$defs"]["patch"]["properties"],
        *schema["$defs"]["site"]["properties"],
        *schema["properties"]["summary"]["properties"],
    }
    missing = [name for name in sorted(fields) if f"`{name}`" not in page]
    assert not missing
