"""The options of ``mindiesd-run`` as values, and as the environment variables children inherit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from mindiesd.errors import ParametersInvalid

PREFIX = "MINDIESD_"

_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")


class Settings(NamedTuple):
    """Each option of the command line; the names in capitals after ``MINDIESD_`` are variables.

    Attributes:
        only: names of patches or families to apply; ``None`` for all.
        skip: names of patches or families to leave out; ``None`` for none.
        numerics: ``"faithful"`` or ``"fast"``.
        verify: how many calls of each patch are checked against the original.
        strict: whether trouble with a patch ends the program.
        report: ``""`` for one line at the end, ``"1"`` for a table, or the path of a JSON file.
        quiet: whether the report is not printed.
        emulate: whether processes get an emulated NPU.
        compare: whether the command is run without the patches too, and the two are compared.
        device: whether ``"cuda"`` means the NPU where there is one and CUDA is not.
        sparse: sparse attention, as ``strategy:sparsity``; ``""`` for none.
        sites: whether calls are counted by calling line.
    """

    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] | None = None
    numerics: str = "faithful"
    verify: int = 0
    strict: bool = False
    report: str = ""
    quiet: bool = False
    emulate: bool = False
    compare: bool = False
    device: bool = True
    sparse: str = ""
    sites: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str], given: Mapping[str, str] | None = None) -> Settings:
        """Read the variables, and above them what was given on the command line.

        Args:
            environ: the environment. A variable that is empty counts as not set.
            given: option name -> its text.

        Raises:
            ParametersInvalid: a text is not allowed; it names the variable or option.
        """
        values: dict[str, Any] = {}
        for name in cls._fields:
            variable = PREFIX + name.upper()
            if given and name in given:
                values[name] = _parse(name, f"--{name}", given[name])
            elif environ.get(variable):
                values[name] = _parse(name, variable, environ[variable])
        return cls(**values)

    def variables(self) -> dict[str, str]:
        """The variables that say the same; what has its default value is left out."""
        texts = {
            "only": ",".join(self.only or ()),
            "skip": ",".join(self.skip or ()),
            "numerics": "" if self.numerics == "faithful" else self.numerics,
            "verify": str(self.verify or ""),
            "strict": "1" if self.strict else "",
            "report": self.report,
            "quiet": "1" if self.quiet else "",
            "emulate": "1" if self.emulate else "",
            "compare": "1" if self.compare else "",
            "device": "" if self.device else "0",
            "sparse": self.sparse,
            "sites": "1" if self.sites else "",
        }
        return {PREFIX + name.upper(): text for name, text in texts.items() if text}

    def for_patch_all(self) -> dict[str, Any]:
        """The keyword arguments of :func:`mindiesd.patch_all`."""
        return {
            "only": self.only,
            "skip": self.skip,
            "numerics": self.numerics,
            "verify": self.verify,
            "strict": self.strict,
            "sparse": self.sparse or None,
            "device": self.device,
            "sites": self.sites,
        }


def _parse(name: str, label: str, text: str) -> Any:
    if name in ("only", "skip"):
        words = tuple(part.strip() for part in text.split(",") if part.strip())
        if not words:
            raise ParametersInvalid(label, repr(text), "names with commas between them")
        return words
    if name == "numerics":
        if text not in ("faithful", "fast"):
            raise ParametersInvalid(label, repr(text), "faithful or fast")
        return text
    if name == "verify":
        if not (text.isascii() and text.isdigit()):
            raise ParametersInvalid(label, repr(text), "a whole number, 0 or more")
        return int(text)
    if name == "sparse":
        return text
    if name == "report":
        if text.lower() in _NO:
            return ""
        if text.lower() in _YES:
            return "1"
        if not text.endswith(".json"):
            raise ParametersInvalid(label, repr(text), "a path that ends in .json")
        # The program may change its directory.
        return os.path.abspath(text)
    if text.lower() not in (*_YES, *_NO):
        raise ParametersInvalid(label, repr(text), "1 or 0")
    return text.lower() in _YES
