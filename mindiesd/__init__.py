"""An existing PyTorch / diffusers script runs on an Ascend NPU, faster and still right, unedited.

Three doors: :func:`patch_all`, :func:`patch_pipeline` and the ``mindiesd-run`` command. Behind them
stand the documented layer functions (:func:`attention_forward` and its siblings), usable alone.

Importing this package imports neither torch nor torch_npu: a public name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mindiesd.collecting import paused
from mindiesd.errors import ParametersInvalid, PatchError

if TYPE_CHECKING:
    from mindiesd.ops.activation import get_activation_layer
    from mindiesd.ops.ada_norm import layernorm_scale_shift
    from mindiesd.ops.attention import attention_forward
    from mindiesd.ops.norm import RMSNorm, fast_layernorm
    from mindiesd.ops.rope import rotary_position_embedding
    from mindiesd.ops.sparse import sparse_attention
    from mindiesd.ops.varlen import attention_forward_varlen
    from mindiesd.patches import Migration, patch_all, patch_pipeline, unpatch_all
    from mindiesd.patches.report import Report
    from mindiesd.patches.sparse_options import SparseOptions

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "attention_forward": "mindiesd.ops.attention",
    "attention_forward_varlen": "mindiesd.ops.varlen",
    "sparse_attention": "mindiesd.ops.sparse",
    "rotary_position_embedding": "mindiesd.ops.rope",
    "RMSNorm": "mindiesd.ops.norm",
    "fast_layernorm": "mindiesd.ops.norm",
    "layernorm_scale_shift": "mindiesd.ops.ada_norm",
    "get_activation_layer": "mindiesd.ops.activation",
    "patch_all": "mindiesd.patches",
    "unpatch_all": "mindiesd.patches",
    "patch_pipeline": "mindiesd.patches",
    "Migration": "mindiesd.patches",
    "Report": "mindiesd.patches.report",
    "SparseOptions": "mindiesd.patches.sparse_options",
}

__all__ = [
    "Migration",
    "ParametersInvalid",
    "PatchError",
    "RMSNorm",
    "Report",
    "SparseOptions",
    "__version__",
    "attention_forward",
    "attention_forward_varlen",
    "fast_layernorm",
    "get_activation_layer",
    "layernorm_scale_shift",
    "patch_all",
    "patch_pipeline",
    "rotary_position_embedding",
    "sparse_attention",
    "unpatch_all",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with paused():
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
