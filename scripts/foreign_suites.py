"""Runs the tests of other packages with plain Python and under mindiesd-run, and compares.

    .venv/bin/python scripts/foreign_suites.py [--only NAME ...] [--page docs/foreign_suites.md]

Each suite comes from its package's source distribution, in the version that is installed here. It
is run twice, with `python -m pytest` and with `mindiesd-run -m pytest`, all patches in force, and
each test must pass, fail or be skipped as it does without. A test that differs is run plainly once
more: one that differs from itself says nothing. The status is 1 if any other test differs.

Needs pip's package index. Tests that want a model from a hub fail, both times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds for one test


@dataclass(frozen=True)
class Suite:
    """The tests of one package.

    Attributes:
        distribution: the package, as pip calls it.
        tests: files below its source distribution, and options of pytest.
        version: where it is not installed here, which one is taken.
        packages: what the tests need besides, with versions; installed into a folder of their own.
        plugin: a plugin of pytest that they need here.
    """

    distribution: str
    tests: tuple[str, ...]
    version: str = ""
    packages: tuple[str, ...] = ()
    plugin: str = ""


# The wheels of torchvision want CUDA. Their operators, which timm does not call, must at least have
# names where torch has none.
_DECLARED = """\
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
"""
_PARAMETERIZED = "parameterized==0.9.0"

SUITES = {
    "timm": Suite(
        "timm",
        (
            "tests/test_layers.py",
            "tests/test_layers_drop.py",
            "tests/test_layers_pool.py",
            "tests/test_layers_pos_embed.py",
            "tests/test_models.py",
            "-k",
            "not test_models or test_vit or vit_tiny or eva02_tiny or deit_tiny or swin_tiny",
        ),
        version="1.0.31",
        packages=("timm==1.0.31", "torchvision==0.28.0"),
        plugin=_DECLARED,
    ),
    "accelerate": Suite(
        "accelerate",
        (
            "tests/test_hooks.py",
            "tests/test_modeling_utils.py",
            "tests/test_big_modeling.py",
            "tests/test_offload.py",
            "tests/test_accelerator.py",
            "tests/test_utils.py",
            "tests/test_kwargs_handlers.py",
            "tests/test_optimizer.py",
            "tests/test_cpu.py",
            "tests/test_grad_sync.py",
        ),
        packages=(_PARAMETERIZED,),
    ),
    "peft": Suite(
        "peft",
        ("tests/test_custom_models.py", "tests/test_vision_models.py", "tests/test_mixed.py"),
        packages=(_PARAMETERIZED, "scipy==1.17.1"),
    ),
}


@dataclass(frozen=True)
class Compared:
    """What came out for one suite.

    Attributes:
        package: name and version.
        before: outcome by test with plain Python.
        after: the same under the launcher.
        again: of the tests that differ, what plain Python gives the second time.
        report: the launcher's report.
        seconds: wall time of both runs.
    """

    package: str
    before: dict[str, str]
    after: dict[str, str]
    again: dict[str, str]
    report: dict[str, Any]
    seconds: tuple[float, float]

    @property
    def differing(self) -> list[str]:
        """Tests that we change."""
        return [test for test in self.again if test not in self.unsteady]

    @property
    def unsteady(self) -> list[str]:
        """Tests whose outcome differs from run to run without us."""
        return [test for test in self.again if self.again[test] != self.before.get(test)]


def package(suite: Suite) -> str:
    """The package with the version that is tested."""
    try:
        return f"{suite.distribution}=={metadata.version(suite.distribution)}"
    except metadata.PackageNotFoundError:
        return f"{suite.distribution}=={suite.version}"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)


def sources(suite: Suite, folder: Path) -> Path:
    """The unpacked source distribution."""
    pip("download", "--no-binary", suite.distribution, "--dest", folder, package(suite))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


class Runner:
    """Runs one suite's tests, in its own folder."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._results = folder / "results.xml"
        packages = folder / "packages"
        if suite.packages and not packages.exists():
            pip("install", "--target", packages, *suite.packages)
        self._where = sources(suite, folder)
        self._options = []
        if suite.plugin:
            (packages / "declared_here.py").write_text(suite.plugin)
            self._options = ["-p", "declared_here"]
        self._variables = {
            name: value
            for name, value in os.environ.items()
            if not name.lstrip("_").startswith("MINDIESD_")
        } | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}",
        }

    def run(self, command: list[str], tests: tuple[str, ...]) -> tuple[dict[str, str], float]:
        """Outcome by test, and the wall time."""
        options = [*self._options, "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore"]
        # Without what their own settings add, such as the measuring of coverage.
        options += [f"--timeout={TIMEOUT}", "-o", "junit_family=xunit1", "-o", "addopts="]
        self._results.unlink(missing_ok=True)
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "-m", "pytest", *options, f"--junitxml={self._results}", *tests],
            cwd=self._where,
            env=self._variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - start
        if not self._results.exists():
            raise SystemExit(f"{' '.join(command)}: no results\n{done.stdout[-4000:]}")
        return outcomes(self._results), seconds


