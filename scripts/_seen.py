"""What a model's forward really calls: its attention, RoPE, norm, adaptive norm and activation.

The functions are watched while the unpatched model runs, so nothing depends on knowing the model.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

KINDS = ("attention", "rope", "norm", "adaptive norm", "activation")
"""The five kinds of operation that a model's row has a cell for."""

_ROPE = re.compile(
    r"(apply|rotate|inplace)\w*_?(rot|rope)|rope_apply|rotate_half|_rotate_axis", re.I
)
_ADAPTIVE = re.compile(r"Ada|NormZero|NormContinuous|Modulated|NormSingle", re.I)
_NORM = re.compile(r"(\w*(?:Norm|LayerNorm|RMS_norm)\w*)\.forward$")
_ACTIVATION = re.compile(r"(\w*(?:GELU|GLU|SiLU|Swish|Activation)\w*)\.forward$", re.I)
_ATTENTION = ("get_attention_scores", "flex_attention", "eager_attention_forward")
# norm(x) * (1 + scale) + shift written out in a block's forward.
_INLINED = re.compile(
    r"\* ?\((1|1\.0) \+ |\(scale\.float\(\) \+ 1\.0\)|\+ 1(\.0)?\) ?\* ?self\.norm"
)
_BUILTINS = {
    "scaled_dot_product_attention": "attention",
    "gelu": "activation",
    "silu": "activation",
}


def kind_of(module: str, qualname: str) -> str | None:
    """The kind of operation that a Python function is, by its name; ``None``: none of them."""
    name = qualname.rpartition(".")[2]
    if _ROPE.search(name) and not name.startswith("get_"):
        return "rope"
    if name in _ATTENTION:
        return "attention"
    if _NORM.search(qualname):
        return "adaptive norm" if _ADAPTIVE.search(qualname) else "norm"
    if _ACTIVATION.search(qualname):
        return "activation"
    return None


@cache
def _modulates(code: CodeType) -> bool:
    try:
        return _INLINED.search(inspect.getsource(code)) is not None
    except OSError:  # made by exec: no file to read
        return False


@contextmanager
def watching() -> Iterator[dict[str, set[str]]]:
    """Collect the dotted names of the functions of each kind that are called inside."""
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    known: dict[CodeType, None] = {}

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code in known:
                return
            known[code] = None
            module = frame.f_globals.get("__name__", "")
            if not module.startswith(("diffusers", "transformers", "torch.nn")):
                return
            name = f"{module}.{code.co_qualname}"
            kind = kind_of(module, code.co_qualname)
            if kind is not None:
                seen[kind].add(name)
            elif module.startswith("diffusers.models") and _modulates(code):
                seen["adaptive norm"].add(name)
        elif event == "c_call":
            kind = _BUILTINS.get(getattr(argument, "__name__", ""))
            if kind is not None:
                seen[kind].add(f"torch.nn.functional.{argument.__name__}")

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(before)
