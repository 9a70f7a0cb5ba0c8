"""Which names the provided modules have; what is not here is an ImportError for the user, too."""

from __future__ import annotations

from typing import Any

from mindiesd.patches.scope import Site

Contents = dict[str, dict[str, Any]]


def flash_attn(site: Site) -> Contents:
    """``flash_attn`` 2: its functions, ``bert_padding`` and ``layers.rotary``."""
    from mindiesd.patches.front_doors import bert_padding, rotary
    from mindiesd.patches.front_doors import flash_attn as ours

    ours.count_at(site)
    functions = _named(
        ours.flash_attn_func,
        ours.flash_attn_kvpacked_func,
        ours.flash_attn_qkvpacked_func,
        ours.flash_attn_varlen_func,
        ours.flash_attn_varlen_kvpacked_func,
        ours.flash_attn_varlen_qkvpacked_func,
        ours.flash_attn_with_kvcache,
    )
    return {
        "flash_attn": {"__version__": ours.VERSION, **functions},
        "flash_attn.flash_attn_interface": functions,
        "flash_attn.bert_padding": _named(
            bert_padding.index_first_axis,
            bert_padding.index_first_axis_residual,
            bert_padding.index_put_first_axis,
            bert_padding.pad_input,
            bert_padding.unpad_input,
            bert_padding.unpad_input_for_concatenated_sequences,
        ),
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {
            **_named(
                rotary.RotaryEmbedding,
                rotary.apply_rotary_emb,
                rotary.apply_rotary_emb_kv_,
                rotary.apply_rotary_emb_qkv_,
                rotary.apply_rotary_emb_torch,
                rotary.rotate_half,
            ),
            "apply_rotary_emb_func": rotary.apply_rotary_emb,
        },
    }


def flash_attn_3(site: Site) -> Contents:
    """``flash_attn_interface``, FlashAttention 3."""
    from mindiesd.patches.front_doors import flash_attn_3 as ours

    ours.count_at(site)
    return {
        "flash_attn_interface": _named(
            ours.flash_attn_func, ours.flash_attn_qkvpacked_func, ours.flash_attn_varlen_func
        )
    }


def xformers(site: Site) -> Contents:
    """``xformers.ops`` with its attention, and ``xformers.ops.fmha.attn_bias``."""
    from mindiesd.patches.front_doors import attn_bias
    from mindiesd.patches.front_doors import xformers as ours

    ours.count_at(site)
    functions = _named(
        ours.memory_efficient_attention,
        ours.memory_efficient_attention_forward,
        ours.memory_efficient_attention_forward_requires_grad,
    )
    # Names of pairs of CUDA kernels, to be given as `op`.
    kernels = {
        f"MemoryEfficientAttention{name}Op": (f"{name}Fw", f"{name}Bw")
        for name in ("Cutlass", "FlashAttention")
    }
    biases: dict[str, Any] = dict(attn_bias.EVERY)
    return {
        "xformers": {"__version__": ours.VERSION},
        "xformers.ops": {
            **functions,
            **kernels,
            "AttentionBias": biases["AttentionBias"],
            "AttentionMask": biases["AttentionBias"],
            "LowerTriangularMask": biases["LowerTriangularMask"],
        },
        "xformers.ops.fmha": {**functions, **kernels, **biases},
        "xformers.ops.fmha.attn_bias": biases,
    }


def sageattention(site: Site) -> Contents:
    """``sageattention`` 1."""
    from mindiesd.patches.front_doors import sageattention as ours

    ours.count_at(site)
    return {"sageattention": _named(ours.sageattn, ours.sageattn_varlen)}


def _named(*values: Any) -> dict[str, Any]:
    return {value.__name__: value for value in values}
