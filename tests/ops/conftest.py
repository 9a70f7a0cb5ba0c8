"""Puts the oracles, one folder up, on the path, however pytest was started."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# No deadline: the first call of a kernel is slow on a busy machine, and that says nothing.
settings.register_profile(
    "ops", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ops")
