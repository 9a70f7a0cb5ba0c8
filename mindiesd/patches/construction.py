"""Constructors of diffusers that raise wherever torch_npu is installed.

Two blocks choose an attention processor for the NPU when they are made, and announce first that
this will end in diffusers 0.34. The announcement is an error from that version on, so that the
model cannot be made at all:

    if is_torch_npu_available():
        deprecate("npu_processor", "0.34.0", …)    # ValueError
        processor = FluxAttnProcessor2_0_NPU()
    else:
        processor = FluxAttnProcessor()

The constructors are rewritten from their own source (:mod:`mindiesd.patches.rewriting`) so that the
question is answered with no, and they take the ordinary processor: what diffusers 0.41 does, which
asks no more. A model that is made before the patches are installed still fails.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from mindiesd.patches.registry import NOT_COMPARED, Patch
from mindiesd.patches.rewriting.records import builder
from mindiesd.patches.rewriting.rules import Expression, Rewrite
from mindiesd.patches.scope import Site

NO_TORCH_NPU = "torch_npu is not installed: the ordinary processor is taken anyway"

ASKS_FOR_NPU = Expression(
    name="takes_npu_processor",
    spellings=("is_torch_npu_available()",),
    holes=(),
    build="mindiesd.patches.construction:build_answer",
)

# Module under diffusers.models.transformers, class, and the versions whose constructor raises, as
# read from every release of 0.35 to 0.42.
_TABLE = (
    ("transformer_chroma", "ChromaSingleTransformerBlock", ">=0.35,<0.41"),
    ("transformer_flux", "FluxSingleTransformerBlock", ">=0.35,<0.36"),
)

_BY_NAME = {
    f"make_{name}": Rewrite(
        module=f"diffusers.models.transformers.{module}",
        qualname=f"{name}.__init__",
        counts={ASKS_FOR_NPU: 1},
    )
    for module, name, _ in _TABLE
}

RECORDS = tuple(
    Patch(
        name=f"make_{name}",
        family="construction",
        module=_BY_NAME[f"make_{name}"].module,
        attribute=f"{name}.__init__",
        after=_BY_NAME[f"make_{name}"].module,
        becomes="the processor that diffusers takes without torch_npu",
        build="mindiesd.patches.construction:build",
        reference=NOT_COMPARED,
        why="the model cannot be made where torch_npu is installed: an expired deprecation raises",
        when="models that are made while the patches are in force everywhere",
        numerics="the same formulas in the processor that later versions take",
        requires=MappingProxyType({"diffusers": versions}),
        mends=MappingProxyType({"diffusers": versions}),
        # The whole source is compared, the signature with it.
        parameters=(),
    )
    for module, name, versions in _TABLE
)
build = builder(_BY_NAME)


def build_answer(original: Any, site: Site) -> Callable[[], bool]:
    """The replacement of ``is_torch_npu_available()`` in a constructor: no, and counted."""

    def takes_npu_processor() -> bool:
        site.takes(None if original() else NO_TORCH_NPU)
        return False

    return takes_npu_processor
