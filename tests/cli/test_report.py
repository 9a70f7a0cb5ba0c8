"""The report at the end: once, on stderr, whatever the script did."""

import json
import os
import pty
import signal
import subprocess
import time

import pytest

from mindiesd.patches.engine import nothing_to_mend
from mindiesd.patches.registry import records

NOTHING = "mindiesd: torch was never imported, nothing to patch\n"


def test_one_line_when_torch_was_never_imported(runner):
    done = runner.launch("-c", "print('out')")
    assert (done.code, done.out, done.err) == (0, "out\n", NOTHING)


def test_one_line_when_torch_was_imported(runner):
    runner.fake_torch()
    done = runner.launch("-c", "import torch; print('out')")
    assert done.out == "out\n"
    assert done.err.count("\n") == 1
    assert done.err.startswith("mindiesd: 0 patches, 0 calls redirected, 0 fell back")


@pytest.mark.parametrize("option", ["--quiet", "MINDIESD_QUIET"])
def test_quiet(runner, option):
    runner.fake_torch()
    if option.startswith("--"):
        done = runner.launch(option, "-c", "import torch")
    else:
        done = runner.launch("-c", "import torch", **{option: "yes"})
    assert done.err == ""


def test_a_table(runner):
    runner.fake_torch()
    done = runner.launch("--report", "-c", "import torch; print('out')")
    assert done.out == "out\n"
    selected = [
        record
        for record in records()
        if not (record.by_name_only or record.option or nothing_to_mend(record))
    ]
    text = " ".join(done.err.split())
    assert all(f"{record.family} " in text for record in selected if not record.provides)
    assert all(record.name in text for record in selected if record.provides)
    assert done.err.count("mindiesd: 0 patches") == 1


def test_after_an_exception_and_only_then(runner):
    runner.fake_torch()
    done = runner.launch("-c", "import torch; 1 / 0")
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert done.err.splitlines()[-1].startswith("mindiesd: ")
    assert done.err.count("mindiesd: ") == 1


def test_after_an_interrupt(runner):
    code = "import time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [*runner.launcher, "-c", code],
        env=runner.env,
        cwd=runner.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT
    assert err.endswith(NOTHING)


def test_a_file_beside_where_the_launcher_was_started(runner):
    runner.fake_torch()
    runner.write("report.json", "old")
    (runner.folder / "elsewhere").mkdir()
    done = runner.launch(
        "--report=report.json", "-c", "import os, torch; os.chdir('elsewhere'); 1 / 0"
    )
    assert done.err.count("mindiesd: ") == 1
    data = json.loads((runner.folder / "report.json").read_text())
    assert data["torch_imported"] is True
    assert data["processes"] == 1
    assert sorted(path.name for path in runner.folder.iterdir()) == [
        "elsewhere",
        "report.json",
        "torch",
    ]


def test_a_file_without_torch_says_so(runner):
    done = runner.launch("--report=report.json", "-c", "pass")
    assert done.err == NOTHING
    assert json.loads((runner.folder / "report.json").read_text())["torch_imported"] is False


def test_a_file_that_cannot_be_written_in_the_end(runner):
    (runner.folder / "place").mkdir()
    done = runner.launch("--report=place/r.json", "-c", "import os; os.rmdir('place')")
    assert done.code == 0
    assert "cannot write" in done.err
    assert done.err.endswith(NOTHING)


def test_a_script_that_closed_stderr(runner):
    assert runner.launch("-c", "import sys; sys.stderr.close()").code == 0
    assert runner.launch("bash", "-c", "python3 -c 'print(1)' 2>&-").out == "1\n"


def test_a_script_that_redirects_its_stderr_still_gets_its_report_on_the_real_one(runner):
    code = "import sys, io; sys.stderr = io.StringIO()"
    assert runner.launch("-c", code).err == NOTHING


