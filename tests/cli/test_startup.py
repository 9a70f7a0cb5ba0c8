"""What the launcher costs, and what it must not do before the program asks for it."""

import statistics
import sys
import time

import pytest

from mindiesd.bootstrap.path import _mindiesd_start
from mindiesd.patches.registry import records


def test_every_package_with_patches_is_watched():
    assert {record.after.partition(".")[0] for record in records()} <= _mindiesd_start.WATCHED


def test_nothing_of_ours_is_loaded_before_it_is_needed(runner):
    code = "import sys; print([m for m in sys.modules if m.partition('.')[0] in %r])"
    names = ("mindiesd", "wrapt", "torch", "click", "rich")
    assert runner.launch("-c", code % (names,)).out == "[]\n"


def test_asking_whether_torch_is_there_does_not_import_it(runner):
    runner.write("torch/__init__.py", "raise SystemExit('torch was imported')")
    code = (
        "import importlib.util as u; print(u.find_spec('torch').origin, u.find_spec('diffusers_'))"
    )
    assert runner.launch("-c", code).out == f"{runner.folder}/torch/__init__.py None\n"


def test_threads_that_import_at_once(runner):
    runner.write("torch/__init__.py", "import time; time.sleep(0.2); done = 1")
    runner.write("transformers/__init__.py", "import time; time.sleep(0.2); done = 1")
    code = """
import threading
def load(name):
    print(__import__(name).done, end='')
threads = [threading.Thread(target=load, args=(n,)) for n in ("torch", "transformers") * 4]
for t in threads: t.start()
for t in threads: t.join()
"""
    done = runner.launch("-c", code)
    assert (done.code, done.out) == (0, "1" * 8)
    assert done.err.startswith("mindiesd: ")
    assert done.err.count("\n") == 1


@pytest.mark.bench
def test_cost(runner, capsys):
    """pytest -m bench tests/cli -s"""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "mindiesd-run python -c pass": [*runner.launcher, sys.executable, "-c", "pass"],
        "mindiesd-run --quiet …": [*runner.launcher, "--quiet", sys.executable, "-c", "pass"],
        "mindiesd-run --skip …": [*runner.launcher, "--skip=sdpa", sys.executable, "-c", "pass"],
    }
    times = {name: [] for name in commands}
    for _ in range(21):
        for name, command in commands.items():
            start = time.perf_counter()
            runner.run(command)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    bare = medians["python -c pass"]
    with capsys.disabled():
        for name, median in medians.items():
            print(f"\n{name:30} {median:6.1f} ms  + {median - bare:.1f}", end="")
    assert medians["mindiesd-run python -c pass"] - bare <= 150
