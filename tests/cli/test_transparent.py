"""A script cannot tell that mindiesd-run started it."""

import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest

from mindiesd.cli.options import read

# -c and -m have no __file__ or have it elsewhere; sys.executable may be python or python3.
FACTS = """\
import os, sys
print(sys.argv, sys.path, sys.flags, os.getcwd())
print(__name__, globals().get("__file__"), __spec__, globals().get("__package__"))
print("sitecustomize" in sys.modules, sorted(sys.path_importer_cache))
"""


def test_a_script_sees_the_same_world(runner):
    runner.write("script.py", FACTS)
    assert "script.py" in runner.same("script.py", "one").out


def test_a_script_in_another_directory(runner):
    runner.write("deep/er/script.py", FACTS + "import sibling\n")
    runner.write("deep/er/sibling.py", "print('sibling', __file__)")
    assert "sibling" in runner.same("deep/er/script.py").out


def test_a_script_behind_a_link_finds_its_siblings(runner):
    runner.write("real/script.py", FACTS + "import sibling\n")
    runner.write("real/sibling.py", "print('sibling')")
    (runner.folder / "link.py").symlink_to("real/script.py")
    assert runner.same("link.py").code == 0


def test_a_users_python_path_stays(runner):
    runner.write("script.py", FACTS + "import far\n")
    runner.write("lib/far.py", "print('far')")
    path = os.pathsep.join(["lib", str(runner.folder / "nowhere"), ""])
    assert "far" in runner.same("script.py", PYTHONPATH=path).out


def test_an_empty_python_path_stays_empty(runner):
    runner.write("script.py", FACTS)
    assert runner.same("script.py", PYTHONPATH="").code == 0


@pytest.mark.parametrize("name", ["train", "train.txt"])
def test_a_script_without_py(runner, name):
    runner.write(name, FACTS)
    assert runner.same(name, "x").code == 0


def test_an_executable_script_with_a_python_line(runner):
    path = runner.write("train", "#!/usr/bin/env python3\n" + FACTS)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert runner.same("train", "x").code == 0


def test_a_directory_with_main(runner):
    runner.write("app/__main__.py", FACTS + "import sibling\n")
    runner.write("app/sibling.py", "print('sibling')")
    assert "sibling" in runner.same("app", "x").out


def test_a_module(runner):
    runner.write("package/__init__.py", "")
    runner.write("package/train.py", FACTS)
    seen = runner.same("-m", "package.train", "--only", "nothing", "-m", "-c")
    assert "'--only', 'nothing', '-m', '-c'" in seen.out


def test_a_module_written_together(runner):
    runner.write("train.py", FACTS)
    assert runner.same("-mtrain", "x").code == 0


def test_code(runner):
    assert "--report" in runner.same("-c", FACTS, "--report", "x").out


def test_standard_input_as_the_script(runner):
    assert "'-', 'x'" in runner.same("-", "x", stdin=FACTS).out


def test_words_that_look_like_our_options_belong_to_the_script(runner):
    runner.write("script.py", "import sys; print(sys.argv)")
    words = ["--report", "--only", "sdpa", "--verify=2", "--help", "--", "-m", "-I"]
    assert str(words)[1:-1] in runner.same("script.py", *words).out


def test_an_option_with_an_optional_value_does_not_take_the_script(runner):
    runner.write("script.py", "import sys; print(sys.argv)")
    assert runner.launch("--report", "script.py", "a").out == "['script.py', 'a']\n"
    given, action, rest = read(["--verify", "--report", "script.py", "--strict"])
    assert (given, action, rest) == (
        {"verify": "1", "report": "1"},
        None,
        ["script.py", "--strict"],
    )
    given, _, rest = read(["--verify=7", "--report=x.json", "-m", "module", "--verify"])
    assert (given, rest) == ({"verify": "7", "report": "x.json"}, ["-m", "module", "--verify"])


