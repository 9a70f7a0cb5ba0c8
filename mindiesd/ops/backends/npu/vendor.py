"""The vendor's operator library, where the user names one.

``MINDIESD_KERNEL_LIBRARY`` is the absolute path of a shared library that registers operators in the
namespace ``mindiesd`` (the published MindIE-SD wheel carries one). It is loaded once, at the first
call on an NPU; without the variable nothing is looked for.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch

from mindiesd.errors import ParametersInvalid

VARIABLE = "MINDIESD_KERNEL_LIBRARY"

_lock = threading.Lock()
_loaded: str | None = None


def load() -> str | None:
    """Load the named library, once; its path, or None if no library is named.

    Raises:
        ParametersInvalid: the path is not absolute, nothing is there, or it cannot be loaded.
    """
    global _loaded
    named = os.environ.get(VARIABLE)
    if not named or named == _loaded:
        return named or None
    shown, path = f"environment variable {VARIABLE}", Path(named)
    allowed = "the absolute path of an existing operator library"
    if not path.is_absolute() or not path.is_file():
        raise ParametersInvalid(shown, named, allowed)
    with _lock:
        if _loaded != named:
            try:
                torch.ops.load_library(named)  # type: ignore[no-untyped-call]
            except (OSError, RuntimeError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ParametersInvalid(shown, f"{named} ({lines[0]})", allowed) from error
            _loaded = named
    return named


def operator(name: str) -> Any | None:
    """The vendor's operator of that name, or None without a library that has it."""
    if torch.compiler.is_compiling():
        # Its fake kernels are not in the library.
        return None
    if load() is None:
        return None
    return getattr(torch.ops.mindiesd, name, None)
