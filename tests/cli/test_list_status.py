"""``--list`` and ``--status``."""

import os
import pty
import sys

from mindiesd.patches.registry import records


def test_list_as_plain_text(runner):
    done = runner.launch("--list")
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii() or "\x1b" not in done.out
    for record in records():
        for text in (record.name, record.target, record.becomes, record.why, record.numerics):
            assert text in done.out


def test_list_imports_no_torch(runner):
    runner.write("early/torch/__init__.py", "raise SystemExit('torch was imported')")
    assert runner.launch("--list", PYTHONPATH="early").code == 0


def test_list_as_a_table_on_a_terminal(runner):
    read, write = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execve(
            runner.launcher[0],
            [*runner.launcher, "--list"],
            {**runner.env, "COLUMNS": "600", "TERM": "xterm"},
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
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "───" in seen.decode()
    assert all(record.target in seen.decode() for record in records())


def lines(done):
    assert (done.code, done.err) == (0, "")
    assert "Traceback" not in done.out
    return {line.split()[0]: line for line in done.out.splitlines() if line and line[0] != " "}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


def distribution(runner, name, version, code):
    runner.write(f"lib/{name}/__init__.py", code)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    runner.write(f"lib/{name}-{version}.dist-info/METADATA", metadata)


def test_status_of_this_installation(runner):
    runner.env = without(runner.env, "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    found = lines(runner.launch("--status"))
    assert sys.version.split()[0] in found["python"]
    assert "absent" in found["CANN"]
    assert {record.name for record in records()} <= set(found)


def test_status_when_torch_npu_cannot_be_loaded(runner):
    distribution(runner, "torch_npu", "9.9", "x = 1\nraise ImportError('libascendcl.so: no')")
    distribution(runner, "torch", "2.13.0", "")
    done = runner.launch("--status", PYTHONPATH="lib", ASCEND_HOME_PATH="/no/such/place")
    found = lines(done)
    assert "9.9" in found["torch_npu"]
    assert "cannot be loaded: ImportError: libascendcl.so: no" in found["NPU"]
    assert "/no/such/place, which does not exist" in found["CANN"]


def test_status_when_torch_npu_loads(runner):
    distribution(runner, "torch_npu", "9.9", "")
    npu = "class npu:\n    device_count = staticmethod(lambda: 8)\n"
    distribution(runner, "torch", "2.13.0", npu)
    assert "sees 8 devices" in lines(runner.launch("--status", PYTHONPATH="lib"))["NPU"]


def test_status_runs_nothing_from_the_current_directory(runner):
    distribution(runner, "torch_npu", "9.9", "raise ImportError('this is the one')")
    distribution(runner, "torch", "2.13.0", "")
    runner.write("torch/__init__.py", "raise SystemExit('the current directory')")
    assert "this is the one" in runner.launch("--status", PYTHONPATH=runner.folder / "lib").out


def test_status_tells_what_each_patch_would_do(runner):
    distribution(runner, "diffusers", "0.1", "")
    distribution(runner, "torch", "2.13.0", "")
    out = runner.launch("--status", PYTHONPATH="lib").out
    assert "would be skipped: diffusers 0.1 is not a tested version" in out
    assert "would be applied" in out
