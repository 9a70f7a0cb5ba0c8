"""Tools that run somebody's program, around ours and below it."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytestmark = pytest.mark.slow

# A program whose output is worth comparing: results, and the lines that a tool would stop at.
PROGRAM = """\
import torch
import torch.nn.functional as F

def norm(x):
    return F.rms_norm(x, (8,))

def main():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    total = 0.0
    for step in range(3):
        total += float(norm(x)[step].sum())
    print("total", round(total, 4))

if __name__ == "__main__":
    main()
"""


def redirected(runner, name="torch_rms_norm", file="r.json"):
    data = json.loads((runner.folder / file).read_text())
    (patch,) = [patch for patch in data["patches"] if patch["name"] == name]
    return patch["redirected"]


# pytest.

SUITE = """\
import pytest, torch
import torch.nn.functional as F

@pytest.fixture
def x():
    return torch.arange(32.0).reshape(4, 8)

@pytest.mark.parametrize("rows", [1, 2, 4])
def test_norm(x, rows):
    assert F.rms_norm(x[:rows], (8,)).shape == (rows, 8)

def test_fails(x):
    assert F.rms_norm(x, (8,)).sum() == 0

def test_raises():
    with pytest.raises(RuntimeError, match="shape"):
        F.rms_norm(torch.ones(4, 7), (8,))

@pytest.mark.skip
def test_skipped():
    raise AssertionError

@pytest.mark.xfail
def test_expected():
    raise ValueError

def test_monkeypatched(monkeypatch):
    monkeypatch.setattr(F, "rms_norm", lambda *args: 5)
    assert F.rms_norm(1, 2) == 5

def test_after_monkeypatched(x):
    assert F.rms_norm(x, (8,)).shape == x.shape
