"""docs/matrix.md says what the models and the patches do.

Measuring every model takes minutes (``scripts/_coverage.py --check``). Here the part of the page
that needs no run is compared as a whole, and a sample of the models is run: another one whenever
the package changes, so that in time every row has its turn.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from mindiesd.patches.registry import left

from .test_models import LAUNCHES
from .tiny_models import MODELS

ROOT = Path(__file__).resolve().parents[2]
# So many launches, unpatched, take about fifteen seconds to run three times.
BUDGET = 3000


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import _coverage

    return _coverage


def pinned():
    """The versions that constraints.txt pins, as a page tells its own."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    names = ("torch", "torch_npu", "diffusers", "transformers")
    return ", ".join(f"{name} {pins[name].split()[0]}" for name in names)


@pytest.fixture
def page(scripts):
    """The page of the installed versions."""
    here = ", ".join(f"{name} {version}" for name, version in scripts.versions().items())
    for path in sorted(scripts.MATRIX.parent.glob("matrix*.md")):
        text = path.read_text(encoding="utf-8")
        if f" with {here}.\n" in text:
            return text
    if here == pinned():
        pytest.fail(f"no page of docs/ is of {here}")
    pytest.skip(f"no page of docs/ is of {here}")


def test_the_page_is_of_the_tested_versions(scripts):
    assert f" with {pinned()}.\n" in scripts.MATRIX.read_text(encoding="utf-8")


def test_every_model_has_its_row(scripts, page):
    assert {*scripts._matrix.lines(page)} == {*MODELS}


def test_the_launches_of_the_unpatched_models(scripts, page):
    if f" with {pinned()}.\n" not in page:
        pytest.skip("the launches known to the tests are those of the pinned versions")
    lines = scripts._matrix.lines(page)
    told = {name: line.split(" | ")[1].partition(" → ")[0] for name, line in lines.items()}
    assert told == {name: str(count) for name, count in LAUNCHES.items()}


def test_reasons_are_those_of_the_patches(page):
    """Of the functions that are left alone in every model."""
    reasons = {one.target: one.reason for family in left().values() for one in family}
    found = 0
    for line in page.partition("## Left, and why")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            target, reason, _ = line.removeprefix("| `").split(" | ")
            target = target.removesuffix("`")
            for name in (target, target.removesuffix(".forward")):
                if name in reasons:
                    assert reason == reasons[name], target
                    found += 1
    assert found > 20


def test_nothing_is_unknown(scripts):
    page = scripts.MATRIX.read_text(encoding="utf-8")
    assert "cells that are unknown: 0\n" in page
    assert "**unknown**" not in page.partition("| model |")[2]


def sample():
    """Names of models, drawn by what is in the package."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "mindiesd").rglob("*.py")):
        digest.update(path.read_bytes())
    state = digest.digest()
    order = sorted(MODELS, key=lambda name: hashlib.sha256(state + name.encode()).digest())
    drawn, launches = [], 0
    for name in order:
        launches += LAUNCHES[name]
        if launches > BUDGET:
            return drawn or [name]
        drawn.append(name)
    raise AssertionError("the budget is larger than the suite")


def test_the_rows_of_some_models(scripts, page):
    found = scripts.rows(sample())
    assert not scripts._matrix.drift(page, found, scripts.versions())


def test_drift_is_seen(scripts, page):
    """A page that tells something else of a model is found out."""
    name = "temporal"
    found = scripts.rows([name])
    drift = scripts._matrix.drift
    assert not drift(page, found, scripts.versions())
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
    assert drift(page.replace(line + "\n", ""), found, scripts.versions())
    fewer = line.replace(f"| {LAUNCHES[name]} →", f"| {LAUNCHES[name] - 1} →")
    assert drift(page.replace(line, fewer), found, scripts.versions())
    other = line.replace("| redirected |", "| left |", 1)
    assert other != line and drift(page.replace(line, other), found, scripts.versions())
    assert drift(page, found, {"torch": "1.0"})
    error = line.split(" | ")[2]
    other = line.replace(f"| {error} |", "| 9e-09 |")
    assert not drift(page.replace(line, other), found, scripts.versions()), "of the machine"
    for target, reason in scripts._matrix._reasons(found):
        changed = page.replace(f"| `{target}` | {reason} |", f"| `{target}` | because |")
        assert drift(changed, found, scripts.versions())


# A function that nobody has looked at.

NEW = """
import torch
from torch import nn


class NewFamilyRMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def apply_new_rotary_emb(x, cos, sin):
    return x * cos + x.roll(1, -1) * sin


class NewFamilyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = NewFamilyRMSNorm()
        self.plain = nn.LayerNorm(4)

    def forward(self, x, scale, shift):
        x = self.norm(x) * (1 + scale) + shift
        return self.plain(apply_new_rotary_emb(x, scale, shift))
"""


def test_what_a_newer_library_brings_is_unknown(scripts, tmp_path, monkeypatch):
    import importlib.util

    from _seen import watching

    import mindiesd

    name = "diffusers.models.transformers.transformer_new_family"
    path = tmp_path / "transformer_new_family.py"
    path.write_text(NEW)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    block = module.NewFamilyBlock()
    given = torch.randn(3, 2, 4)
    with torch.no_grad(), watching() as seen:
        block(*given)
    migration = mindiesd.patch_all()
    try:
        with torch.no_grad(), watching() as still:
            block(*given)
        row = scripts._matrix.cells(seen, still, *scripts._matrix.outcomes(migration.report()))
    finally:
        mindiesd.unpatch_all()
    assert row["norm"].unknown == [f"{name}.NewFamilyRMSNorm.forward"]
    assert row["norm"].redirected == ["torch.nn.modules.normalization.LayerNorm.forward"]
    assert row["rope"].unknown == [f"{name}.apply_new_rotary_emb"]
    assert row["adaptive norm"].unknown == [f"{name}.NewFamilyBlock.forward"]
    assert {str(row[kind]) for kind in ("norm", "rope", "adaptive norm")} == {"**unknown**"}
