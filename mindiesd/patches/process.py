"""The process-wide door: :func:`patch_all` and :func:`unpatch_all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindiesd.patches.engine import ENGINE
from mindiesd.patches.migration import Migration, Options
from mindiesd.patches.sparse import PLANS, Plan

_current: Migration | None = None


def patch_all(
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    numerics: str = "faithful",
    verify: int = 0,
    strict: bool = False,
    *,
    sparse: Any = None,
    device: bool = False,
    sites: bool = False,
) -> Migration:
    """Redirect existing attention, normalisation and rotary calls in the whole process.

    May be called before or after torch, diffusers and transformers are imported; what is not
    imported yet is patched when it is. Calling it again with the same options changes nothing and
    returns the same migration; with other options, the last call decides.

    Args:
        only: names of patches or families to apply, a sequence or a comma-separated text; ``None``
            for all. A patch that is named here and cannot be applied is an error.
        skip: names of patches or families to leave out.
        numerics: ``"faithful"``: never less accurate than the original, against float64;
            ``"fast"``: may round where the original kept float32.
        verify: how many calls of each calling line are run both ways and judged against
            float64; a line that fails goes back to the original and stands in the report.
            0: none.
        strict: raise when any selected patch cannot be applied, and let what a redirect raises
            through. Otherwise the original is called, and the report says why. A function whose
            source must be known is read when it is first called: if it is another, that call raises
            :class:`mindiesd.PatchError`.
        sparse: sparse attention for the long self-attentions of video models, an approximation:
            :class:`mindiesd.SparseOptions`, a mapping of its fields, or a text such as
            ``"rf_v2:0.75"``. ``None``: none.
        device: let ``"cuda"`` mean the NPU where there is one and CUDA is not available, by
            torch_npu's ``transfer_to_npu``. It changes some two hundred attributes of torch and
            has side effects, which ``docs/device.md`` lists. ``unpatch_all`` puts all of them back.
        sites: count calls by calling line as well. Looking the line up costs about a microsecond
            at every call.

    Returns:
        The migration, whose ``report()`` tells what was done.

    Raises:
        ParametersInvalid: an option is not allowed.
        PatchError: a patch that was asked for by name, or any under ``strict``, cannot be applied.
    """
    global _current
    options = Options(only, skip, numerics, verify, strict, sparse, device, sites)
    with ENGINE.lock():
        if _current is not None:
            if _current.options == options:
                return _current
            unpatch_all()
        migration = Migration(options, "process")
        migration.install()
        for patch in options.patches:
            site = ENGINE.state(patch.name).site
            site.count_to(migration.ledger)
            site.verification = migration.verification
            site.strict = options.strict
            site.everywhere = True
        if options.sparse is not None:
            PLANS["process"] = Plan(options.sparse, migration.notes)
        _current = migration
    return migration


def current_migration() -> Migration | None:
    """The migration that :func:`patch_all` put in force; ``None`` where nothing is patched."""
    return _current


def unpatch_all() -> None:
    """Undo :func:`patch_all`: every attribute is again the object it was.

    Pipelines inside a ``patch_pipeline`` block stay patched until their block ends. Without a
    ``patch_all`` before it, nothing happens.
    """
    global _current
    with ENGINE.lock():
        if _current is None:
            return
        PLANS.pop("process", None)
        for patch in _current.options.patches:
            site = ENGINE.state(patch.name).site
            site.everywhere, site.verification, site.strict = False, None, False
        _current.uninstall()
        _current = None
