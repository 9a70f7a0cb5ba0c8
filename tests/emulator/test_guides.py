"""The guides that need an NPU, tried literally on the emulated one."""

from __future__ import annotations

import pytest

from tests.docs.pages import GUIDES, read
from tests.docs.test_guides import EMULATED, play


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in GUIDES if p.name in EMULATED], ids=lambda p: p.stem)
def test_guide(path, tmp_path):
    play(read(path), tmp_path)


def test_all_of_them_are_there():
    assert {path.name for path in GUIDES} >= EMULATED