def outcomes(results: Path) -> dict[str, str]:
    """By test, whether it passed; of those that did not, what was raised."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        outcome = "passed"
        for kind in ("skipped", "failure", "error"):
            element = case.find(kind)
            if element is not None:
                # The type of the error: its text has addresses and times.
                text = (element.get("message") or "").partition("\n")[0].partition(":")[0]
                outcome = kind if kind == "skipped" else f"{kind}: {text}"
        found[f"{case.get('file')}::{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def compare(suite: Suite, folder: Path) -> Compared:
    runner = Runner(suite, folder)
    plain = [sys.executable]
    launcher = [sys.executable, "-m", "mindiesd.cli", "--quiet", f"--report={folder}/report.json"]
    before, first = runner.run(plain, suite.tests)
    after, second = runner.run(launcher, suite.tests)
    differ = [test for test in {**before, **after} if before.get(test) != after.get(test)]
    again = {}
    if differ:
        files = sorted({test.partition("::")[0] for test in differ})
        rest = suite.tests[suite.tests.index("-k") :] if "-k" in suite.tests else ()
        repeated, _ = runner.run(plain, (*files, *rest))
        again = {test: repeated.get(test, "missing") for test in differ}
    report = json.loads((folder / "report.json").read_text())
    return Compared(package(suite), before, after, again, report, (first, second))


def row(name: str, found: Compared) -> str:
    counted = Counter(outcome.partition(":")[0] for outcome in found.after.values())
    summary = found.report["summary"]
    cells = [
        f"{found.package.replace('==', ' ')}",
        len(found.after),
        counted["passed"],
        counted["failure"] + counted["error"],
        counted["skipped"],
        len(found.differing),
        len(found.unsteady),
        summary["redirected"],
        summary["fell_back"],
        f"{found.seconds[0]:.0f} → {found.seconds[1]:.0f} s",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(found: dict[str, Compared]) -> str:
    """The page of docs/."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers"))
    lines = [
        "# Suites of other packages",
        "",
        "Each package's own tests, run with `python -m pytest` and with `mindiesd-run -m pytest`,",
        "all patches in force. *Differing* tests have another outcome under the launcher: passed,",
        "skipped, or which error. *Unsteady* tests differ without it as well, from run to run.",
        "Failures are those that there are without us: most want a model from a hub. Made by",
        "`python scripts/foreign_suites.py --page docs/foreign_suites.md` on "
        f"{datetime.date.today()} ({platform.machine()}, Python {platform.python_version()},",
        f"{versions}). PyTorch's own operator database is run both ways by the tests of this",
        "project (`tests/others/test_foreign.py`).",
        "",
        "| package | tests | passed | failed | skipped | differing | unsteady | calls redirected "
        "| calls fallen back | wall time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(name, one) for name, one in found.items()),
        "",
    ]
    for name, one in found.items():
        tests = " ".join(SUITES[name].tests)
        lines += [f"`{one.package}`: `pytest {tests}`", ""]
        for title, those in (("Differing", one.differing), ("Unsteady", one.unsteady)):
            lines += [
                f"- {title}: `{test}`: {one.before.get(test)}, {one.after.get(test)}, "
                f"{one.again[test]}"
                for test in those
            ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--page", type=Path, help="where the page is written")
    parser.add_argument("--folder", type=Path, help="where it is done; a temporary one otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        found = {name: compare(SUITES[name], (folder / name).resolve()) for name in given.only}
    text = page(found)
    print(text)
    if given.page is not None:
        given.page.write_text(text)
    return 1 if any(one.differing for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
