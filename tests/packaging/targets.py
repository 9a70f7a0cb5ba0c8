"""Reads the source of every patched function of diffusers and transformers, importing neither.

    python targets.py SITE-PACKAGES

prints, as JSON, what each source says (its fingerprint), or why it cannot be read. Run by other
versions of Python than the suite's, which have neither torch nor these libraries: the modules are
compiled, not executed.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import CellType, CodeType, FunctionType

SITE = Path(sys.argv[1])
# wrapt and packaging; behind everything of this Python's own.
sys.path.append(str(SITE))

from mindiesd.patches.registry import records  # noqa: E402
from mindiesd.patches.rewriting.pattern import fingerprint  # noqa: E402
from mindiesd.patches.rewriting.source import SourceUnknown, read  # noqa: E402


@functools.cache
def compiled(module: str) -> CodeType:
    """The code of a module's file."""
    path = SITE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)


def function(module: str, attribute: str) -> FunctionType:
    """A function of a module, made of its code alone."""
    code = compiled(module)
    for name in attribute.split("."):
        # Of several definitions the last one counts.
        code = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name][-1]
    cells = tuple(CellType() for _ in code.co_freevars)
    made = FunctionType(code, {"__name__": module}, code.co_name, None, cells)
    made.__qualname__ = attribute
    return made


def main() -> None:
    """Print the fingerprints."""
    found = {}
    for record in records():
        if record.module.partition(".")[0] in ("diffusers", "transformers"):
            try:
                tree = read(function(record.module, record.attribute)).tree
                found[record.name] = fingerprint(tree)
            except SourceUnknown as unknown:
                found[record.name] = f"unknown: {unknown}"
    print(json.dumps(found))


main()
