"""A script whose first line imports a package that cannot be installed here."""

import json

SCRIPT = """
from flash_attn import flash_attn_func
import xformers.ops
import torch
x = torch.ones(1, 3, 2, 8)
assert torch.equal(flash_attn_func(x, x, x), x)
print(flash_attn_func.__name__)
"""


def test_the_script_runs_and_the_report_tells(runner):
    script = runner.write("project/run.py", SCRIPT)
    assert "No module named 'flash_attn'" in runner.plain(script).err
    done = runner.launch("--report=report.json", script)
    assert (done.code, done.out) == (0, "flash_attn_func\n"), done.err
    report = json.loads((runner.folder / "report.json").read_text())
    found = {patch["name"]: patch for patch in report["patches"]}
    assert (found["flash_attn"]["status"], found["flash_attn"]["redirected"]) == ("provided", 1)
    assert found["xformers"]["status"] == "provided"
    assert "3 provided" in done.err


def test_skipped_it_is_as_before(runner):
    script = runner.write("run.py", SCRIPT)
    done = runner.launch("--skip", "flash_attn", script)
    assert done.code == 1 and "No module named 'flash_attn'" in done.err


def test_status_says_what_would_be_provided(runner):
    done = runner.launch("--status")
    (line,) = (line for line in done.out.splitlines() if line.split()[1:2] == ["flash_attn"])
    assert line.startswith("ok ")
    assert "2 provided to the script: the package is not installed" in line
    assert "only if named in --only: flash_attn_3" in line
