"""``--compare`` without torch: what it refuses, how it runs the command twice, how it tells."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mindiesd.cli.compare import _Runs
from mindiesd.cli.comparison import Outcome, compared, table
from mindiesd.cli.stdin import Stdin
from mindiesd.emulator.counts import Counts, stack
from mindiesd.patches.report import PatchReport, Report


@pytest.mark.parametrize("given", [["--compare"], []])
def test_needs_the_emulator(runner, given):
    variables = {} if given else {"MINDIESD_COMPARE": "1"}
    said = runner.refused(*given, "-c", "print('must not run')", **variables)
    assert ("--compare" if given else "MINDIESD_COMPARE") in said
    assert "--emulate" in said


def test_does_not_go_with_verify(runner):
    assert "--verify" in runner.refused("--emulate", "--compare", "--verify=1", "-c", "pass")


def test_the_variable_is_read_strictly(runner):
    assert "1 or 0" in runner.refused("-c", "pass", MINDIESD_COMPARE="perhaps")


# Standard input, in a process whose own is what the test gives.

TWICE = """
import subprocess, sys
from mindiesd.cli.stdin import Stdin
stdin = Stdin()
for code in sys.argv[1:]:
    with stdin.again() as given:
        done = subprocess.run([sys.executable, "-c", code], stdin=given, capture_output=True)
        print(repr(done.stdout.decode()), done.returncode, done.stderr.decode()[-300:], flush=True)
"""
READ = "import sys; sys.stdout.write(sys.stdin.read())"
ONE_LINE = "print(input())"
NOTHING = "pass"


def twice(*codes, **kwargs):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TWICE, *codes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **kwargs)
    assert done.returncode == 0, done.stderr
    return [line.rsplit(" 0 ", 1)[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("text", ["", "hello\nworld\n", "x" * 300_000])
def test_a_pipe_is_given_twice(text):
    assert twice(READ, READ, input=text) == [repr(text)] * 2


def test_a_pipe_of_which_the_first_run_reads_a_part():
    text = "".join(f"line {number}\n" for number in range(50_000))
    assert twice(ONE_LINE, READ, input=text) == [repr("line 0\n"), repr(text)]
    assert twice(READ, ONE_LINE, input=text) == [repr(text), repr("line 0\n")]
    assert twice(NOTHING, READ, input=text) == ["''", repr(text)]


def test_a_pipe_that_nobody_closes_stops_nobody():
    read, write = os.pipe()
    try:
        os.write(write, b"one\ntwo\n")
        assert twice(ONE_LINE, NOTHING, ONE_LINE, stdin=read) == ["'one\\n'", "''", "'one\\n'"]
    finally:
        os.close(read)
        os.close(write)


def test_what_comes_late():
    read, write = os.pipe()

    def late():
        time.sleep(1.0)
        os.write(write, b"late\n")
        os.close(write)

    thread = threading.Thread(target=late)
    thread.start()
    assert twice(READ, READ, stdin=read) == ["'late\\n'"] * 2
    thread.join()
    os.close(read)


def test_a_file_from_where_it_stands(tmp_path):
    path = tmp_path / "input"
    path.write_text("skipped\nhello\n")
    with open(path, "rb") as file:
        os.lseek(file.fileno(), 8, os.SEEK_SET)
        assert twice(READ, READ, stdin=file) == ["'hello\\n'"] * 2


def test_a_terminal_is_not_read():
    import pty

    ours, theirs = pty.openpty()
    try:
        assert twice(READ, READ, stdin=theirs) == ["''"] * 2
    finally:
        os.close(ours)
        os.close(theirs)


def test_no_standard_input(tmp_path):
    assert twice(NOTHING, NOTHING, stdin=subprocess.DEVNULL) == ["''"] * 2
    assert Stdin()._kind in ("empty", "file", "stream", "as it is")


# The table.


def report(lines, sources=(), trace=True):
    counts = Counts()
    for key, number in lines.items():
        counts.stacks[stack(list(key))] += number
        counts.sites.setdefault(key[0], type(counts.launches)())["aten::add"] += number
        counts.launches["aten::add"] += number
        counts.bytes_read += 1000 * number
    texts = dict.fromkeys(("name", "family", "target", "becomes", "why", "numerics"), "x")
    patch = PatchReport(**texts, status="applied", sources=list(sources))
    return Report(patches=[patch], trace=counts.to_dict() if trace else None)


ROPE = "/lib/site-packages/diffusers/embeddings.py"
UNPATCHED = {
    ("diffusers/embeddings.py:11", "flux.py:80", "main.py:1"): 4,
    ("diffusers/embeddings.py:12", "flux.py:80", "main.py:1"): 2,
    ("diffusers/embeddings.py:30", "flux.py:90", "main.py:1"): 3,
    ("flux.py:81", "main.py:1"): 5,
}
PATCHED = {("flux.py:80", "main.py:1"): 1, ("flux.py:81", "main.py:1"): 5, ("main.py:2",): 2}


def both(code=0, missing=0, **kwargs):
    patched = report(PATCHED, [f"{ROPE}:10-20"])
    without = report(UNPATCHED, **kwargs)
    patched.compare = compared(Outcome(code, without, missing), Outcome(0, patched, 0))
    return patched


def test_lines_are_those_of_the_program_in_both_runs():
    """What a replaced function launched belongs to its caller, as its replacement's launches do."""
    assert both().compare["lines"] == {
        "flux.py:81": [5, 5],
        "main.py:2": [0, 2],
        "flux.py:80": [6, 1],
        "diffusers/embeddings.py:30": [3, 0],
    }


