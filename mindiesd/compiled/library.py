"""The library compiled from rows.c and rows.h when the package was installed."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class LibraryUnavailable(Exception):
    """There is no library for this machine; the text says why."""


class Library:
    """The library, known to be made from the sources beside it and for this processor.

    Attributes:
        instructions: the instruction set it will use, ``"avx2"`` or ``"avx512"``.

    Raises:
        LibraryUnavailable: it is not there, or not to be used.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        """Load it from the folder that also holds its sources."""
        path = folder / "_rows.so"
        if not path.exists():
            raise LibraryUnavailable("not compiled: no C compiler worked when it was installed")
        try:
            self._loaded = ctypes.CDLL(str(path))
            made_from = _text(self._loaded.mindiesd_made_from)
            found = _text(self._loaded.mindiesd_instructions)
            sources = b"".join((folder / name).read_bytes() for name in ("rows.c", "rows.h"))
        except (OSError, AttributeError) as error:
            raise LibraryUnavailable(f"{path} cannot be used: {error}") from None
        if made_from != hashlib.sha256(sources).hexdigest():
            raise LibraryUnavailable(f"{path} was made from other sources: install mindiesd anew")
        if not found:
            raise LibraryUnavailable("the processor has no AVX2")
        self.instructions = found

    def function(self, name: str) -> Any:
        """A function of rows.h, for the best instruction set."""
        return self._loaded[f"mindiesd_{name}_{self.instructions}"]


def _text(function: Any) -> str:
    function.restype = ctypes.c_char_p
    said = function()
    return said.decode() if said else ""