def test_each_python_under_a_shell_reports_for_itself(runner):
    line = "python3 -c 'print(1)'; python3 -c 'print(2)'"
    done = runner.launch("bash", "-c", line)
    assert (done.out, done.err) == ("1\n2\n", NOTHING * 2)


def test_a_launcher_below_the_launcher(runner):
    done = runner.launch(*runner.launcher, "-c", "import os; print(os.environ['PYTHONPATH'])")
    assert ":" not in done.out
    assert done.err == NOTHING


def test_a_script_that_execs_itself(runner):
    runner.write(
        "script.py",
        "import os, sys\n"
        "if len(sys.argv) == 1: os.execv(sys.executable, [sys.executable, 'script.py', 'again'])\n"
        "print(sys.argv)\n",
    )
    done = runner.launch("script.py")
    assert (done.out, done.err) == ("['script.py', 'again']\n", NOTHING)


def test_a_script_that_calls_patch_all_itself_decides(runner):
    runner.fake_torch()
    early = "import mindiesd; mindiesd.patch_all(skip='sdpa'); import torch"
    late = "import torch; import mindiesd; mindiesd.patch_all(skip='sdpa')"
    for code in (early, late):
        runner.launch("--report=r.json", "-c", code)
        assert json.loads((runner.folder / "r.json").read_text())["options"]["skip"] == ["sdpa"]


# Children. The torch here is an empty module: what matters is who reports.


def test_a_child_hands_its_report_to_the_main_process(runner):
    runner.fake_torch()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])"
    done = runner.launch("--report=r.json", "-c", code)
    assert done.err.count("mindiesd: ") == 1
    assert "0 patches" in done.err
    assert json.loads((runner.folder / "r.json").read_text())["processes"] == 1
    assert runner.leftovers() == []


def test_a_plain_fork_does_not_report_again(runner):
    runner.fake_torch()
    code = "import os, torch\nif os.fork() == 0: raise SystemExit\nos.wait()"
    done = runner.launch("-c", code)
    assert done.err.count("mindiesd: ") == 1
    assert done.err.endswith("2 processes\n")


def test_a_fork_without_torch_says_nothing(runner):
    done = runner.launch("-c", "import os\nif os.fork(): os.wait()")
    assert done.err == NOTHING


def test_a_child_that_is_killed_is_missed(runner):
    runner.fake_torch()
    code = """
import os, subprocess, sys
import torch
child = "import torch, os, signal; os.kill(os.getpid(), signal.SIGKILL)"
subprocess.run([sys.executable, "-c", child])
"""
    done = runner.launch("-c", code)
    assert done.code == 0
    assert "1 more handed in no counts" in done.err
    assert runner.leftovers() == []


def test_a_child_that_outlives_the_main_process_leaves_nothing_behind(runner):
    runner.fake_torch()
    child = "import torch, time, os; open('started', 'w'); time.sleep(1.5); os.mkdir('finished')"
    runner.write(
        "script.py",
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL,\n"
        "                 stderr=subprocess.DEVNULL)\n"
        "while not os.path.exists('started'): time.sleep(0.05)\n",
    )
    done = runner.launch("script.py")
    assert "handed in no counts" in done.err
    for _ in range(100):
        if (runner.folder / "finished").exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    assert runner.leftovers() == []


def test_the_folder_of_the_children_is_private(runner):
    runner.fake_torch()
    runner.write(
        "script.py",
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import torch'])\n"
        "(name,) = [n for n in os.listdir(os.environ['TMPDIR']) if 'mindiesd' in n]\n"
        "folder = os.path.join(os.environ['TMPDIR'], name)\n"
        "print(oct(os.stat(folder).st_mode), *[oct(os.stat(os.path.join(folder, f)).st_mode)\n"
        "      for f in os.listdir(folder)])\n",
    )
    assert runner.launch("script.py").out == "0o40700 0o100600\n"


