"""One way of rotating, as data: what the functions of a model family have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from mindiesd.patches import law
from mindiesd.patches.scope import Site


@dataclass(frozen=True, kw_only=True)
class Family:
    """A convention, and the builder of its replacements: ``family(original, site)``.

    Attributes:
        call: the function of :mod:`.templates` that has the parameters of the originals.
        form: given :mod:`.forms`, which of its functions reads the tables.
        interleaved: whether neighbouring channels are pairs, not channels of the two halves.
        partial: whether tables may be narrower than x, whose last channels then stay.
        bounded: whether tables may be scaled, and are looked at before an Ascend kernel gets them.
        view: how x is seen while it is rotated: ``""`` as it is; ``"folded"``, with its last
            dimensions cut up as the tables' are; ``"transposed"``, with the last two exchanged.
        dims: how many dimensions x must have; 0 for any number.
        sources: how many tensors the table argument holds; 1 is a tensor, 2 a pair.
    """

    call: str
    form: Callable[[Any], Any]
    interleaved: bool
    partial: bool = False
    bounded: bool = False
    view: str = ""
    dims: int = 4
    sources: int = 1

    def __call__(self, original: Any, site: Site) -> Callable[..., Any]:
        """The replacement of one function."""
        from mindiesd.patches.rope import templates
        from mindiesd.patches.rope.rotation import rotation

        if not isinstance(original, FunctionType):
            raise law.SignatureChanged(f"is a {type(original).__name__}, not a plain function")
        build: Callable[..., Callable[..., Any]] = getattr(templates, self.call)
        return build(self, original, site, rotation(self))
