"""Children are patched as their parent is, and counted in its one report."""

import json
import sys

import pytest

# A call of scaled_dot_product_attention is redirected, or falls back, and is counted either way.
WORK = """\
import torch
import torch.nn.functional as F

def go(calls):
    q = torch.randn(1, 2, 4, 8)
    for _ in range(calls):
        F.scaled_dot_product_attention(q, q, q)
"""


def counted(runner):
    data = json.loads((runner.folder / "r.json").read_text())
    (sdpa,) = (patch for patch in data["patches"] if patch["name"] == "sdpa")
    assert sdpa["status"] == "applied"
    return sdpa["redirected"] + sum(sdpa["fell_back"].values()), data["processes"]


def launch(runner, *command, **kwargs):
    done = runner.launch("--only=sdpa", "--report=r.json", *command, **kwargs)
    assert done.code == 0, done.err
    assert done.err.count("mindiesd: ") == 1, done.err
    assert runner.leftovers() == []
    return done


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(runner, method):
    runner.write("work.py", WORK)
    runner.write(
        "script.py",
        "import multiprocessing\n"
        "from work import go\n"
        "if __name__ == '__main__':\n"
        "    go(1)\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    children = [context.Process(target=go, args=(n,)) for n in (10, 100)]\n"
        "    for child in children: child.start()\n"
        "    for child in children: child.join()\n"
        "    print(*[child.exitcode for child in children])\n",
    )
    assert launch(runner, "script.py").out == "0 0\n"
    assert counted(runner) == (111, 3)


@pytest.mark.slow
def test_a_fork_and_a_command(runner):
    runner.write("work.py", WORK)
    runner.write(
        "script.py",
        "import os, subprocess, sys\n"
        "from work import go\n"
        "go(1)\n"
        "if os.fork() == 0:\n"
        "    go(10)\n"
        "    sys.exit()\n"
        "os.wait()\n"
        "subprocess.run([sys.executable, '-c', 'from work import go; go(100)'], check=True)\n"
        "go(1000)\n",
    )
    launch(runner, "script.py")
    assert counted(runner) == (1111, 3)


@pytest.mark.slow
def test_only_the_child_has_torch(runner):
    runner.write("work.py", WORK)
    child = [sys.executable, "-c", "from work import go; go(5)"]
    launch(runner, "-c", f"import subprocess; subprocess.run({child!r}, check=True)")
    assert counted(runner) == (5, 1)


@pytest.mark.slow
def test_torchrun(runner):
    runner.write("work.py", WORK)
    runner.write(
        "script.py",
        "import os\nfrom work import go\n"
        "go(10 ** int(os.environ['RANK']))\n"
        "open('rank' + os.environ['RANK'], 'w')\n",
    )
    launch(runner, "torchrun", "--nproc-per-node", "2", "script.py")
    assert all((runner.folder / f"rank{rank}").exists() for rank in (0, 1))
    assert counted(runner) == (11, 3)


@pytest.mark.slow
def test_accelerate_launch(runner):
    pytest.importorskip("accelerate")
    runner.write("work.py", WORK)
    runner.write("script.py", "import sys\nfrom work import go\ngo(7)\nprint(sys.argv)\n")
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    done = launch(runner, "accelerate", "launch", *options, "script.py", "--report")
    assert "['script.py', '--report']" in done.out
    assert counted(runner) == (7, 2)


@pytest.mark.slow
def test_an_option_reaches_the_child(runner):
    runner.write("work.py", WORK)
    child = [sys.executable, "-c", "from work import go; go(5)"]
    code = f"import subprocess; subprocess.run({child!r}, check=True)"
    done = runner.launch("--skip=sdpa", "--report=r.json", "-c", code)
    assert done.code == 0
    data = json.loads((runner.folder / "r.json").read_text())
    assert "sdpa" not in [patch["name"] for patch in data["patches"]]
    assert data["options"]["skip"] == ["sdpa"]
