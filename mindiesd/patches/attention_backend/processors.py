"""diffusers' attention processors and the setters that choose them.

Before there were named backends, a processor object held the whole of an attention layer. Three of
them are led to ``AttnProcessor2_0``, which is the same layer over SDPA: the one for NPUs, which
reads masks the wrong way round, the one for xFormers where that cannot run, and on an NPU the one
that computes attention in slices to save the memory that a fused kernel does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.attention_backend.dispatch import cuda_device
from mindiesd.patches.attention_backend.record import record
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "diffusers.models.attention_processor"
OTHER_LAYER = "scale, norms or mask that the fused processor treats differently"
NO_FUSED_KERNEL = "not on an NPU, or the sdpa patch is not in force"
NOT_FUSED = "no fused kernel of this Ascend takes the heads or the dtype"

# Beyond it kernels become rare, and a composed attention has the score matrix that slicing avoids.
FUSED_HEAD_DIM = 256

_VERSIONS = {"diffusers": ">=0.35,<0.44"}
_BUILD = "mindiesd.patches.attention_backend.processors"
_CALL = ("self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask")
_SETTER = ("self", "use_memory_efficient_attention_xformers", "attention_op")

RECORDS = (
    record(
        "diffusers_npu_processor",
        (MODULE, "AttnProcessorNPU.__call__"),
        f"{_BUILD}:build_npu",
        why=(
            "enable_npu_flash_attention: additive masks are no longer read as bool, float32 masks "
            "no longer inverted, query and key norms no longer left out"
        ),
        when="always; SDPA is called, and falls back where it has to",
        numerics="those of AttnProcessor2_0",
        requires=_VERSIONS,
        parameters=(*_CALL, "temb", "args", "kwargs"),
    ),
    record(
        "diffusers_xformers_processor",
        (MODULE, "XFormersAttnProcessor.__call__"),
        f"{_BUILD}:build_xformers",
        why="a script that sets the xFormers processor runs without xFormers",
        when="xFormers or CUDA is absent; the scores have their usual scale, no query or key norm",
        numerics="those of AttnProcessor2_0",
        requires=_VERSIONS,
        parameters=(*_CALL, "temb", "args", "kwargs"),
    ),
    record(
        "diffusers_sliced_processor",
        (MODULE, "SlicedAttnProcessor.__call__"),
        f"{_BUILD}:build_sliced",
        why=(
            "enable_attention_slicing saves the memory of the score matrix; a fused kernel has "
            "none, so on an NPU it is one launch instead of several for each slice"
        ),
        when=(
            "on an NPU with the sdpa patch in force, no mask, the usual scale, no query or key "
            f"norm, no gradients, heads of at most {FUSED_HEAD_DIM}"
        ),
        numerics="float32 inside and one rounding, where the original rounds scores and softmax",
        requires=_VERSIONS,
        parameters=_CALL,
    ),
    record(
        "diffusers_xformers_setter",
        (MODULE, "Attention.set_use_memory_efficient_attention_xformers"),
        f"{_BUILD}:build_setter",
        why="enable_xformers_memory_efficient_attention works without xFormers: SDPA needs no more",
        when=(
            "xFormers or CUDA is absent; a processor that does not call SDPA is exchanged for the "
            "one that does, any other stays; attention_op names a kernel and is not needed"
        ),
        numerics="those of SDPA",
        requires=_VERSIONS,
        parameters=_SETTER,
    ),
    record(
        "diffusers_xformers_mixin_setter",
        (
            "diffusers.models.attention",
            "AttentionModuleMixin.set_use_memory_efficient_attention_xformers",
        ),
        f"{_BUILD}:build_mixin_setter",
        why="enable_xformers_memory_efficient_attention works without xFormers: SDPA needs no more",
        when="xFormers or CUDA is absent; the layer's backend stays what it was",
        numerics="those of SDPA",
        requires=_VERSIONS,
        parameters=_SETTER,
    ),
)


def _xformers_runs() -> bool:
    from diffusers.utils.import_utils import is_xformers_available

    return bool(cuda_device() and is_xformers_available())


def _same_layer(attn: Any, attention_mask: Any) -> bool:
    """Whether ``AttnProcessor2_0`` computes what the older processors do with this layer.

    Theirs is ``attn.scale``, which is SDPA's default only where ``scale_qk`` is set, and they know
    of no norms.
    """
    return (
        attn.scale_qk
        and getattr(attn, "norm_q", None) is None
        and getattr(attn, "norm_k", None) is None
        and (attention_mask is None or attention_mask.is_floating_point())
    )


def build_npu(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``AttnProcessorNPU.__call__``."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (site.everywhere or site.in_force()) and site.takes(None):
            call: Any = AttnProcessor2_0.__call__
        else:
            call = original
        return call(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )

    return __call__


def build_xformers(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``XFormersAttnProcessor.__call__``."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call: Any = original
        if (site.everywhere or site.in_force()) and not _xformers_runs():
            reason = None if _same_layer(attn, attention_mask) else OTHER_LAYER
            if site.takes(reason):
                call = AttnProcessor2_0.__call__
        return call(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )

    return __call__


def build_sliced(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``SlicedAttnProcessor.__call__``."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0

    from mindiesd.ops.backends.npu import soc
    from mindiesd.patches.engine import ENGINE

    grad_enabled, jit_tracing, _ = law.context()
    sdpa = ENGINE.state("sdpa").site

    def refusal(attn: Any, hidden_states: Tensor, attention_mask: Any) -> str | None:
        if hidden_states.device.type != "npu" or not (sdpa.everywhere or sdpa.in_force()):
            return NO_FUSED_KERNEL
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if attention_mask is not None or attn.spatial_norm is not None:
            return OTHER_LAYER
        if not _same_layer(attn, None):
            return OTHER_LAYER
        series = soc.series()
        if attn.inner_dim // attn.heads > FUSED_HEAD_DIM or not (
            series in (soc.A2, soc.A3, soc.A950)
            or (series == soc.I310P and hidden_states.dtype is torch.float16)
        ):
            return NOT_FUSED
        if grad_enabled():
            # What SDPA is given decides; weights that are trained make it need gradients.
            return law.GRADIENTS
        return None

    def __call__(
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        call: Any = original
        if (site.everywhere or site.in_force()) and site.takes(
            refusal(attn, hidden_states, attention_mask)
        ):
            call = AttnProcessor2_0.__call__
        return call(self, attn, hidden_states, encoder_hidden_states, attention_mask)

    return __call__


def build_setter(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``Attention.set_use_memory_efficient_attention_xformers``."""
    from diffusers.models import attention_processor as known

    # Processors that build a score matrix -> the one of the same layer that calls SDPA.
    fused = {
        known.AttnProcessor: known.AttnProcessor2_0,
        known.SlicedAttnProcessor: known.AttnProcessor2_0,
        known.XFormersAttnProcessor: known.AttnProcessor2_0,
        known.AttnAddedKVProcessor: known.AttnAddedKVProcessor2_0,
        known.SlicedAttnAddedKVProcessor: known.AttnAddedKVProcessor2_0,
    }

    def set_use_memory_efficient_attention_xformers(
        self: Any,
        use_memory_efficient_attention_xformers: bool,
        attention_op: Callable[..., Any] | None = None,
    ) -> None:
        if (
            use_memory_efficient_attention_xformers
            and (site.everywhere or site.token_of(self) is not None)
            and not _xformers_runs()
        ):
            site.takes(None)
            better = fused.get(type(self.processor))
            if better is not None and _same_layer(self, None):
                self.set_processor(better())
            return
        original(self, use_memory_efficient_attention_xformers, attention_op)

    return set_use_memory_efficient_attention_xformers


def build_mixin_setter(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``AttentionModuleMixin.set_use_memory_efficient_attention_xformers``."""

    def set_use_memory_efficient_attention_xformers(
        self: Any,
        use_memory_efficient_attention_xformers: bool,
        attention_op: Callable[..., Any] | None = None,
    ) -> None:
        if (
            use_memory_efficient_attention_xformers
            and (site.everywhere or site.token_of(self) is not None)
            and not _xformers_runs()
        ):
            site.takes(None)
            return
        original(self, use_memory_efficient_attention_xformers, attention_op)

    return set_use_memory_efficient_attention_xformers
