from __future__ import annotations

from collections.abc import Iterator

import pytest

import mindiesd


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Iterator[None]:
    """No test may leave its patches to the next one."""
    yield
    mindiesd.unpatch_all()
