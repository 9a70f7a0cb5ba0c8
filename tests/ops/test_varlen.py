"""attention_forward_varlen against the oracle, a sequence at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd import ParametersInvalid, attention_forward, attention_forward_varlen
from mindiesd.ops.backends import native
from tests import oracles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def starts(lengths):
    return [0, *itertools.accumulate(lengths)]


FORMS = {
    "list": list,
    "tuple": tuple,
    "int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "int64": lambda values: torch.tensor(values, dtype=torch.int64),
    "scalars": lambda values: [torch.tensor(value, dtype=torch.int32) for value in values],
}


@st.composite
def packs(draw):
    batch = draw(st.integers(1, 4))
    equal = draw(st.booleans())
    if equal:
        lengths_q = [draw(st.integers(0, 6))] * batch
        lengths_k = [draw(st.integers(0, 6))] * batch
    else:
        lengths_q = [draw(st.integers(0, 6)) for _ in range(batch)]
        lengths_k = [draw(st.integers(0, 6)) for _ in range(batch)]
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    dim, value_dim = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 6]))

    def tensor(total, heads, dim):
        wide = torch.randn(heads, total, 2 * dim, generator=generator).to(dtype)
        if draw(st.booleans()):
            return wide[..., ::2].transpose(0, 1)
        return wide[..., :dim].transpose(0, 1).contiguous()

    q = tensor(sum(lengths_q), kv_heads * groups, dim)
    k = tensor(sum(lengths_k), kv_heads, dim)
    v = tensor(sum(lengths_k), kv_heads, value_dim)
    slopes = draw(st.sampled_from([None, "heads", "batch"]))
    if slopes is not None:
        shape = (q.shape[1],) if slopes == "heads" else (batch, q.shape[1])
        slopes = torch.rand(shape, generator=generator)
    return q, k, v, lengths_q, lengths_k, slopes


@given(
    packs(),
    st.booleans(),
    st.sampled_from([None, (-1, -1), (1, 0), (2, 2), (0, 3), [-1, 1], (3, -1)]),
    st.sampled_from([None, 0.0, 2.0]),
    st.sampled_from([None, 0.7]),
    st.sampled_from(list(FORMS)),
)
def test_against_the_oracle(pack, causal, window, softcap, scale, form):
    q, k, v, lengths_q, lengths_k, slopes = pack

    def keep_of(queries, keys):
        keep = oracles.window(queries, keys, *(window or (-1, -1)))
        return keep & oracles.bottom_right(queries, keys) if causal else keep

    oracle = oracles.attention_varlen(
        q, k, v, lengths_q, lengths_k, keep_of, scale, softcap or 0.0, slopes
    )
    out = attention_forward_varlen(
        q,
        k,
        v,
        FORMS[form](starts(lengths_q)),
        FORMS[form](starts(lengths_k)),
        max(lengths_q),
        max(lengths_k) + 3,
        0.0,
        scale,
        causal,
        window,
        softcap,
        slopes,
        deterministic=False,
        return_attn_probs=False,
    )
    assert out.dtype is q.dtype
    assert out.is_contiguous()
    oracles.assert_close(out, oracle)


def test_equal_lengths_are_one_kernel_call(monkeypatch):
    calls = []
    kernel = native.attention

    def counting(*arguments):
        calls.append(arguments[3])
        return kernel(*arguments)

    monkeypatch.setattr(native, "attention", counting)
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    out = attention_forward_varlen(q, k, v, [0, 4, 8, 12], [0, 4, 8, 12], causal=True)
    assert len(calls) == 1
    dense = [t.view(3, 4, 2, 8) for t in (q, k, v)]
    assert torch.equal(out, attention_forward(*dense, is_causal=True).view(12, 2, 8))
    calls[1:] = []
    attention_forward_varlen(q, k, v, [0, 5, 8, 12], [0, 4, 8, 12])
    assert len(calls) == 1 + 3


def test_no_sequence_at_all():
    empty = torch.randn(0, 2, 8)
    assert attention_forward_varlen(empty, empty, empty, [0], [0]).shape == (0, 2, 8)


def test_softcap_never_multiplies_in_half():
    q, k, v = (torch.randn(6, 2, 8).half() * scale for scale in (300, 300, 1))
    out = attention_forward_varlen(q, k, v, [0, 6], [0, 6], softcap=30.0)
    oracle = oracles.attention_varlen(q, k, v, [6], [6], lambda n, m: None, softcap=30.0)
    oracles.assert_close(out, oracle)


def good():
    q, k, v = torch.randn(3, 6, 4, 8)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": [0, 2, 6], "cu_seqlens_k": [0, 3, 6]}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG = [
    ("q", {"q": None}),
    ("q", {"q": torch.randn(1, 6, 4, 8)}),
    ("q", {"q": torch.zeros(6, 4, 8, dtype=torch.int32)}),
    ("k", {"k": torch.randn(6, 8)}),
    ("k", {"k": torch.randn(6, 4, 8).half()}),
    ("k", {"k": torch.randn(6, 4, 7)}),
    ("k", {"k": torch.randn(6, 3, 8), "v": torch.randn(6, 3, 8)}),
    ("v", {"v": torch.randn(5, 4, 8)}),
    ("v", {"v": torch.randn(6, 2, 8)}),
    ("v", {"v": torch.randn(6, 4, 8, device="meta")}),
    ("cu_seqlens_q", {"cu_seqlens_q": None}),
    ("cu_seqlens_q", {"cu_seqlens_q": []}),
    ("cu_seqlens_q", {"cu_seqlens_q": "0 6"}),
    ("cu_seqlens_q", {"cu_seqlens_q": [1, 2, 6]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 2, 5]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 7, 6]}),
    ("cu_seqlens_q", {"cu_seqlens_q": int32(0, 7, 6)}),
    ("cu_seqlens_q", {"cu_seqlens_q": int32(0, 2, 7)}),
    ("cu_seqlens_q", {"cu_seqlens_q": int32(0, 2, 6)[None]}),
    ("cu_seqlens_q", {"cu_seqlens_q": int32(0, 2, 6).float()}),
    ("cu_seqlens_q", {"cu_seqlens_q": [torch.tensor(0.0), torch.tensor(6.0)]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, torch.tensor(2), 6]}),
    ("cu_seqlens_q[1]", {"cu_seqlens_q": [0, 2.0, 6]}),
    ("cu_seqlens_q[1]", {"cu_seqlens_q": [0, -2, 6]}),
    ("cu_seqlens_k", {"cu_seqlens_k": [0, 6]}),
    ("cu_seqlens_k", {"cu_seqlens_k": [0, 2, 4, 6]}),
    ("max_seqlen_q", {"max_seqlen_q": 3}),
    ("max_seqlen_q", {"max_seqlen_q": 4.0}),
    ("max_seqlen_k", {"max_seqlen_k": True}),
    ("max_seqlen_k", {"max_seqlen_k": 2}),
    ("dropout_p", {"dropout_p": 0.1}),
    ("dropout_p", {"dropout_p": None}),
    ("softmax_scale", {"softmax_scale": "x"}),
    ("softmax_scale", {"softmax_scale": math.nan}),
    ("causal", {"causal": None}),
    ("window_size", {"window_size": 5}),
    ("window_size", {"window_size": (-3, 0)}),
    ("softcap", {"softcap": -1.0}),
    ("softcap", {"softcap": math.inf}),
    ("alibi_slopes", {"alibi_slopes": [1.0]}),
    ("alibi_slopes", {"alibi_slopes": torch.ones(3)}),
    ("alibi_slopes", {"alibi_slopes": torch.ones(3, 4)}),
    ("alibi_slopes", {"alibi_slopes": torch.ones(4, dtype=torch.int32)}),
    ("alibi_slopes", {"alibi_slopes": torch.ones(4, device="meta")}),
    ("deterministic", {"deterministic": 0}),
    ("return_attn_probs", {"return_attn_probs": True}),
    ("return_attn_probs", {"return_attn_probs": 0}),
    ("block_table", {"block_table": torch.zeros(2, 2, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("argument", "changes"), WRONG)
def test_wrong_arguments(argument, changes):
    with pytest.raises(ParametersInvalid) as caught:
        attention_forward_varlen(**{**good(), **changes})
    assert caught.value.argument == argument
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused(name):
    arguments = good()
    arguments[name].requires_grad_()
    with pytest.raises(ParametersInvalid, match="forward-only"):
        attention_forward_varlen(**arguments)
    with torch.inference_mode():
        attention_forward_varlen(**arguments)
