"""Real processes: the same command with and without the launcher."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

_SCRIPT = Path(sys.executable).with_name("mindiesd-run")
LAUNCHER = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "mindiesd.cli"]


class Runner:
    """Runs commands in a directory of their own, with an environment free of our variables."""

    def __init__(self, folder: Path, temp: Path) -> None:
        self.folder = folder
        self.launcher = LAUNCHER
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.lstrip("_").startswith(("MINDIESD_", "PYTHONPATH", "COV_"))
        }
        # A fork of a process that has used OpenMP threads hangs at its first parallel region.
        self.env["OMP_NUM_THREADS"] = "1"
        self.env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + self.env["PATH"]
        self.temp = temp
        self.env["TMPDIR"] = str(self.temp)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, command, *, stdin="", timeout=120, cwd=None, **env):
        done = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd or self.folder,
            env={**self.env, **env},
            timeout=timeout,
        )
        out, err = (re.sub("0x[0-9a-f]{6,}", "0x", text) for text in (done.stdout, done.stderr))
        return SimpleNamespace(code=done.returncode, out=out, err=err)

    def leftovers(self) -> list[Path]:
        """What the launcher left in the directory for temporary files. Torch leaves things too."""
        return list(self.temp.glob("*mindiesd*"))

    def plain(self, *arguments, **kwargs):
        return self.run([sys.executable, *arguments], **kwargs)

    def launch(self, *arguments, **kwargs):
        return self.run([*self.launcher, *arguments], **kwargs)

    def same(self, *arguments, **kwargs):
        """Run both ways, require that nothing differs, and return what was seen."""
        plain = self.plain(*arguments, **kwargs)
        launched = self.launch("--quiet", *arguments, **kwargs)
        assert vars(launched) == vars(plain)
        return plain

    def refused(self, *arguments, **kwargs):
        """Run something that must be refused in one line; return the line."""
        done = self.launch(*arguments, **kwargs)
        assert done.code == 2, done
        assert done.out == ""
        assert done.err.startswith("mindiesd-run: ")
        assert done.err.count("\n") == 1, done.err
        assert done.err.endswith("\n")
        return done.err

    def fake_torch(self) -> None:
        """A torch beside the script that imports at once: enough where nothing is computed."""
        self.write("torch/__init__.py", "")


@pytest.fixture
def runner(tmp_path):
    # A short path: multiprocessing puts sockets there, whose names may not be long.
    with tempfile.TemporaryDirectory(prefix="t") as temp:
        yield Runner(tmp_path, Path(temp))


def pytest_collection_modifyitems(config, items):
    if "bench" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("bench"):
            item.add_marker(pytest.mark.skip(reason="a measurement: run with -m bench"))
