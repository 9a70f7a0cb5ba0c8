"""Hypothesis settings for the op tests."""

from hypothesis import HealthCheck, settings

# No deadline: the first call of a kernel is slow on a busy machine, and that says nothing.
settings.register_profile(
    "ops", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ops")
