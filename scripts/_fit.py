"""Which patch records are not in force with the installed versions, and why."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ABSENT = "its module is not in these versions"


def misfits() -> dict[str, str]:
    """By the name of a record, why it redirects nothing here.

    Every module that a record names is imported. Functions that are rewritten at their first call
    are rewritten now, so that a source that is not the known one shows.
    """
    import mindiesd
    from mindiesd.patches.registry import records

    selected = [record for record in records() if not (record.by_name_only or record.option)]
    found: dict[str, str] = {}
    for record in selected:
        for module in dict.fromkeys([record.after, record.module]):
            try:
                importlib.import_module(module)
            except ImportError:
                # Packages that are not installed are provided instead.
                if not record.provides:
                    found[record.name] = ABSENT
                break
    for record in selected:
        if record.name not in found:
            reason = _unknown_source(record)
            if reason:
                found[record.name] = reason
    report = mindiesd.patch_all().report()
    mindiesd.unpatch_all()
    in_force = {patch.name for patch in report.patches}
    for patch in report.patches:
        if patch.status in ("skipped", "pending"):
            found.setdefault(patch.name, patch.reason)
    return {name: reason for name, reason in sorted(found.items()) if name in in_force}


def _unknown_source(record: object) -> str:
    """Why a rewritten function is not what its rule was written for; empty otherwise."""
    import wrapt

    from mindiesd.patches.engine import unavailable
    from mindiesd.patches.registry import Patch
    from mindiesd.patches.rewriting.rewrite import rewrite
    from mindiesd.patches.rewriting.source import SourceUnknown
    from mindiesd.patches.scope import Site

    assert isinstance(record, Patch)
    family = importlib.import_module(record.build.partition(":")[0])
    rule = getattr(family, "_BY_NAME", {}).get(record.name)
    if rule is None or unavailable(record):
        return ""
    with contextlib.suppress(ImportError, AttributeError):  # which the engine says itself
        function = wrapt.resolve_path(record.module, record.attribute)[2]
        site = Site(record.name)
        site.arm()
        try:
            rewrite(function, rule.counts, site)
        except SourceUnknown as unknown:
            return f"not rewritten: {unknown}"
    return ""
