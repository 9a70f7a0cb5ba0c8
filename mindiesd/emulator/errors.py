"""Errors of the emulated device."""

from __future__ import annotations


class EmulatorUnavailable(RuntimeError):
    """The emulated device cannot be had in this process; the message says why, in one line."""
