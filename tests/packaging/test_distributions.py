"""The wheel and the source distribution: built, looked into, installed, tried."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mindiesd

ROOT = Path(__file__).resolve().parents[2]
# What a build reads.
SOURCES = (
    "mindiesd",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "MANIFEST.in",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    "docs",
    "tests",
    "examples",
    "scripts",
)
VERSION = mindiesd.__version__
# What a run of the suite leaves in the folders that are copied.
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc", "*.so")
LIBRARY = "mindiesd/compiled/_rows.so"

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **more) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        **more,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(folder: Path, kind: str, into: Path) -> Path:
    """Build by the hook that pip and build call; no network is needed for it."""
    into.mkdir()
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(into)!r}))"
    return into / run(sys.executable, "-c", code, cwd=folder).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: building leaves folders beside them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LEFTOVERS)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return build(checkout, "sdist", tmp_path_factory.mktemp("built") / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, so that nothing can be missing in that."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / f"mindiesd-{VERSION}", "wheel", folder / "wheel")


def package() -> set[str]:
    """The files of the package, as they stand here, without what is compiled."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mindiesd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert re.fullmatch(rf"mindiesd-{re.escape(VERSION)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"mindiesd-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == {*package(), LIBRARY}
    assert {name.removeprefix(info) for name in names if name.startswith(info)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    assert {
        "mindiesd/py.typed",
        "mindiesd/compiled/rows.c",
        "mindiesd/compiled/rows.h",
        "mindiesd/emulator/cann.c",
        "mindiesd/patches/report.schema.json",
        "mindiesd/bootstrap/path/sitecustomize.py",
        "mindiesd/bootstrap/path/_mindiesd_start.py",
    } <= names


def test_the_source_distribution(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert package() <= names
    assert LIBRARY not in names
    others = {name for name in files if not name.startswith(("mindiesd/", "mindiesd.egg-info/"))}
    assert others == {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
    }


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"mindiesd-{VERSION}.dist-info/METADATA").decode()
    found = metadata.PathDistribution(zipfile.Path(wheel, f"mindiesd-{VERSION}.dist-info/"))
    fields = found.metadata
    assert fields["Version"] == VERSION
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert "Not the vendor's package" in text
    classifiers = fields.get_all("Classifier")
    for minor in (10, 11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert {"torch", "npu", "diffusers", "emulator", "dev", "docs"} <= set(
        fields.get_all("Provides-Extra")
    )


def interpreter(minor: int) -> str:
    """A Python 3.``minor`` of this machine, also one of pyenv's that is not on the path."""
    if sys.version_info[:2] == (3, minor):
        return sys.executable
    candidates = [shutil.which(f"python3.{minor}")]
    candidates += map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    for path in filter(None, candidates):
        # A shim of pyenv exists for versions that are not chosen, and fails.
        code = "import sys, venv; print(sys.version_info[1])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == str(minor):
            return path
    pytest.skip(f"there is no Python 3.{minor} here")


def declared(wheel: Path, minor: int) -> list[str]:
    """The distributions that an installation without extras brings to a Python 3.``minor``."""
    found = metadata.PathDistribution(zipfile.Path(wheel, f"mindiesd-{VERSION}.dist-info/"))
    where = {"extra": "", "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    names: list[str] = []
    waiting = list(found.requires or ())
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.marker and not wanted.marker.evaluate(where):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name not in names:
            names.append(name)
            waiting += metadata.distribution(name).requires or ()
    return names


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_installed_alone_it_starts(wheel, tmp_path, minor):
    """In a fresh environment that holds what the wheel declares, and neither torch nor pip.

    The packages it needs are copied from here: nothing else can be imported, and no network is
    needed. (wrapt's compiled part is for one Python; without it wrapt uses its Python part.)
    """
    run(interpreter(minor), "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=tmp_path).strip())
    names = declared(wheel, minor)
    assert {"wrapt", "click", "rich", "packaging"} <= set(names)
    assert "torch" not in names
    for name in names:
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(distribution.locate_file(file), target)
    command = python.with_name("mindiesd-run")
    clean = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    assert run(command, "--version", cwd=tmp_path, env=clean) == f"mindiesd {VERSION}\n"
    assert "scaled_dot_product_attention" in run(command, "--list", cwd=tmp_path, env=clean)
    code = "import mindiesd, sys; assert 'torch' not in sys.modules; print(mindiesd.__file__)"
    assert str(site) in run(python, "-I", "-c", code, cwd=tmp_path, env=clean)
    code = "from mindiesd.compiled.library import FOLDER; print((FOLDER / '_rows.so').exists())"
    assert run(python, "-I", "-c", code, cwd=tmp_path, env=clean) == "True\n"
    # The launcher's start-up code is found in the installed package, and says what is missing.
    shown = run(command, "-c", "print('ran')", cwd=tmp_path, env=clean)
    assert "ran" in shown
    assert "torch was never imported" in shown
    done = subprocess.run([command, "--status"], cwd=tmp_path, env=clean, capture_output=True)
    assert done.returncode == 1, "torch is missing"
    assert b"FIX   torch " in done.stdout


def test_without_a_compiler_the_package_is_whole(checkout, tmp_path):
    """Only the library is missing, and it says so."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("build", "*.so"))
    environ = {**os.environ, "CC": str(tmp_path / "no-such-compiler")}
    code = "from setuptools import build_meta as b; print(b.build_wheel('built'))"
    said = run(sys.executable, "-c", code, cwd=folder, env=environ)
    assert 'building extension "mindiesd.compiled._rows" failed' in said
    wheel = folder / "built" / said.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert LIBRARY not in names
    assert package() <= names
    code = "from mindiesd.compiled.library import Library; Library()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "site",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert "LibraryUnavailable: not compiled: no C compiler" in done.stderr


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_sources_are_python_of_every_supported_version(minor):
    for path in (ROOT / "mindiesd").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, minor))


def test_extras_that_the_documentation_names_exist(wheel):
    found = metadata.PathDistribution(zipfile.Path(wheel, f"mindiesd-{VERSION}.dist-info/"))
    known = set(found.metadata.get_all("Provides-Extra"))
    named = set()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for extras in re.findall(r"'\.\[([\w,]+)\]'", path.read_text(encoding="utf-8")):
            named |= set(extras.split(","))
    assert {"npu", "diffusers", "emulator", "dev"} <= named <= known
