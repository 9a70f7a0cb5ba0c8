"""The SiLU of the conditioning, which every block of a model makes anew before it projects it.

    linear(silu(temb))

A step has one ``temb``; a transformer of 60 blocks makes its SiLU 60 to 120 times. It is remembered
while ``temb`` lives and is not written to, see :mod:`mindiesd.patches.memory`, and nobody but the
projection sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mindiesd.patches import law, modulation
from mindiesd.patches.rewriting.records import builder, records
from mindiesd.patches.rewriting.rules import Expression, Rewrite
from mindiesd.patches.scope import Site

OTHER_LAYERS = "not nn.SiLU and nn.Linear, or with hooks"

_HERE = "mindiesd.patches.conditioning:"
_LINEARS = ("linear", "linear_1", "time_emb_proj", "temb_proj", "out_layer", "proj")
_ACTIVATIONS = ("silu", "nonlinearity", "activation", "act")

PROJECTION = Expression(
    name="projection",
    spellings=("LINEAR(SILU(X))",),
    holes=("LINEAR", "SILU", "X"),
    calls=("X",),
    members=("LINEAR", "SILU"),
    named=(("LINEAR", _LINEARS), ("SILU", _ACTIVATIONS)),
    joins=("SILU(X)",),
    build=_HERE + "build_projection",
)
CAST_PROJECTION = Expression(
    name="projection",
    spellings=("LINEAR(SILU(X).to(DTYPE))",),
    holes=("LINEAR", "SILU", "X", "DTYPE"),
    calls=("X",),
    members=("LINEAR", "SILU"),
    named=(("LINEAR", _LINEARS), ("SILU", _ACTIVATIONS)),
    build=_HERE + "build_cast_projection",
)

# Module of diffusers.models.transformers, and class, whose forward has one. Those of functions that
# another family has a record of are in its table.
_TABLE = """
transformer_hunyuan_video HunyuanVideoAdaNorm
transformer_hunyuan_video15 HunyuanVideo15AdaNorm
transformer_hunyuanimage HunyuanImageAdaNorm
transformer_kandinsky Kandinsky5Modulation
transformer_kandinsky6 Kandinsky6Modulation
transformer_kandinsky6_sr Kandinsky6SRModulation
transformer_motif_video MotifVideoAdaNorm
"""
_CAST = """
hunyuan_transformer_2d AdaLayerNormShift
transformer_mochi MochiLayerNormContinuous
"""


def _rules() -> Iterator[Rewrite]:
    for kind, table in ((PROJECTION, _TABLE), (CAST_PROJECTION, _CAST)):
        for line in table.split("\n"):
            if line:
                module, name = line.split()
                yield Rewrite(
                    module=f"diffusers.models.transformers.{module}",
                    qualname=f"{name}.forward",
                    counts={kind: 1},
                )


RECORDS, _BY_NAME = records(
    _rules(),
    family="conditioning",
    becomes="mindiesd.patches.memory.MEMORY.recall",
    why="one SiLU of the conditioning a step instead of one or two a block",
    when="nn.SiLU and nn.Linear without hooks, outside of inference mode; no gradients",
    numerics="bitwise equal",
)
build = builder(_BY_NAME)


def after_uninstall(replacement: object) -> None:
    """Forget, now that nothing asks any more."""
    from mindiesd.patches.memory import MEMORY

    MEMORY.clear()


def build_projection(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``linear(silu(x))``."""
    import torch

    from mindiesd.patches.memory import SILU

    refusal = refusal_of_projection()
    dynamo = torch.compiler.is_dynamo_compiling

    def projection(linear: Any, silu: Any, x: Any) -> Any:
        if site.takes(refusal(linear, silu, x)) and not dynamo():
            return linear(SILU(x))
        return original(linear, silu, x)

    return projection


def build_cast_projection(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``linear(silu(x).to(dtype))``."""
    import torch

    from mindiesd.patches.memory import SILU

    refusal = refusal_of_projection()
    dynamo = torch.compiler.is_dynamo_compiling

    def projection(linear: Any, silu: Any, x: Any, dtype: Any) -> Any:
        reason = refusal(linear, silu, x)
        if reason is None and x.dtype is not dtype:
            reason = law.MIXED_DTYPES
        if site.takes(reason) and not dynamo():
            return linear(SILU(x))
        return original(linear, silu, x, dtype)

    return projection


def refusal_of_projection() -> Callable[[Any, Any, Any], str | None]:
    """Why the SiLU between a tensor and its projection is not remembered; None if it is."""
    from torch.nn import Linear, SiLU

    from mindiesd.patches import tables

    hooked, refusal = modulation._hook_finder(), tables._refusal()

    def refused(linear: Any, silu: Any, x: Any) -> str | None:
        if type(linear) is not Linear or type(silu) is not SiLU or silu.inplace:
            return OTHER_LAYERS
        if hooked(linear) or hooked(silu):
            return OTHER_LAYERS
        return refusal(x)

    return refused
