"""diffusers' shared helper ``apply_rotary_emb``.

A dozen transformer modules import it by name, so its other holders are rebound as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

TABLE_SHAPE = "table is not [S, D] of this input"
LAYOUT = "not a 4-D input with even head_dim, or an unknown sequence_dim or unbind dim"

RECORDS = (
    Patch(
        name="diffusers_rope",
        family="rope",
        module="diffusers.models.embeddings",
        attribute="apply_rotary_emb",
        after="diffusers.models.embeddings",
        becomes="mindiesd.rotary_position_embedding",
        build="mindiesd.patches.rope.shared:build",
        why="one npu_rotary_mul kernel instead of reshape, unbind, stack, casts, mul, mul, add",
        when=(
            "real cos and sin tables of shape [S, D], within [-1, 1] on the NPU, or a complex "
            "table [B, S, D/2]; no gradients"
        ),
        numerics="float32 inside and one rounding, as the original",
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=("x", "freqs_cis", "use_real", "use_real_unbind_dim", "sequence_dim"),
    ),
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``diffusers.models.embeddings.apply_rotary_emb``."""
    from mindiesd.ops import rope
    from mindiesd.patches.rope import forms
    from mindiesd.patches.rope.kept import Kept, Sources, Tables
    from mindiesd.patches.rope.rotation import reader

    def decide_real(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
        unbind, sequence_dim = fact
        size = x.shape
        if sequence_dim not in (1, 2) or unbind not in (-1, -2):
            return LAYOUT
        # CogView4's packed training passes three dimensions and gets four back.
        packed = len(size) == 3 and sequence_dim == 2 and unbind == -2
        if (len(size) != 4 and not packed) or size[-1] % 2:
            return LAYOUT
        length = size[sequence_dim - packed]
        cos, sin = sources
        if cos.shape != sin.shape or cos.shape not in ((length, size[-1]), (1, size[-1])):
            return TABLE_SHAPE
        if cos.shape[0] != length:
            # No kernel repeats a table along the sequence.
            cos, sin = (t.expand(length, -1).contiguous() for t in (cos, sin))
        return (_in_head_first if sequence_dim == 2 else _in_sequence_first)(x, (cos, sin), None)

    def decide_complex(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
        size, table = x.shape, sources[0].shape
        if len(size) != 4 or size[3] % 2:
            return LAYOUT
        if len(table) != 3 or table[0] not in (1, size[0]):
            return TABLE_SHAPE
        if table[1:] != (size[1], size[3] // 2):
            return TABLE_SHAPE
        return _of_complex(x, sources, None)

    _in_head_first = forms.full(0, 0, moves=True)
    _in_sequence_first = forms.full(0, 2, moves=True)
    _of_complex = forms.complex_numbers(2)
    read_real = reader(Kept(decide_real, bounded=True).find)
    read_complex = reader(Kept(decide_complex, bounded=True).find)

    def apply_rotary_emb(
        x: Tensor,
        freqs_cis: Any,
        use_real: bool = True,
        use_real_unbind_dim: int = -1,
        sequence_dim: int = 2,
    ) -> Any:
        if site.everywhere or site.in_force():
            found: Any
            if not use_real:
                found = read_complex(x, (freqs_cis,))
            elif (
                type(freqs_cis) not in (tuple, list)
                or len(freqs_cis) != 2
                or type(use_real_unbind_dim) is not int
                or type(sequence_dim) is not int
            ):
                found = law.UNUSUAL_ARGUMENT
            else:
                found = read_real(x, freqs_cis, (use_real_unbind_dim, sequence_dim))
            if site.takes(found if isinstance(found, str) else None):
                cos, sin = found
                interleaved = not use_real or use_real_unbind_dim == -1
                if cos.dim() > x.dim():
                    return rope.rotate(x[None], cos, sin, interleaved)
                return rope.rotate(x, cos, sin, interleaved)
        return original(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)

    return apply_rotary_emb
