"""Reading and turning: what the replacements of all families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from mindiesd.ops import rope
from mindiesd.ops.marks import PLAIN
from mindiesd.patches import law
from mindiesd.patches.rope import forms
from mindiesd.patches.rope.kept import Kept, Tables

if TYPE_CHECKING:
    from mindiesd.patches.rope.family import Family


class Rotation(NamedTuple):
    """The two steps of a redirected call.

    Attributes:
        read: x, the tables as the model passes them, one more fact -> tables as the kernels take
            them, or why the original is called.
        turn: x and those tables -> the result.
        kept: where tables are remembered.
    """

    read: Callable[..., Tables | str]
    turn: Callable[[Tensor, Tables], Tensor]
    kept: Kept


def rotation(family: Family) -> Rotation:
    """The steps of a family."""
    seen, back = _VIEWS[family.view]
    partial, dims = family.partial, family.dims

    def fits(x: Tensor, tables: Tables) -> bool:
        return (not dims or x.dim() == dims) and forms.fits(seen(x, tables[0]), tables, partial)

    kept = Kept(family.form(forms), fits, family.shared, family.bounded)
    return Rotation(reader(kept), _turner(family.interleaved, partial, seen, back), kept)


def reader(kept: Kept) -> Callable[..., Tables | str]:
    """Tables for a call: what is remembered of them, or what a closer look at the call says."""
    grad_enabled, jit_tracing, _ = law.context()
    find = kept.find

    def read(x: Any, sources: Any, fact: Any = None) -> Tables | str:
        found = None if grad_enabled() else kept.remembered(x, sources, fact)
        return look(x, sources, fact) if found is None else found

    def look(x: Any, sources: Any, fact: Any) -> Tables | str:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(x, Tensor):
            return law.UNUSUAL_ARGUMENT
        for source in sources:
            if not isinstance(source, Tensor):
                return law.UNUSUAL_ARGUMENT
        if has_torch_function_variadic(x, *sources):
            # Also true of plain tensors under a mode, such as torch.set_default_device.
            for tensor in (x, *sources):
                if type(tensor) not in PLAIN:
                    return law.UNUSUAL_ARGUMENT
        if grad_enabled():
            for tensor in (x, *sources):
                if tensor.requires_grad:
                    return law.GRADIENTS
        return find(x, sources, fact)

    return read


def _as_is(x: Tensor, table: Tensor) -> Tensor:
    return x


def _folded(x: Tensor, table: Tensor) -> Tensor:
    """x with its last dimensions cut up as the table's are."""
    return x.reshape(*x.shape[:2], *table.shape[2:])


def _unfolded(out: Tensor, x: Tensor) -> Tensor:
    return out.reshape(x.shape)


def _transposed(x: Tensor, table: Tensor) -> Tensor:
    return x.transpose(-1, -2)


_VIEWS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "": (_as_is, _as_is),
    "folded": (_folded, _unfolded),
    "transposed": (_transposed, _transposed),
}


def _turner(
    interleaved: bool,
    partial: bool,
    seen: Callable[[Tensor, Tensor], Tensor],
    back: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tables], Tensor]:
    def turn(x: Tensor, tables: Tables) -> Tensor:
        return rope.rotate(x, tables[0], tables[1], interleaved)

    def turn_part(x: Tensor, tables: Tables) -> Tensor:
        width = tables[0].shape[-1]
        if width == x.shape[-1]:
            return turn(x, tables)
        return torch.cat((turn(x[..., :width], tables), x[..., width:]), -1)

    def turn_view(x: Tensor, tables: Tables) -> Tensor:
        return back(turn(seen(x, tables[0]), tables), x)

    if seen is not _as_is:
        return turn_view
    return turn_part if partial else turn
