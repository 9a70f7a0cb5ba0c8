"""The parameters of every provided function, as upstream's sources have them."""

from __future__ import annotations

import inspect
import pickle

import pytest

from mindiesd.patches.front_doors import modules
from mindiesd.patches.scope import Site

_RULES = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# flash-attn 2.8.3
FLASH_ATTN = {
    "flash_attn_func": f"q, k, v, {_RULES}",
    "flash_attn_kvpacked_func": f"q, kv, {_RULES}",
    "flash_attn_qkvpacked_func": f"qkv, {_RULES}",
    "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, {_RULES}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {_LENGTHS}, {_RULES}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_RULES}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
_MEA = "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"
_FA3 = (
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False"
)
_DESCALE = "q_descale=None, k_descale=None, v_descale=None"
SIGNATURES = {
    ("flash_attn", "flash_attn"): FLASH_ATTN,
    ("flash_attn", "flash_attn.flash_attn_interface"): FLASH_ATTN,
    ("flash_attn", "flash_attn.bert_padding"): {
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
        "pad_input": "hidden_states, indices, batch, seqlen",
        "index_first_axis": "input, indices",
        "index_first_axis_residual": "input, indices",
        "index_put_first_axis": "values, indices, first_axis_dim",
    },
    ("flash_attn", "flash_attn.layers.rotary"): {
        "rotate_half": "x, interleaved=False",
        "apply_rotary_emb_torch": "x, cos, sin, interleaved=False",
        "apply_rotary_emb": (
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
            "max_seqlen=None"
        ),
        "apply_rotary_emb_qkv_": (
            "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
            "num_heads_q=None"
        ),
        "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
        "RotaryEmbedding": "dim, base=10000.0, interleaved=False, scale_base=None, device=None",
    },
    ("flash_attn_3", "flash_attn_interface"): {
        "flash_attn_func": (
            f"q, k, v, softmax_scale=None, causal=False, qv=None, {_DESCALE}, {_FA3}"
        ),
        "flash_attn_varlen_func": (
            f"q, k, v, {_LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None, "
            f"causal=False, qv=None, {_DESCALE}, {_FA3}"
        ),
    },
    # xformers 0.0.35
    ("xformers", "xformers.ops"): {
        "memory_efficient_attention": _MEA,
        "memory_efficient_attention_forward": _MEA,
        "memory_efficient_attention_forward_requires_grad": _MEA,
    },
    # sageattention 1.0.6
    ("sageattention", "sageattention"): {
        "sageattn": (
            "q, k, v, tensor_layout='HND', is_causal=False, sm_scale=None, smooth_k=True, **kwargs"
        ),
        "sageattn_varlen": (
            f"q, k, v, {_LENGTHS}, is_causal=False, sm_scale=None, smooth_k=True, **kwargs"
        ),
    },
}


@pytest.mark.parametrize(
    ("door", "module", "name"),
    [(*key, name) for key, names in SIGNATURES.items() for name in names],
)
def test_signature(door, module, name) -> None:
    value = getattr(modules, door)(Site(door))[module][name]
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert shown == f"({SIGNATURES[door, module][name]})"
    assert pickle.loads(pickle.dumps(value)) is value
