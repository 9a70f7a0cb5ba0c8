"""What pyproject.toml cannot say: a plain C library is part of the package, where it can be built.

It has no Python in it, so one wheel serves every Python of a platform. Without a C compiler the
package is whole, and mindiesd/ops/sparse/threaded.py computes instead.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = ["mindiesd/compiled/rows.c", "mindiesd/compiled/rows.h"]
# The library says what it was made from: one that is left from before is not used.
MADE_FROM = hashlib.sha256(b"".join(Path(name).read_bytes() for name in SOURCES)).hexdigest()


class BuildLibrary(build_ext):
    """Names the library without a Python's tag, and looks for no Python module in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's path in the package."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None beside those that the sources mark."""
        return []


class AnyPython(bdist_wheel):
    """A wheel for the platform, and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """As an ordinary one, but for the Python."""
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "mindiesd.compiled._rows",
            SOURCES[:1],
            depends=SOURCES[1:],
            define_macros=[("MADE_FROM", f'"{MADE_FROM}"')],
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden"],
            optional=True,
        )
    ],
)
