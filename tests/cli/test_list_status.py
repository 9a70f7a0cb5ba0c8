"""``--list`` and ``--status``."""

import os
import pty
import re
import sys
from collections import Counter

import pytest

from mindiesd.patches.registry import FAMILIES, records


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


def test_a_reader_that_has_seen_enough(runner):
    """As in ``mindiesd-run --list | head -1``."""
    code = "'$@' | head -1".replace("'", '"')
    done = runner.run(["bash", "-c", code, "_", *runner.launcher, "--list"])
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)


def checklist(done, code=0):
    """Item -> (state, text), of a run that ended as it should."""
    assert (done.code, done.err) == (code, ""), done
    assert "Traceback" not in done.out
    items, _, sums = done.out.rpartition("\n\n")
    found = {}
    for line in items.splitlines():
        state, name, text = re.fullmatch(r"(ok|note|FIX) +(\S+(?: \S+)*?)  +(.+)", line).groups()
        assert name not in found
        found[name] = state, text
    states = [state for state, _ in found.values()]
    assert sums == (
        f"{states.count('ok')} ok, {states.count('note')} notes, {states.count('FIX')} to fix\n"
    )
    assert code == ("FIX" in states)
    return found


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


def distribution(runner, name, version, code):
    runner.write(f"lib/{name}/__init__.py", code)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    runner.write(f"lib/{name}-{version}.dist-info/METADATA", metadata)


def test_status_of_this_installation(runner):
    runner.env = without(runner.env, "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    found = checklist(runner.launch("--status"))
    assert sys.version.split()[0] in found["python"][1]
    assert found["CANN"][0] == "note"
    assert "absent" in found["CANN"][1]
    assert set(FAMILIES) <= set(found)
    # The tested versions are installed, so everything fits.
    assert {found[family][0] for family in FAMILIES} == {"ok"}
    numbers = Counter(record.family for record in records())
    assert found["rms_norm"][1] == f"{numbers['rms_norm']} of {numbers['rms_norm']} patches fit"


def test_status_when_torch_npu_cannot_be_loaded(runner):
    distribution(runner, "torch_npu", "2.13.0", "x = 1\nraise ImportError('libascendcl.so: no')")
    distribution(runner, "torch", "2.13.0", "")
    done = runner.launch("--status", PYTHONPATH="lib", ASCEND_HOME_PATH="/no/such/place")
    found = checklist(done, code=1)
    assert found["torch_npu"] == ("ok", "2.13.0")
    assert found["NPU"][0] == found["CANN"][0] == "FIX"
    assert "cannot be loaded: ImportError: libascendcl.so: no" in found["NPU"][1]
    assert "set_env.sh" in found["NPU"][1]
    assert "/no/such/place, which does not exist" in found["CANN"][1]


def test_status_when_torch_npu_is_for_another_torch(runner):
    distribution(runner, "torch_npu", "2.9.0.post1", "raise ImportError('undefined symbol')")
    distribution(runner, "torch", "2.13.0+cpu", "")
    found = checklist(runner.launch("--status", PYTHONPATH="lib"), code=1)
    state, text = found["torch_npu"]
    assert state == "FIX"
    assert "pip install torch_npu==2.13.0" in text


NPU = """
class npu:
    device_count = staticmethod(lambda: {count})
    get_device_name = staticmethod(lambda index: "Ascend910B1")
"""


def test_status_when_torch_npu_loads(runner):
    runner.env = without(runner.env, "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    distribution(runner, "torch_npu", "2.13.0.post2", "")
    distribution(runner, "torch", "2.13.0", NPU.format(count=8))
    found = checklist(runner.launch("--status", PYTHONPATH="lib"))
    assert "sees 8 devices, Ascend910B1" in found["NPU"][1]
    # This torch cannot say which series it is; for the real one see tests/emulator/test_status.py.
    assert found["NPU"][0] == "note"
    assert found["CANN"][0] == "note", "what loads has found its CANN"


def test_status_without_a_device(runner):
    distribution(runner, "torch_npu", "2.13.0", "")
    distribution(runner, "torch", "2.13.0", NPU.format(count=0))
    found = checklist(runner.launch("--status", PYTHONPATH="lib"), code=1)
    assert found["NPU"][0] == "FIX"
    assert "npu-smi" in found["NPU"][1]


@pytest.mark.parametrize("pattern", ["ascend_toolkit_install.info", "arm/ascend_x_install.info"])
def test_status_reads_the_version_of_cann(runner, pattern):
    runner.write(f"cann/{pattern}", "package_name=toolkit\nversion=8.1.RC1\narch=arm\n")
    home = runner.folder / "cann"
    found = checklist(runner.launch("--status", ASCEND_HOME_PATH=str(home)))
    assert found["CANN"] == ("ok", f"8.1.RC1  ASCEND_HOME_PATH={home}")


def test_status_of_the_kernel_library(runner):
    library = runner.write("lib.so", "")
    for path, state in ((str(library), "ok"), ("lib.so", "FIX"), ("/no/lib.so", "FIX")):
        done = runner.launch("--status", MINDIESD_KERNEL_LIBRARY=path)
        found = checklist(done, code=int(state == "FIX"))
        assert found["kernel library"][0] == state
        assert path in found["kernel library"][1]


def test_status_runs_nothing_from_the_current_directory(runner):
    distribution(runner, "torch_npu", "2.13.0", "raise ImportError('this is the one')")
    distribution(runner, "torch", "2.13.0", "")
    runner.write("torch/__init__.py", "raise SystemExit('the current directory')")
    assert "this is the one" in runner.launch("--status", PYTHONPATH=runner.folder / "lib").out


def test_status_tells_which_families_do_not_fit(runner):
    distribution(runner, "diffusers", "0.1", "")
    distribution(runner, "torch", "2.13.0", "")
    found = checklist(runner.launch("--status", PYTHONPATH="lib"), code=1)
    state, text = found["modulation"]
    assert state == "FIX"
    assert "skipped: diffusers 0.1 is not a tested version" in text
    assert "constraints.txt" in text
    assert found["sdpa"] == ("ok", "1 of 1 patches fit")


def test_status_does_not_mind_an_absent_library(runner):
    runner.write("early/sitecustomize.py", ABSENT)
    found = checklist(runner.launch("--status", PYTHONPATH="early"))
    assert found["diffusers"][0] == "note"
    state, text = found["modulation"]
    assert state == "note"
    assert "diffusers is not installed" in text


# A Python that cannot see diffusers, in which the launcher itself runs.
ABSENT = """
import importlib.metadata as metadata

known = metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name == "diffusers":
        raise metadata.PackageNotFoundError(name)
    return known(cls, name)


metadata.Distribution.from_name = classmethod(from_name)

import sys


class Blind:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers":
            raise ModuleNotFoundError(name=name)


sys.meta_path.insert(0, Blind())
"""
