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

_LIBRARIES = ("diffusers", "transformers")
_ROPE = re.compile(
    r"(apply|rotate|inplace)\w*_?(rot|rope)|rope_apply|rotate_half|_rotate_axis", re.I
)
# Make or arrange angles, and rotate nothing.
_TABLES = re.compile(r"^get_|_mrope$")
_ADAPTIVE = re.compile(r"Ada|NormZero|NormContinuous|Modulated|NormSingle", re.I)
_NORM = re.compile(r"(\w*(?:Norm|LayerNorm|RMS_norm)\w*)\.forward$")
_ACTIVATION = re.compile(r"(\w*(?:GELU|GLU|SiLU|Swish|Activation)\w*)\.forward$", re.I)
_ATTENTION = ("get_attention_scores", "flex_attention", "eager_attention_forward")
# norm(x) * (1 + scale) + shift written out in a block's forward.
_INLINED = re.compile(
    r"\* ?\((1|1\.0) \+ |\(scale\.float\(\) \+ 1\.0\)|\+ 1(\.0)?\) ?\* ?self\.norm"
)
# softmax(q @ k) @ v written out in a function.
_PRODUCT = re.compile(r"matmul\(|bmm\(|einsum\(| @ ")
_BUILTINS = {
    "scaled_dot_product_attention": "attention",
    "gelu": "activation",
    "silu": "activation",
}


def kind_of(module: str, qualname: str) -> str | None:
    """The kind of operation that a Python function is, by its name; ``None``: none of them."""
    name = qualname.rpartition(".")[2]
    if name.startswith("<") or qualname.startswith("_WeightNorm."):
        return None  # part of the function around it; of a weight, not of what is computed
    if _ROPE.search(name) and not _TABLES.search(name):
        return "rope"
    if name in _ATTENTION:
        return "attention"
    if _NORM.search(qualname):
        return "adaptive norm" if _ADAPTIVE.search(qualname) else "norm"
    if _ACTIVATION.search(qualname):
        return "activation"
    return None


@cache
def _written_out(module: str, code: CodeType) -> str | None:
    """The kind of operation that a function of no telling name has in its source."""
    try:
        text = inspect.getsource(code)
    except OSError:  # made by exec: no file to read
        return None
    if "softmax(" in text and len(_PRODUCT.findall(text)) > 1:
        return "attention"
    if module.startswith("diffusers.models") and _INLINED.search(text):
        return "adaptive norm"
    return None


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
            if not module.startswith((*_LIBRARIES, "torch.nn")):
                return
            name = f"{module}.{code.co_qualname}"
            kind = kind_of(module, code.co_qualname)
            if kind is None and module.startswith(_LIBRARIES) and code.co_name[0] != "<":
                kind = _written_out(module, code)
            if kind is not None:
                seen[kind].add(name)
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