def test_a_folder_that_somebody_else_can_write_is_not_trusted(runner):
    runner.fake_torch()
    runner.write(
        "script.py",
        "import os, subprocess, sys\n"
        "folder = os.environ['_MINDIESD_SESSION'].partition(':')[2]\n"
        "os.mkdir(folder); os.chmod(folder, 0o777); open(folder + '/x.json', 'w').write('{}')\n"
        "subprocess.run([sys.executable, '-c', 'import torch'])\n"
        "print(os.listdir(folder))\n",
    )
    done = runner.launch("script.py")
    assert done.out == "['x.json']\n"
    assert done.err == NOTHING


class TestTroubleOfOurs:
    """Never stops the program, unless --strict asked for it."""

    CODE = "import torch; print('ran')"

    def test_is_one_line(self, runner):
        runner.fake_torch()
        runner.write("broken/wrapt.py", "raise RuntimeError('broken\\nwrapt')")
        done = runner.launch("-c", self.CODE, PYTHONPATH="broken")
        assert (done.code, done.out) == (0, "ran\n")
        assert done.err.count("\n") == 1
        assert "broken wrapt" in done.err

    def test_with_strict_ends_the_program(self, runner):
        runner.fake_torch()
        runner.write("broken/wrapt.py", "raise RuntimeError('broken')")
        code = "print('before')\ntry:\n  import torch\nexcept BaseException: pass\nprint('after')"
        done = runner.launch("--strict", "-c", code, PYTHONPATH="broken")
        assert (done.code, done.out) == (1, "before\n")
        assert done.err.count("\n") == 1
        assert "broken" in done.err

    @pytest.mark.parametrize(("option", "outcome"), [([], "0 5"), (["--strict"], "1 ")])
    def test_at_the_very_start(self, runner, option, outcome):
        runner.write(
            "script.py",
            "import os, subprocess, sys\n"
            "os.environ['_MINDIESD_SESSION'] = 'no number'\n"
            "done = subprocess.run(\n"
            "    [sys.executable, '-c', 'print(5)'], capture_output=True, text=True\n"
            ")\n"
            "print(done.returncode, done.stdout.strip(), done.stderr, end='')\n",
        )
        done = runner.launch("--quiet", *option, "script.py")
        assert done.out.startswith(f"{outcome} mindiesd: could not start")
        assert done.out.count("\n") == 1

    def test_with_a_variable_that_the_script_spoilt(self, runner):
        runner.fake_torch()
        child = "import subprocess, sys, os; os.environ['MINDIESD_NUMERICS'] = 'wild'; "
        child += "subprocess.run([sys.executable, '-c', \"import torch; print('ran')\"])"
        done = runner.launch("-c", child)
        assert done.out == "ran\n"
        assert "MINDIESD_NUMERICS: received 'wild'; allowed: faithful or fast" in done.err


# What the terminal, or what is no terminal, gets.


def test_colours_on_a_terminal_and_only_there(runner):
    runner.fake_torch()
    command = [*runner.launcher, "--report", "-c", "import torch"]

    def on_a_terminal(**env):
        read, write = pty.openpty()
        process = subprocess.Popen(
            command,
            stderr=write,
            stdout=subprocess.DEVNULL,
            cwd=runner.folder,
            env={**runner.env, "TERM": "xterm", **env},
        )
        os.close(write)
        seen = b""
        while True:
            try:
                part = os.read(read, 4096)
            except OSError:
                break
            if not part:
                break
            seen += part
        os.close(read)
        assert process.wait() == 0
        return seen.decode()

    assert "\x1b[" in on_a_terminal()
    assert "\x1b[" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in runner.launch("--report", "-c", "import torch", TERM="xterm").err


def test_signs_that_stderr_has_no_code_for(runner):
    runner.fake_torch()
    done = runner.launch("--report", "-c", "import torch", PYTHONIOENCODING="ascii:strict")
    assert (done.code, done.err.isascii()) == (0, True)
    assert "0 patches" in done.err and "\\u" not in done.err
