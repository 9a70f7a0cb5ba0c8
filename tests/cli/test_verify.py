"""--verify and --strict: what failed verification is told by the exit code."""

import json
import sys

import pytest

from mindiesd.cli.options import read

# Our kernel is made wrong; the program's result is right all the same.
WRONG = """\
import atexit, sys
import torch
import torch.nn.functional as F
import mindiesd.ops.norm as norm

right = [norm.rms_norm]
if "wrong" in sys.argv:
    norm.rms_norm = lambda *args: right[0](*args) * 1.01
x = torch.randn(4, 8)
for _ in range(3):
    y = F.rms_norm(x, (8,))
print(bool((y - x * torch.rsqrt(x.square().mean(-1, True))).abs().max() < 1e-5))
atexit.register(print, "at exit")
if "fail" in sys.argv:
    sys.exit(5)
"""
ONLY = "--only=torch_rms_norm"


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--verify=2", "--strict"], ["wrong"], 3),
        (["--verify", "2", "--strict", "--quiet"], ["wrong", "fail"], 3),
        (["--verify=2"], ["wrong"], 0),
        (["--verify=2", "--strict"], ["fail"], 5),
    ],
)
def test_exit_code(runner, options, words, code):
    runner.write("script.py", WRONG)
    done = runner.launch(ONLY, *options, "script.py", *words)
    assert (done.code, done.out) == (code, "True\nat exit\n"), done.err
    assert ("FAILED" in done.err) == ("wrong" in words and "--quiet" not in options)


def test_a_failure_in_a_child_counts(runner):
    runner.write("script.py", WRONG)
    code = f"import subprocess; print(subprocess.call([{sys.executable!r}, 'script.py', 'wrong']))"
    done = runner.launch(ONLY, "--verify", "--strict", "--report=r.json", "-c", code)
    assert (done.code, done.out) == (3, "True\nat exit\n0\n"), done.err
    data = json.loads((runner.folder / "r.json").read_text())
    assert data["summary"]["failed_verification"] == 1
    ((site,),) = [patch["sites"] for patch in data["patches"]]
    assert site["where"].endswith("script.py:11")
    assert "instead of" in site["failure"] or "error" in site["failure"]


@pytest.mark.parametrize(
    ("arguments", "verify", "rest"),
    [
        (["--verify", "3", "s.py", "4"], "3", ["s.py", "4"]),
        (["--verify", "s.py"], "1", ["s.py"]),
        (["--verify=5", "3"], "5", ["3"]),
        (["--verify", "--strict", "3"], "1", ["3"]),
    ],
)
def test_the_number_may_stand_apart(arguments, verify, rest):
    given, action, command = read(arguments)
    assert (given["verify"], action, command) == (verify, None, rest)


def test_a_script_that_is_called_like_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").write_text("")
    assert read(["--verify", "3"])[2] == ["3"]
