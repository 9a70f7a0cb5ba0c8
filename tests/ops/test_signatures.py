"""The public signatures, compared with the specification written out."""

import inspect

import pytest

import mindiesd

NONE = inspect.Parameter.empty

SPECIFIED = {
    "attention_forward": [
        ("query", NONE),
        ("key", NONE),
        ("value", NONE),
        ("attn_mask", None),
        ("scale", None),
        ("fused", True),
        ("head_first", False),
        ("**kwargs", NONE),
    ],
    "attention_forward_varlen": [
        ("q", NONE),
        ("k", NONE),
        ("v", NONE),
        ("cu_seqlens_q", NONE),
        ("cu_seqlens_k", NONE),
        ("max_seqlen_q", None),
        ("max_seqlen_k", None),
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", None),
        ("softcap", None),
        ("alibi_slopes", None),
        ("deterministic", None),
        ("return_attn_probs", None),
        ("block_table", None),
    ],
    "sparse_attention": [
        ("q", NONE),
        ("k", NONE),
        ("v", NONE),
        ("attn_mask", None),
        ("scale", None),
        ("is_causal", False),
        ("head_num", 1),
        ("input_layout", "BNSD"),
        ("inner_precise", 0),
        ("sparse_type", None),
        ("txt_len", 0),
        ("block_size", 128),
        ("latent_shape_q", None),
        ("latent_shape_k", None),
        ("keep_sink", True),
        ("keep_recent", True),
        ("cdf_threshold", 1.0),
        ("sparsity", 0.0),
        ("**kwargs", NONE),
    ],
    "rotary_position_embedding": [
        ("x", NONE),
        ("cos", NONE),
        ("sin", NONE),
        ("rotated_mode", "rotated_half"),
        ("head_first", False),
        ("fused", True),
    ],
    "RMSNorm": [("hidden_size", NONE), ("eps", 1e-6)],
    "fast_layernorm": [("norm", NONE), ("x", NONE), ("impl_mode", 0), ("fused", True)],
    "layernorm_scale_shift": [
        ("layernorm", NONE),
        ("x", NONE),
        ("scale", NONE),
        ("shift", NONE),
        ("fused", True),
    ],
    "get_activation_layer": [("act_type", NONE)],
}


def written(function):
    mark = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    parameters = inspect.signature(function).parameters.values()
    return [(mark.get(p.kind, "") + p.name, p.default) for p in parameters]


@pytest.mark.parametrize("name", SPECIFIED)
def test_signature(name):
    found = written(getattr(mindiesd, name))
    assert found == SPECIFIED[name]
    assert [type(default) for _, default in found] == [type(d) for _, d in SPECIFIED[name]]


def test_rms_norm_forward():
    assert written(mindiesd.RMSNorm.forward) == [
        ("self", NONE),
        ("hidden_states", NONE),
        ("if_fused", True),
    ]