def test_a_table_with_ratios_and_never_a_time():
    text = table(both())
    assert text.splitlines()[2].split() == ["launches", "14", "8", "0.57"]
    assert "13.7 KiB" in text and "7.8 KiB" in text
    assert " ms" not in text and "second" not in text
    json.dumps(both().to_dict())
    assert Report.from_dict(both().to_dict()).to_dict() == both().to_dict()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"code": 3}, "without the patches failed (exit code 3)"),
        ({"code": -signal.SIGKILL}, "without the patches failed (signal 9)"),
        ({"missing": 1}, None),
        ({"trace": False}, "nothing was counted in the run without the patches"),
    ],
)
def test_no_ratio_of_what_is_incomplete(kwargs, said):
    found = both(**kwargs)
    assert found.compare["complete"] is False
    text = table(found)
    assert said is None or said in " ".join(text.split())
    assert "0.57" not in text


# Two runs. The commands are no Python: nothing is counted, everything else happens.


def runs(tmp_path, *words, monkeypatch):
    from mindiesd.bootstrap.settings import Settings
    from mindiesd.cli.command import Command

    monkeypatch.chdir(tmp_path)
    return _Runs(Command(words[0], list(words)), Settings(quiet=True))


def test_both_runs_see_the_same(tmp_path, monkeypatch, capfd):
    made = runs(tmp_path, "/usr/bin/env", monkeypatch=monkeypatch)
    try:
        made._command = made._command._replace(
            executable="/bin/sh",
            arguments=["sh", "-c", "env >> seen; echo --- >> seen; echo shown; exit 3", "a b"],
        )
        codes = [made.run(which).code for which in ("unpatched", "patched")]
    finally:
        made.clean()
    assert codes == [3, 3]
    assert capfd.readouterr().out == "shown\n", "the first run's output is not shown"
    one, two, _ = (tmp_path / "seen").read_text().split("---\n")
    differing = set(one.splitlines()) ^ set(two.splitlines())
    assert {line.partition("=")[0] for line in differing} == {"_MINDIESD_RUN", "_MINDIESD_SESSION"}
    assert "PYTHONHASHSEED=" in one and "MINDIESD_COMPARE" not in one
    assert not os.path.exists(made._folder)
