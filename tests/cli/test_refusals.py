"""What cannot be run, or could not be patched: one line that says what to do, exit code 2."""

from importlib.util import find_spec

import pytest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to run"),
        (["--strict"], "nothing to run"),
        (["./missing.py"], "no such file"),
        (["missing.py"], "neither a file here nor a command"),
        (["no-such-command-at-all"], "neither a file here nor a command"),
        ([""], "empty"),
        (["-m"], "needs the name of a module"),
        (["-c"], "needs code"),
        (["--frobnicate", "s.py"], "--frobnicate"),
        (["-u", "s.py"], "python -u"),
        (["--only"], "--only"),
        (["--only", "", "s.py"], "--only"),
        (["--only", "no_such_patch", "s.py"], "--only: received no_such_patch; allowed: any of"),
        (["--skip=sdpa,no_such_patch", "s.py"], "--skip: received no_such_patch; allowed: any of"),
        (["--numerics", "wild", "s.py"], "faithful or fast"),
        (["--verify=x", "s.py"], "--verify: received 'x'"),
        (["--verify=-1", "s.py"], "a whole number"),
        (["--report=s.py", "s.py"], "ends in .json"),
        (["--report=nowhere/r.json", "s.py"], "there is no directory"),
        (["--strict=1", "s.py"], "--strict"),
        (["./folder/"], "without __main__.py"),
        (["plain.sh"], "not executable"),
    ],
)
def test_one_line_and_exit_code_2(runner, words, said):
    runner.write("s.py", "print('must not run')")
    runner.write("folder/other.py", "")
    runner.write("plain.sh", "#!/bin/sh\necho must not run\n")
    assert said in runner.refused(*words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ONLY", "no_such_patch"),
        ("SKIP", ","),
        ("NUMERICS", "wild"),
        ("VERIFY", "many"),
        ("STRICT", "perhaps"),
        ("QUIET", "2"),
        ("REPORT", "report.txt"),
    ],
)
def test_variables_are_read_as_strictly_as_options(runner, name, value):
    runner.write("s.py", "print('must not run')")
    assert f"MINDIESD_{name}: received" in runner.refused("s.py", **{f"MINDIESD_{name}": value})


@pytest.mark.parametrize(
    "options", [["-I"], ["-E"], ["-S"], ["-BI"], ["-X", "dev", "-sE"], ["-Wignore", "-u", "-S"]]
)
def test_a_python_that_would_ignore_us(runner, options):
    line = runner.refused("python3", *options, "-c", "print('must not run')")
    assert "nothing could be patched" in line


def test_a_script_whose_first_line_asks_for_an_isolated_python(runner):
    runner.write("bin/tool", "#!/usr/bin/python3 -Es\nprint('must not run')\n").chmod(0o755)
    path = f"{runner.folder / 'bin'}:{runner.env['PATH']}"
    assert "nothing could be patched" in runner.refused("tool", PATH=path)


@pytest.mark.parametrize("options", [["-X", "utf8", "-c"], ["-Wignore", "-c"], ["-sBc"]])
def test_a_python_with_other_options_runs(runner, options):
    done = runner.launch("--quiet", "python3", *options, "print('ran')", "-I")
    assert (done.code, done.out, done.err) == (0, "ran\n", "")


def test_a_good_command_line_beats_a_variable(runner):
    runner.write("s.py", "import os; print(os.environ.get('MINDIESD_SKIP'))")
    done = runner.launch(
        "--skip", "sdpa, rope", "--skip=layer_norm", "s.py", MINDIESD_SKIP="rms_norm"
    )
    assert done.out == "sdpa,rope,layer_norm\n"


def test_options_reach_children_as_variables(runner):
    runner.write(
        "show.py",
        """
import os
print(sorted(item for item in os.environ.items() if item[0].startswith("MINDIESD_")))
""",
    )
    options = ["--only=sdpa", "--numerics", "fast", "--strict", "--quiet", "--report=r.json"]
    done = runner.launch(*options, "bash", "-c", "python3 show.py", MINDIESD_VERIFY="0")
    assert eval(done.out) == [
        ("MINDIESD_NUMERICS", "fast"),
        ("MINDIESD_ONLY", "sdpa"),
        ("MINDIESD_QUIET", "1"),
        ("MINDIESD_REPORT", str(runner.folder / "r.json")),
        ("MINDIESD_STRICT", "1"),
    ]


def test_help_and_version(runner):
    done = runner.launch("--help")
    assert done.code == 0
    for word in ("--only", "--skip", "--numerics", "--verify", "--strict", "--report", "--quiet"):
        assert word in done.out
    assert runner.launch("--version").out.startswith("mindiesd ")


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_emulate_without_torch_npu(runner):
    assert "torch_npu" in runner.refused("--emulate", "-c", "print('must not run')")
