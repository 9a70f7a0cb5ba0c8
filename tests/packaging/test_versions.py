"""Other versions of Python than the suite's recognise the same sources.

Most patches compare the source of what they redirect with what is loaded, by compiling it anew.
Code objects differ from version to version; what the sources say must not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tests.packaging.test_distributions import ROOT, interpreter

pytestmark = pytest.mark.slow
SITE = Path(diffusers.__file__).parent.parent


def read(python: str) -> dict[str, str]:
    done = subprocess.run(
        [python, str(Path(__file__).with_name("targets.py")), str(SITE)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return read(sys.executable)


def test_every_source_is_read_here(here):
    assert len(here) > 300
    assert [name for name, text in here.items() if text.startswith("unknown")] == []


@pytest.mark.parametrize("minor", [10, 12, 13])
def test_other_versions_read_the_same(here, minor):
    assert read(interpreter(minor)) == here