def test_a_python_command(runner):
    runner.write("script.py", FACTS)
    plain = runner.plain("-B", "-X", "utf8", "script.py", "-I")
    launched = runner.launch("--quiet", sys.executable, "-B", "-X", "utf8", "script.py", "-I")
    assert vars(launched) == vars(plain)


def test_two_dashes_end_our_options(runner):
    runner.write("script.py", "import sys; print(sys.argv)")
    assert (
        runner.launch("--quiet", "--", "script.py", "--", "x").out == "['script.py', '--', 'x']\n"
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('a text')", 1),
        ("import os; os._exit(9)", 9),
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("def broken(:", 1),
        ("import threading; threading.Thread(target=lambda: 1 / 0).start()", 0),
        ("import atexit; atexit.register(lambda: 1 / 0)", 0),
        ("import no_such_module", 1),
        ("import torch_is_not_here", 1),
    ],
)
def test_exit_codes_and_tracebacks(runner, code, expected):
    runner.write("script.py", f"def outer():\n    exec({code!r})\n\nouter()\n")
    assert runner.same("script.py").code == expected
    runner.write("script.py", code)
    assert runner.same("script.py").code == expected


def test_the_traceback_when_the_import_of_torch_fails(runner):
    runner.write("torch/__init__.py", "import torch.missing_part")
    runner.write("script.py", "def f():\n    import torch\nf()\n")
    plain = runner.plain("script.py")
    launched = runner.launch("--quiet", "script.py")
    assert (plain.code, launched.code) == (1, 1)
    assert "missing_part" in plain.err
    # wrapt's loader around torch's own is one frame; nothing of mindiesd is in there.
    frame = r'  File "[^"]*wrapt/importer.py".*\n(    .*\n)+'
    assert re.sub(frame, "", launched.err) == plain.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(runner, number):
    runner.write("script.py", "import time\nprint('up', flush=True)\ntime.sleep(60)\n")

    def ended(command):
        process = subprocess.Popen(
            command,
            cwd=runner.folder,
            env=runner.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "up\n"
        time.sleep(0.5)  # until it sleeps: a KeyboardInterrupt tells where it was
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    plain = ended([sys.executable, "script.py"])
    assert plain[0] == -number
    assert ended([*runner.launcher, "--quiet", "script.py"]) == plain
    assert ("KeyboardInterrupt" in plain[1]) == (number == signal.SIGINT)


def test_a_program_that_is_not_python_dies_of_a_broken_pipe(runner):
    line = 'yes | head -1; echo "${PIPESTATUS[0]}"'
    assert runner.run(["bash", "-c", line]).out == "y\n141\n"
    assert runner.launch("bash", "-c", line).out == "y\n141\n"


def test_the_process_id_is_the_launchers(runner):
    process = subprocess.Popen(
        [*runner.launcher, "--quiet", "-c", "import os; print(os.getpid())"],
        cwd=runner.folder,
        env=runner.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(process.communicate(timeout=60)[0]) == process.pid


def test_standard_input(runner):
    runner.write("script.py", "import sys; print(sys.stdin.read().upper(), input.__name__)")
    assert "HELLO" in runner.same("script.py", stdin="hello\nworld\n").out


def test_an_executable_that_is_not_python(runner):
    path = runner.write("tool", "#!/bin/sh\necho tool $1 $#\n")
    path.chmod(0o755)
    assert runner.launch("./tool", "a b", "c").out == "tool a b 2\n"
    assert runner.launch("tool", "x", "c").out == "tool x 2\n"


def test_a_directory_named_like_a_command_does_not_hide_it(runner):
    (runner.folder / "echo").mkdir()
    assert runner.launch("echo", "x").out == "x\n"


def test_the_launcher_runs_no_code_from_the_current_directory(runner):
    for name in ("click", "rich", "wrapt", "packaging", "signal", "shutil", "json"):
        runner.write(f"{name}.py", "print('this must not run')")
    for command in (runner.launcher, [sys.executable, "-m", "mindiesd.cli"]):
        for options in (["--version"], ["--list"], ["--quiet", "--skip=sdpa", "echo", "done"]):
            done = runner.run([*command, *options])
            assert (done.code, done.err) == (0, "")
            assert "must not run" not in done.out


def test_modules_of_ours_do_not_hide_the_scripts_own(runner):
    names = ("wrapt", "json", "tempfile", "random", "packaging", "dataclasses", "logging")
    for name in names:
        runner.write(f"{name}.py", f"own = {name!r}")
    runner.write("script.py", "".join(f"import {n}; print({n}.own)\n" for n in names))
    assert runner.same("script.py").code == 0


def test_what_python_has_imported_before_the_script(runner):
    code = "import sys; print(sorted(sys.modules))"
    before = set(eval(runner.plain("-c", code).out))
    after = set(eval(runner.launch("--quiet", "-c", code).out))
    assert after - before == {"_mindiesd_start", "atexit"} - before


class TestUsersSitecustomize:
    # The launcher is a Python program too and has run it once, before it became the command.
    GUARD = (
        "import sys\n"
        "if not any(w.endswith(('mindiesd-run', 'mindiesd.cli')) for w in sys.orig_argv): "
    )
    ASK = "import sys; m = sys.modules.get('sitecustomize'); print(m and (m.__file__, m.__spec__))"

    def test_is_run_under_its_own_name(self, runner):
        code = self.GUARD + "print(__name__, __file__, __spec__.name, sys.path)"
        path = runner.write("mine/sitecustomize.py", code)
        seen = runner.same("-c", self.ASK, PYTHONPATH="mine")
        assert seen.out.startswith(f"sitecustomize {path} sitecustomize")

    @pytest.mark.parametrize(
        "error",
        [
            "1 / 0",
            "import no_such_module",
            "raise ImportError('x', name='sitecustomize')",
            "raise SystemExit(4)",
        ],
    )
    def test_fails_as_it_does_without_us(self, runner, error):
        runner.write("mine/sitecustomize.py", self.GUARD + error)
        plain = runner.plain("-c", self.ASK, PYTHONPATH="mine")
        launched = runner.launch("--quiet", "-c", self.ASK, PYTHONPATH="mine")
        assert (launched.code, launched.out) == (plain.code, plain.out)
        if error != "raise SystemExit(4)":  # Python prints a traceback of its start-up then
            assert launched.err == plain.err

    def test_is_a_package(self, runner):
        runner.write(
            "mine/sitecustomize/__init__.py", self.GUARD + "from sitecustomize import part"
        )
        runner.write("mine/sitecustomize/part.py", "print('part')")
        assert "part" in runner.same("-c", self.ASK, PYTHONPATH="mine").out

    def test_comes_after_the_watch_on_imports(self, runner):
        runner.fake_torch()
        code = f"sys.path.insert(0, {str(runner.folder)!r}); import torch"
        runner.write("mine/sitecustomize.py", self.GUARD + code)
        assert "skipped" in runner.launch("-c", "pass", PYTHONPATH="mine").err


class TestAnotherPython:
    @pytest.fixture
    def other(self, runner):
        runner.run([sys.executable, "-m", "venv", "--without-pip", "other"])
        return runner.folder / "other" / "bin" / "python"

    def test_is_left_alone_and_says_so(self, runner, other):
        runner.write("script.py", FACTS + "print('_mindiesd_start' in sys.modules)")
        plain = runner.run([other, "script.py"])
        launched = runner.launch(other, "script.py")
        assert (launched.code, launched.out) == (plain.code, plain.out)
        assert launched.err.count("\n") == 1
        assert "nothing is patched" in launched.err

    def test_is_left_alone_silently_as_a_child(self, runner, other):
        code = f"import subprocess; subprocess.run([{str(other)!r}, '-c', 'print(1)'])"
        assert runner.same("-c", code).out == "1\n"
