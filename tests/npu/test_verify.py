"""``verify=N`` on the emulated device: its operators are judged, and one that is wrong is found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.ops import norm
from tests.processes import ROOT
from tests.tiny import flux_inputs, tiny_flux_transformer


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


@torch.no_grad()
def test_a_model_whose_operators_are_right():
    model = tiny_flux_transformer().to("npu")
    inputs = flux_inputs(model)
    migration = mindiesd.patch_all(verify=2)
    for _ in range(3):
        model(**inputs, return_dict=False)
    report = migration.report()
    assert report.failed_verification == 0, str(report)
    verified = {patch.name for patch in report.patches if patch.verified}
    assert {"sdpa", "torch_rms_norm", "diffusers_rope"} <= verified


def test_an_operator_that_is_wrong_gives_way_at_its_line(monkeypatch):
    right = norm.rms_norm

    def wrong(x, *rest):
        return right(x, *rest) * (1.01 if x.shape[-1] == 32 else 1)

    monkeypatch.setattr(norm, "rms_norm", wrong)
    x, other = torch.randn(4, 32).npu(), torch.randn(4, 64).npu()
    expected = F.rms_norm(x, (32,))
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=1)
    for _ in range(3):
        assert torch.equal(F.rms_norm(x, (32,)), expected)
        F.rms_norm(other, (64,))
    (patch,) = migration.report().patches
    assert len(patch.failed_verification) == 1, patch.failed_verification
    assert "error" in patch.failed_verification[0] and "npu:0" in patch.failed_verification[0]
    # The first call of the line was redirected before it was judged.
    assert patch.redirected == 1 + 3 and sum(patch.fell_back.values()) == 2


SCRIPT = """\
import sys
import torch
import torch.nn.functional as F
import torch_npu
from mindiesd.ops import norm

right = norm.rms_norm
if "wrong" in sys.argv:
    norm.rms_norm = lambda *args: right(*args) * 1.01
x = torch.randn(4, 32).npu()
for _ in range(3):
    y = F.rms_norm(x, (32,))
print(bool((y - x * torch.rsqrt(x.square().mean(-1, True))).abs().max() < 1e-5))
"""


@pytest.mark.parametrize(("word", "code"), [("right", 0), ("wrong", 3)])
def test_the_launcher_ends_with_3(tmp_path, word, code):
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--emulate", "--verify=2", "--strict", "--only=torch_rms_norm"]
    done = subprocess.run(
        [sys.executable, "-m", "mindiesd.cli", *options, "script.py", word],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, "True\n"), done.stderr
    assert ("FAILED" in done.stderr) == (code == 3)
