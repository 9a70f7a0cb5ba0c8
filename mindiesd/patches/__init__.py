"""Redirects of existing calls into :mod:`mindiesd.ops`, and the doors that switch them on."""

from mindiesd.patches.migration import Migration
from mindiesd.patches.pipeline import patch_pipeline
from mindiesd.patches.process import patch_all, unpatch_all

__all__ = ["Migration", "patch_all", "patch_pipeline", "unpatch_all"]
