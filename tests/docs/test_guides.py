"""The guides, tried literally; and of every page, that what it names exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import click
import pytest

import mindiesd
from mindiesd.bootstrap.settings import Settings
from mindiesd.cli.options import _command
from tests.docs.pages import GUIDES, ROOT, Page, read

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# These need torch_npu: tests/emulator/test_guides.py plays them.
EMULATED = {"rehearse.md"}
# More than a few seconds: several processes that import diffusers.
SLOW = {"migrate.md", "several_devices.md", "add_a_patch.md"}

OPTIONS = {
    word for option in _command.params if isinstance(option, click.Option) for word in option.opts
}
VARIABLES = {f"MINDIESD_{name.upper()}" for name in Settings._fields} | {
    "MINDIESD_KERNEL_LIBRARY",
    "MINDIESD_EMULATOR_SOC",
    "MINDIESD_TEST_WITHOUT_NPU",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def play(page: Page, folder: Path) -> str:
    """Run a page in a folder, as a reader would; what it printed."""
    path, home = page.path, ROOT
    if page.in_clone:
        home = folder
        for part in ("mindiesd", "tests", "scripts", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
    else:
        (folder / "examples").symlink_to(ROOT / "examples")
    blocks = [
        block._asdict()
        for block in page.blocks
        if block.language in ("python", "bash") and not block.excuse
    ]
    assert blocks, f"{name(path)} has nothing to run"
    plan = folder / "page.json"
    plan.write_text(json.dumps({"path": name(path), "blocks": blocks}))
    dropped = ("MINDIESD_", "_MINDIESD_", "COV_", "PYTEST_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    env |= {
        "PATH": os.path.dirname(sys.executable) + os.pathsep + env["PATH"],
        "PYTHONPATH": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("play.py")), str(plan)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.name in SLOW))
        for path in GUIDES
        if path.name not in EMULATED
    ],
)
def test_guide(path, tmp_path):
    page = read(path)
    shown = play(page, tmp_path)
    # Every block that is not excused was reached.
    blocks = [b for b in page.blocks if b.language in ("python", "bash") and not b.excuse]
    assert shown.count(f"-- {name(path)}:") == len(blocks)


def test_a_block_that_fails_is_told_with_its_line(tmp_path):
    text = "# P\n\n```python\nx = 1\n```\n\n```bash\ntrue\n```\n\n```python\n\nassert x == 2\n```\n"
    for number, (old, new, message) in enumerate(
        (
            ("", "", r'guides/not there.md", line 13'),
            ("true", "false", r"not there.md:8: bash ended with 1"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "page.md").write_text(text.replace(old, new) if old else text)
        page = read(folder / "page.md")._replace(path=ROOT / "docs" / "guides" / "not there.md")
        with pytest.raises(AssertionError, match=message):
            play(page, folder)


def test_every_guide_has_a_place():
    index = (ROOT / "docs" / "index.md").read_text()
    site = (ROOT / "mkdocs.yml").read_text()
    for path in GUIDES:
        assert f"(guides/{path.name})" in index
        assert f"guides/{path.name}\n" in site


@pytest.mark.parametrize("path", [pytest.param(path, id=name(path)) for path in PAGES])
def test_what_a_page_names_exists(path):
    page = read(path)
    for block in page.blocks:
        where = f"{name(path)}:{block.line}"
        if block.language == "python":
            tree = ast.parse(block.code)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mindiesd"):
                    for alias in node.names:
                        assert exists(f"{node.module}.{alias.name}"), f"{where}: {alias.name}"
                elif isinstance(node, ast.Attribute):
                    dotted = ast.unparse(node)
                    if re.fullmatch(r"mindiesd(\.\w+)+", dotted):
                        assert exists(dotted), f"{where}: {dotted}"
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name.startswith("mindiesd"):
                            assert exists(alias.name), f"{where}: {alias.name}"
        elif block.language == "bash":
            done = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True)
            assert done.returncode == 0, f"{where}: {done.stderr}"
            for line in block.code.replace("\\\n", " ").splitlines():
                check_options(line, where)
        else:
            assert block.language in ("", "text", "toml", "yaml", "json"), f"{where}: language"
    for text in page.code:
        check_options(text, name(path))
        for variable in re.findall(r"\bMINDIESD_[A-Z_]*[A-Z]\b", text):
            assert variable in VARIABLES, f"{name(path)}: {variable}"
        dotted = re.fullmatch(r"(mindiesd(?:\.\w+)+)(\(.*\))?", text)
        if dotted:
            assert exists(dotted[1]), f"{name(path)}: {text}"


def check_options(line: str, where: str) -> None:
    """The options behind ``mindiesd-run`` in a command line; those of its command are not ours."""
    for command in re.split(r"[|;&]+", line):
        match = re.search(r"(?:mindiesd-run|-m mindiesd\.cli)((?:\s.*)?)$", command)
        if match is None:
            continue
        try:
            words = shlex.split(match[1], comments=True)
        except ValueError:
            words = match[1].split()
        for word in words:
            if not word.startswith("--"):
                break
            option = word.partition("=")[0].rstrip(",.")
            assert option in OPTIONS or option.endswith("…"), f"{where}: {word}"


def exists(dotted: str) -> bool:
    """Whether a dotted name can be imported, as a module or as an attribute of one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        head = ".".join(parts[:cut])
        try:
            found = util.find_spec(head) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            continue
        value = import_module(head)
        for part in parts[cut:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", [pytest.param(path, id=name(path)) for path in PAGES])
def test_links_lead_somewhere(path):
    for link in read(path).links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{name(path)}: {link}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(path)}: {link}"


def anchors(path: Path) -> set[str]:
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            plain = re.sub(r"[^\w\s-]", "", line.lstrip("# ").lower())
            found.add(re.sub(r"\s+", "-", plain.strip()))
    return found


def test_the_checks_of_names_can_fail():
    assert not exists("mindiesd.patch_everything")
    assert exists("mindiesd.ops.backends.npu.explain")
    with pytest.raises(AssertionError, match="--everything"):
        check_options("mindiesd-run --everything script.py", "here")
    check_options("mindiesd-run --report script.py --steps 2", "here")
    assert all(exists(f"mindiesd.{word}") for word in mindiesd.__all__)