"""


def outcome(text):
    """The results of pytest without times."""
    return re.sub(r"in [0-9.]+s", "", text)


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "xdist"])
def test_pytest(runner, options):
    runner.write("test_foreign.py", SUITE)
    runner.write("pytest.ini", "[pytest]\n")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *options]
    plain = runner.plain(*command)
    launched = runner.launch("--quiet", "--report=r.json", *command)
    assert plain.code == launched.code == 1
    if options:  # workers finish in any order
        assert outcome(plain.out).splitlines()[-1] == outcome(launched.out).splitlines()[-1]
    else:
        assert outcome(launched.out) == outcome(plain.out)
    assert "1 failed, 6 passed, 1 skipped, 1 xfailed" in launched.out
    assert redirected(runner) == 5


# Debuggers.


@pytest.mark.parametrize(
    "commands",
    ["continue\nquit\n", "break norm\ncontinue\np x.shape\nup\np step\nclear 1\ncontinue\nquit\n"],
    ids=["run through", "break and look"],
)
def test_pdb(runner, commands):
    runner.write("script.py", PROGRAM)
    same = runner.same("-m", "pdb", "script.py", stdin=commands)
    assert "total" in same.out
    done = runner.launch("--report=r.json", "-m", "pdb", "script.py", stdin=commands)
    assert done.out == same.out
    assert redirected(runner) == 3


def test_stepping_over_a_redirected_call_stays_in_the_users_code(runner):
    runner.write("script.py", PROGRAM)
    commands = "break norm\ncontinue\nnext\nnext\nnext\nquit\n"
    out = runner.launch("--quiet", "-m", "pdb", "script.py", stdin=commands).out
    stops = re.findall(r"^(?:\(Pdb\) )?> (\S+)\(\d+\)", out, re.MULTILINE)
    assert stops and all(stop.endswith("script.py") for stop in stops), out


def test_tracing_sees_the_users_lines(runner):
    """sys.settrace, which debuggers and coverage tools build on."""
    runner.write("script.py", PROGRAM)
    tracer = (
        "import sys, runpy\nseen = []\n"
        "def trace(frame, event, arg):\n"
        "    if frame.f_code.co_filename.endswith('script.py'):\n"
        "        seen.append((frame.f_code.co_name, event, frame.f_lineno))\n"
        "        return trace\n"
        "import torch\nsys.settrace(trace)\n"
        "runpy.run_path('script.py', run_name='__main__')\nsys.settrace(None)\nprint(seen)\n"
    )
    runner.write("tracer.py", tracer)
    assert "norm" in runner.same("tracer.py").out


# Coverage.


def test_coverage(runner):
    pytest.importorskip("coverage")
    runner.write("script.py", PROGRAM)
    measured = {}
    for name, start in (("plain", runner.plain), ("launched", runner.launch)):
        options = ["--report=r.json"] if name == "launched" else []
        run = ["-m", "coverage", "run", "--branch", f"--data-file={name}.db", "script.py"]
        done = start(*options, *run)
        assert done.code == 0 and done.out.startswith("total "), done.err
        made = runner.plain(
            "-m", "coverage", "json", f"--data-file={name}.db", "-o", f"{name}.json", "-q"
        )
        assert made.code == 0, made
        data = json.loads((runner.folder / f"{name}.json").read_text())
        measured[name] = data["files"]["script.py"]
    assert measured["launched"] == measured["plain"]
    assert measured["plain"]["missing_lines"] == []
    assert redirected(runner) == 3


# OpenTelemetry's runner, which takes the same place as ours: sitecustomize.


def test_opentelemetry_around_ours(runner):
    pytest.importorskip("opentelemetry.instrumentation")
    ask = "import sys\nprint('theirs', any('opentelemetry' in m for m in sys.modules))\n"
    runner.write("script.py", PROGRAM + ask)
    program = [sys.executable, "script.py"]
    plain = runner.run(["opentelemetry-instrument", *program])
    done = runner.run(["opentelemetry-instrument", *runner.launcher, "--report=r.json", *program])
    assert (done.code, done.out) == (plain.code, plain.out), done.err
    assert "theirs True" in done.out
    assert redirected(runner) == 3


def test_opentelemetry_below_ours_is_refused(runner):
    """Its sitecustomize comes before ours then and calls no other: nothing would be patched."""
    pytest.importorskip("opentelemetry.instrumentation")
    line = runner.refused("opentelemetry-instrument", sys.executable, "-c", "print(1)")
    assert "opentelemetry-instrument mindiesd-run" in line


# ddtrace's runner, which does as well, and imports the next sitecustomize on the path.


@pytest.mark.parametrize("order", ["around ours", "below ours"])
def test_ddtrace(runner, order):
    pytest.importorskip("ddtrace", reason="not in the environment of the tests, see pyproject.toml")
    ask = "import sys\nprint('theirs', 'ddtrace.bootstrap.sitecustomize' in sys.modules)\n"
    runner.write("script.py", PROGRAM + ask)
    program = [sys.executable, "script.py"]
    # Nothing is sent anywhere.
    off = ("TRACE", "INSTRUMENTATION_TELEMETRY", "REMOTE_CONFIGURATION", "CRASHTRACKING")
    quiet = {f"DD_{name}_ENABLED": "false" for name in off}
    plain = runner.run(["ddtrace-run", *program], **quiet)
    ours = [*runner.launcher, "--report=r.json"]
    command = ["ddtrace-run", *ours] if order == "around ours" else [*ours, "ddtrace-run"]
    done = runner.run([*command, *program], **quiet)
    assert (done.code, done.out) == (plain.code, plain.out), done.err
    assert "theirs True" in done.out
    assert redirected(runner) == 3


# Jupyter.


def test_a_notebook_kernel(runner):
    """What a notebook server starts is a child process of it, and patched like any other."""
    pytest.importorskip("ipykernel")
    runner.write(
        "script.py",
        "from jupyter_client.manager import start_new_kernel\n"
        "manager, client = start_new_kernel(kernel_name='python3')\n"
        "def run(code):\n"
        "    said = []\n"
        "    def hook(message):\n"
        "        if message['msg_type'] == 'stream':\n"
        "            said.append(message['content']['text'])\n"
        "        elif message['msg_type'] == 'error':\n"
        "            said.append('\\n'.join(message['content']['traceback']))\n"
        "    client.execute_interactive(code, output_hook=hook, timeout=90)\n"
        "    print(''.join(said), end='')\n"
        "run('import torch, torch.nn.functional as F')\n"
        "run('print(F.rms_norm(torch.ones(2, 8), (8,)).shape)')\n"
        "run('import mindiesd; mindiesd.unpatch_all(); m = mindiesd.patch_all(only=\"sdpa\")')\n"
        "run('q = torch.ones(1, 2, 4, 8); F.scaled_dot_product_attention(q, q, q)')\n"
        "run('print(m.report().redirected); mindiesd.unpatch_all()')\n"
        "client.stop_channels(); manager.shutdown_kernel()\n",
    )
    done = runner.launch("script.py")
    assert done.code == 0, done.err
    assert done.out == "torch.Size([2, 8])\n1\n", done.err


def test_autoreload(runner):
    """It executes a changed module again, and puts new code into old functions."""
    pytest.importorskip("IPython")
    runner.write(
        "mine.py", "import torch.nn.functional as F\ndef work(x):\n    return F.rms_norm(x, (8,))\n"
    )
    changed = "import torch.nn.functional as F\nfrom torch.nn.functional import rms_norm\n"
    changed += "def work(x):\n    return 2 * rms_norm(x, (8,))\n"
    runner.write(
        "script.ipy",
        f"""\
%load_ext autoreload
%autoreload 2
import os, time, torch, mindiesd
import mine
get_ipython().run_line_magic("autoreload", "now")
x = torch.randn(4, 8)
one = mine.work(x)
open("mine.py", "w").write({changed!r})
os.utime("mine.py", (time.time() + 5, time.time() + 5))
get_ipython().run_line_magic("autoreload", "now")
two = mine.work(x)
print(torch.equal(two, 2 * one))
mindiesd.unpatch_all()
print(hasattr(mine.rms_norm, "__wrapped__"), torch.allclose(mine.work(x), two))
get_ipython().run_line_magic("autoreload", "now")
print(torch.allclose(mine.work(x), two))
""",
    )
    done = runner.launch("--report=r.json", "-m", "IPython", "script.ipy")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-3:] == ["True", "False True", "True"], done.out + done.err
