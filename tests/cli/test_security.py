"""Nothing runs that the user did not ask for; see also test_transparent and emulator/test_start."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest

import mindiesd
from mindiesd.bootstrap import attach

PACKAGE = Path(mindiesd.__file__).parent


def sources():
    return [(path, ast.parse(path.read_text("utf-8"))) for path in PACKAGE.rglob("*.py")]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_pickle_is_loaded():
    """Neither by name nor through torch or numpy, nor is any text of a file evaluated."""
    unpicklers = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path, tree in sources():
        names = {name.partition(".")[0] for name in imports(tree)} | set(imports(tree))
        assert not names & unpicklers, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "numpy.load", "eval"), (path, called)
                assert not called.endswith((".loads", "safe_load")) or called == "json.loads"


def test_exec_and_shells_are_used_in_few_places():
    """Compiled are the library's own functions and templates of wrappers; nobody starts a shell."""
    users = {"exec": set(), "compile": set(), "shell": set()}
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("exec", "compile"):
                users[called].add(path.relative_to(PACKAGE).as_posix())
            if called in ("os.system", "os.popen") or any(
                word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords
            ):
                users["shell"].add(path.relative_to(PACKAGE).as_posix())
    own = {f"patches/{name}.py" for name in ("source", "rewriting/source", "wrapper")}
    assert users["shell"] == set()
    assert users["exec"] <= own
    assert users["compile"] <= own


def test_what_is_on_the_path_hides_nothing():
    """Not even where sitecustomize, which takes the directory off again, does not run."""
    names = {path.stem for path in (PACKAGE / "bootstrap" / "path").glob("*.py")}
    assert names == {"__init__", "sitecustomize", "_mindiesd_start"}


def test_a_child_that_runs_no_sitecustomize_finds_the_users_modules(runner):
    for name in ("attach", "settings", "path", "ops", "cli"):
        runner.write(f"lib/{name}.py", f"print({name!r}, __file__)")
    imported = "import attach, settings, path, ops, cli"
    child = [sys.executable, "-S", "-c", imported]
    runner.write("script.py", f"import subprocess; subprocess.run({child!r})\n")
    assert runner.same("script.py", PYTHONPATH=str(runner.folder / "lib")).out.count("lib/") == 5


def test_the_path_is_the_same_after_torch_was_imported(runner):
    runner.fake_torch()
    runner.write("script.py", "import sys, torch\nprint(sys.path, sys.path_hooks)\n")
    assert runner.same("script.py").code == 0


def test_nothing_runs_from_the_current_directory_when_the_report_is_made(runner):
    """A script elsewhere is run from a directory with modules of any name in it."""
    for name in (
        "rich",
        "click",
        "json",
        "shutil",
        "platform",
        "_mindiesd_start",
        "wrapt",
        "attach",
    ):
        runner.write(f"here/{name}.py", "print('this must not run')")
    runner.write("there/torch/__init__.py", "")
    runner.write("there/script.py", "import torch")
    done = runner.launch(
        "--report", str(runner.folder / "there" / "script.py"), cwd=runner.folder / "here"
    )
    assert (done.code, done.out) == (0, "")
    assert "must not run" not in done.err and "0 patches" in done.err


@pytest.mark.parametrize("name", ["EMULATE", "COMPARE", "SITES", "DEVICE", "SPARSE", "VERIFY"])
def test_every_variable_is_read_strictly(runner, name):
    runner.write("s.py", "print('must not run')")
    assert f"MINDIESD_{name}: received" in runner.refused("s.py", **{f"MINDIESD_{name}": "maybe"})


def test_variables_of_the_kernels_are_read_strictly(monkeypatch):
    from mindiesd.ops import dispatch

    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "../lib.so")
    with pytest.raises(mindiesd.ParametersInvalid, match="MINDIE_SD_FA_TYPE"):
        dispatch.requested("manual")


def test_a_report_is_replaced_at_once_and_through_no_link(tmp_path, monkeypatch):
    victim, report = tmp_path / "victim", tmp_path / "r.json"
    victim.write_text("untouched")
    report.write_text("{}")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    planted = tmp_path / f"r.json.{os.getpid()}-{bytes(4).hex()}.part"
    planted.symlink_to(victim)
    with pytest.raises(OSError, match="exists"):
        attach._write(str(report), "new")
    assert victim.read_text() == "untouched" and report.read_text() == "{}"
    attach._write(str(report), json.dumps({"a": 1}))  # the link is gone: it was ours to remove
    assert json.loads(report.read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "victim"]


def test_counts_of_children_are_read_from_a_folder_of_our_own_only(tmp_path):
    folder = tmp_path / "session"
    folder.mkdir(mode=0o755)
    (folder / "1-0.json").write_text("{}")
    assert attach.collect(str(folder)) == ([], 0)
    assert (folder / "1-0.json").exists()
    link = tmp_path / "link"
    folder.chmod(0o700)
    link.symlink_to(folder)
    assert attach.collect(str(link)) == ([], 0)
    assert (folder / "1-0.json").exists()
    assert attach.collect(str(folder)) == ([], 1)
