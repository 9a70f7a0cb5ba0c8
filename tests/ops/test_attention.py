"""attention_forward, attend and refusal, against the oracle and against SDPA."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mindiesd import ParametersInvalid, attention_forward
from mindiesd.ops import attention, masks
from mindiesd.ops.backends import native
from tests import oracles

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
MASKS = ("none", "bool", "padding", "bias", "-inf", "min", "empty rows", "mixed rows")
STRIDES = ("plain", "transposed", "expanded", "sliced", "d-major")


def laid_out(tensor, how):
    """The same values (one batch repeated, for expanded) in other strides."""
    if how == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "expanded":
        return tensor[:1].expand_as(tensor)
    if how == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if how == "d-major":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


@st.composite
def masked(draw, kind, scores, dtype, generator):
    """A mask of that kind in one of the shapes that broadcast to the scores."""
    shape = [draw(st.sampled_from([1, size])) for size in scores]
    shape = shape[draw(st.integers(0, 2)) :]
    if kind == "none":
        return None
    if kind == "bool":
        return torch.rand(shape, generator=generator) > 0.4
    if kind == "padding":
        lengths = torch.randint(0, scores[3] + 1, (scores[0], 1, 1, 1), generator=generator)
        return torch.arange(scores[3]) < lengths
    bias = torch.randn(shape, generator=generator) * 2
    if kind == "-inf":
        bias = bias.masked_fill(torch.rand(shape, generator=generator) > 0.6, -math.inf)
    if kind == "min":
        low = torch.finfo(dtype).min
        bias = torch.where(torch.rand(shape, generator=generator) > 0.5, low, 0.0)
    if kind == "empty rows":
        bias[..., :1, :] = -math.inf
    if kind == "mixed rows":
        bias[..., :1, :] = torch.finfo(dtype).min
        bias[..., -1:, :] = -math.inf
    return bias.to(dtype) if draw(st.booleans()) else bias


@st.composite
def calls(draw, kinds=MASKS, dtypes=DTYPES):
    """query, key, value [B, N, S, D] and a mask."""
    batch, kv_heads, groups = draw(st.sampled_from([1, 2])), draw(st.integers(1, 2)), 1
    groups = draw(st.sampled_from([1, 2, 3]))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dim, value_dim = draw(st.sampled_from([1, 4, 8, 17])), draw(st.sampled_from([0, 0, 5]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = kv_heads * groups

    def tensor(*shape):
        return laid_out(
            torch.randn(shape, generator=generator).to(dtype), draw(st.sampled_from(STRIDES))
        )

    query = tensor(batch, heads, queries, dim)
    key = tensor(batch, kv_heads, keys, dim)
    value = tensor(batch, kv_heads, keys, value_dim or dim)
    kind = draw(st.sampled_from(kinds))
    mask = draw(masked(kind, (batch, heads, queries, keys), dtype, generator))
    return query, key, value, mask


def split(mask):
    """The oracle's keep and bias of a mask tensor."""
    if mask is None:
        return {}
    return {"keep": mask} if mask.dtype is torch.bool else {"bias": mask}


def sdpa(query, key, value, mask=None, is_causal=False, scale=None):
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
    )


@given(calls(), st.booleans(), st.sampled_from([None, 1, 0.3]))
def test_fused_is_sdpa_bit_for_bit(call, head_first, scale):
    query, key, value, mask = call
    before = [t.clone() for t in (query, key, value)]
    theirs = sdpa(query, key, value, mask, scale=scale)
    if head_first:
        ours = attention_forward(query, key, value, mask, scale, head_first=True)
    else:
        swapped = (t.transpose(1, 2) for t in (query, key, value))
        ours = attention_forward(*swapped, mask, scale).transpose(1, 2)
    assert ours.dtype is query.dtype
    assert torch.equal(ours, theirs)
    oracle = oracles.attention(query, key, value, scale=scale, **split(mask))
    oracles.assert_close(ours, oracle, oracles.slack(mask))
    for tensor, copy in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, copy)


@given(calls(), st.booleans())
def test_unfused_is_as_accurate_as_sdpa(call, head_first):
    query, key, value, mask = call
    oracle = oracles.attention(query, key, value, **split(mask))
    inputs = call[:3] if head_first else [t.transpose(1, 2) for t in call[:3]]
    ours = attention_forward(*inputs, mask, fused=False, head_first=head_first)
    ours = ours if head_first else ours.transpose(1, 2)
    assert ours.dtype is query.dtype
    theirs = sdpa(query, key, value, mask)
    oracles.assert_as_accurate(ours, theirs, oracle, oracles.slack(mask))


@given(calls(), st.booleans(), st.sampled_from([None, (-1, -1), (2, 1), (0, 0), (-1, 3), (4, -1)]))
def test_causal_windows_and_masks_apply_together(call, fused, window):
    query, key, value, mask = call
    queries, keys = query.shape[2], key.shape[2]
    keep = oracles.top_left(queries, keys)
    if window is not None:
        keep = keep & oracles.window(queries, keys, *window)
    parts = split(mask)
    parts["keep"] = keep & parts["keep"] if "keep" in parts else keep
    oracle = oracles.attention(query, key, value, **parts)
    extras = {"is_causal": True, "window_size": window}
    ours = attention_forward(query, key, value, mask, fused=fused, head_first=True, **extras)
    oracles.assert_close(ours, oracle, oracles.slack(mask))


@given(calls(("none",)), st.booleans())
def test_causal_is_sdpa_bit_for_bit(call, head_first):
    query, key, value, _ = call
    inputs = call[:3] if head_first else [t.transpose(1, 2) for t in call[:3]]
    ours = attention_forward(*inputs, head_first=head_first, is_causal=True)
    ours = ours if head_first else ours.transpose(1, 2)
    assert torch.equal(ours, sdpa(query, key, value, is_causal=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, (90, 20), (300, -1)])
def test_longer_than_a_block_of_the_kernel(dtype, fused, window):
    query = torch.randn(1, 4, 321, 40).to(dtype)
    key, value = (torch.randn(1, 2, 600, 40).to(dtype) for _ in range(2))
    mask = torch.arange(600) < 570
    mask = (mask & (torch.arange(600) >= torch.arange(321)[:, None] * 2)).clone()
    mask[300:] = False
    keep = mask if window is None else mask & oracles.window(321, 600, *window)
    out = attention_forward(
        query, key, value, mask, fused=fused, head_first=True, window_size=window
    )
    oracle = oracles.attention(query, key, value, keep=keep)
    oracles.assert_as_accurate(out, sdpa(query, key, value, keep), oracle)
    assert torch.equal(out[:, :, 300:], torch.zeros_like(out[:, :, 300:]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_zero_and_finite_ones_average(dtype, fused):
    query, key, value = (torch.randn(2, 3, 4, 8).to(dtype) for _ in range(3))
    bias = torch.zeros(4, 4)
    bias[0] = -math.inf
    bias[1] = torch.finfo(torch.float32).min
    out = attention_forward(query, key, value, bias, fused=fused, head_first=True)
    assert torch.equal(out[:, :, 0], torch.zeros(2, 3, 8, dtype=dtype))
    average = value.double().mean(2)
    oracles.assert_close(out[:, :, 1], average)
    none = torch.tensor([False, True, True, True])[:, None]
    out = attention_forward(query, key, value, none, fused=fused, head_first=True)
    assert torch.equal(out[:, :, 0], torch.zeros(2, 3, 8, dtype=dtype))
    assert out[:, :, 1:].abs().min() > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations_do_not_overflow(dtype, fused):
    query, key, value = (torch.randn(1, 2, 16, 32) for _ in range(3))
    query, key, value = (query * 200).to(dtype), (key * 200).to(dtype), value.to(dtype)
    out = attention_forward(query, key, value, fused=fused, head_first=True)
    oracle = oracles.attention(query, key, value)
    if fused:
        assert torch.equal(out, sdpa(query, key, value))
    oracles.assert_as_accurate(out, sdpa(query, key, value), oracle)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "keys"),
    [(2, 4, 4, 3, 0), (2, 4, 2, 3, 0), (2, 4, 4, 0, 5), (0, 4, 4, 3, 5), (2, 0, 0, 3, 5)],
)
@pytest.mark.parametrize("causal", [True, False])
def test_empty(batch, heads, kv_heads, queries, keys, head_first, causal, fused):
    def tensor(heads, length):
        made = torch.randn(batch, heads, length, 8)
        return made if head_first else made.transpose(1, 2)

    out = attention_forward(
        tensor(heads, queries),
        tensor(kv_heads, keys),
        tensor(kv_heads, keys),
        head_first=head_first,
        fused=fused,
        is_causal=causal,
    )
    assert torch.equal(out, torch.zeros_like(tensor(heads, queries)))


@pytest.mark.parametrize("fused", [True, False])
def test_float64(fused):
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(5, 5, dtype=torch.float64)
    out = attention_forward(query, key, value, bias, fused=fused, head_first=True)
    assert out.dtype is torch.float64
    assert oracles.error(out, oracles.attention(query, key, value, bias=bias)) < 1e-13


@pytest.mark.parametrize("dtype", HALVES)
def test_a_bias_of_the_other_half_type(dtype):
    query, key, value = (torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3))
    bias = torch.randn(5, 5).to(torch.bfloat16 if dtype is torch.float16 else torch.float16)
    for fused in (True, False):
        out = attention_forward(query, key, value, bias, fused=fused, head_first=True)
        oracles.assert_close(out, oracles.attention(query, key, value, bias=bias))


@pytest.mark.parametrize(
    "extras",
    [
        {"opt_mode": "runtime"},
        {"opt_mode": "static"},
        {"opt_mode": "manual"},
        {"opt_mode": "manual", "op_type": "prompt_flash_attn", "layout": "BSH"},
        {"opt_mode": "manual", "op_type": "ascend_laser_attention", "layout": "BNSD"},
    ],
)
def test_every_mode_computes_the_same(extras):
    query, key, value = (torch.randn(2, 5, 3, 8) for _ in range(3))
    mask = torch.rand(5, 5) > 0.3
    expected = attention_forward(query, key, value, mask)
    assert torch.equal(attention_forward(query, key, value, mask, **extras), expected)


def test_a_manual_call_reaches_the_backend_with_its_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(native, "attention", lambda *arguments: seen.append(arguments[-1]))
    query = torch.randn(1, 2, 3, 4)
    attention_forward(query, query, query, opt_mode="manual", op_type="prompt_flash_attn")
    attention_forward(query, query, query, opt_mode="static", op_type="prompt_flash_attn")
    attention_forward(query, query, query)
    assert seen == [("prompt_flash_attn", "BNSD"), None, None]


def nested(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "prototype stage"
        return torch.nested.nested_tensor([torch.randn(shape)] * 2)


def good():
    return dict(zip(("query", "key", "value"), torch.randn(3, 2, 6, 4, 8), strict=True))


WRONG = [
    ("query", {"query": None}),
    ("query", {"query": [[1.0]]}),
    ("query", {"query": torch.randn(2, 6, 8)}),
    ("query", {"query": torch.zeros(2, 6, 4, 8, dtype=torch.int32)}),
    ("query", {"query": torch.randn(2, 6, 4, 8).to_sparse()}),
    ("query", {"query": nested(6, 4, 8)}),
    ("key", {"key": nested(6, 4, 8)}),
    ("key", {"key": 3}),
    ("key", {"key": torch.randn(2, 6, 4, 8).half()}),
    ("key", {"key": torch.randn(2, 6, 4, 8, device="meta")}),
    ("key", {"key": torch.randn(3, 6, 4, 8)}),
    ("key", {"key": torch.randn(2, 6, 4, 7)}),
    ("value", {"key": torch.randn(2, 5, 4, 8)}),
    ("value", {"value": torch.randn(1, 6, 4, 8)}),
    ("value", {"value": torch.randn(2, 6, 2, 8)}),
    ("value", {"value": torch.randn(2, 5, 4, 8)}),
    ("value", {"value": "v"}),
    ("key", {"key": torch.randn(2, 6, 3, 8), "value": torch.randn(2, 6, 3, 8)}),
    ("key", {"key": torch.randn(2, 6, 0, 8), "value": torch.randn(2, 6, 0, 8)}),
    (
        "key",
        {
            "key": torch.randn(2, 6, 2, 8),
            "value": torch.randn(2, 6, 2, 8),
            "enable_gqa": False,
        },
    ),
    ("attn_mask", {"attn_mask": [[True]]}),
    ("attn_mask", {"attn_mask": torch.zeros(6, 6, dtype=torch.int64)}),
    ("attn_mask", {"attn_mask": torch.zeros(6, 6, dtype=torch.float64)}),
    ("attn_mask", {"attn_mask": torch.zeros(6)}),
    ("attn_mask", {"attn_mask": torch.zeros(())}),
    ("attn_mask", {"attn_mask": torch.zeros(1, 2, 4, 6, 6)}),
    ("attn_mask", {"attn_mask": torch.zeros(6, 5)}),
    ("attn_mask", {"attn_mask": torch.zeros(5, 6)}),
    ("attn_mask", {"attn_mask": torch.zeros(6, 6, 6)}),
    ("attn_mask", {"attn_mask": torch.zeros(3, 1, 6, 6)}),
    ("attn_mask", {"attn_mask": torch.zeros(6, 6, device="meta")}),
    ("scale", {"scale": True}),
    ("scale", {"scale": "1"}),
    ("scale", {"scale": math.nan}),
    ("scale", {"scale": math.inf}),
    ("scale", {"scale": torch.tensor(1.0)}),
    ("scale", {"scale": 1j}),
    ("fused", {"fused": 1}),
    ("fused", {"fused": None}),
    ("head_first", {"head_first": 0}),
    ("head_first", {"head_first": "yes"}),
    ("opt_mode", {"opt_mode": "auto"}),
    ("op_type", {"op_type": "x"}),
    ("layout", {"layout": "BNS"}),
    ("is_causal", {"is_causal": 1}),
    ("is_causal", {"is_causal": None}),
    ("enable_gqa", {"enable_gqa": 1}),
    ("window_size", {"window_size": 3}),
    ("window_size", {"window_size": (1, 2, 3)}),
    ("window_size", {"window_size": (-2, 0)}),
    ("window_size", {"window_size": (1.0, 0)}),
    ("window_size", {"window_size": (True, 0)}),
    ("dropout_p", {"dropout_p": 0.0}),
    ("Scale", {"Scale": 1.0}),
]


@pytest.mark.parametrize(("argument", "changes"), WRONG)
def test_wrong_arguments(argument, changes):
    with pytest.raises(ParametersInvalid) as caught:
        attention_forward(**{**good(), **changes})
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}: received ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_gradients_are_refused(name):
    arguments = {**good(), "attn_mask": torch.zeros(6, 6)}
    arguments[name].requires_grad_()
    with pytest.raises(ParametersInvalid, match=rf"{name}.*forward-only"):
        attention_forward(**arguments)
    with torch.no_grad():
        expected = attention_forward(**arguments)
    with torch.inference_mode():
        assert torch.equal(attention_forward(**arguments), expected)


def test_numbers_that_are_real():
    np = pytest.importorskip("numpy")
    arguments = good()
    expected = attention_forward(**arguments, scale=2.0)
    assert torch.equal(attention_forward(**arguments, scale=2), expected)
    assert torch.equal(attention_forward(**arguments, scale=np.float32(2)), expected)


# ---------------------------------------------------------------------------------------- refusal


def bnsd(*shape, dtype=torch.float32, **options):
    return torch.zeros(*shape, dtype=dtype, **options)


Q = bnsd(2, 4, 3, 8)
REFUSED = [
    ((bnsd(4, 3, 8),) * 3, "3-D input"),
    ((bnsd(3, 8),) * 3, "not 4-D"),
    ((bnsd(1, 2, 4, 3, 8),) * 3, "not 4-D"),
    ((Q, bnsd(4, 3, 8), Q), "not 4-D"),
    ((nested(4, 3, 8),) * 3, "nested tensor"),
    ((Q, bnsd(1, 4, 3, 8), bnsd(1, 4, 3, 8)), "batch sizes differ"),
    ((Q, Q, bnsd(1, 4, 3, 8)), "batch sizes differ"),
    ((Q, Q, bnsd(2, 4, 5, 8)), "key and value differ in heads or length"),
    ((Q, Q, bnsd(2, 2, 3, 8)), "key and value differ in heads or length"),
    ((Q, bnsd(2, 4, 3, 6), Q), "query and key differ in head dimension"),
    ((Q, bnsd(2, 2, 3, 8), bnsd(2, 2, 3, 8)), "head counts differ without enable_gqa"),
    ((Q, bnsd(2, 1, 3, 8), bnsd(2, 1, 3, 8)), "head counts differ without enable_gqa"),
    ((Q, bnsd(2, 3, 3, 8), bnsd(2, 3, 3, 8), None, False, True), "head counts do not divide"),
    ((Q, bnsd(2, 0, 3, 8), bnsd(2, 0, 3, 8), None, False, True), "head counts do not divide"),
    ((Q, Q.half(), Q), "query, key and value differ in dtype"),
    ((Q, Q, Q.double()), "query, key and value differ in dtype"),
    ((Q.double(),) * 3, "dtype float64"),
    ((Q.int(),) * 3, "dtype is not floating"),
    ((Q, Q.to("meta"), Q), "query, key and value differ in device"),
    ((Q.to("meta"), Q, Q.to("meta")), "query, key and value differ in device"),
    ((Q, Q, Q, torch.zeros(3, 3), True), "mask and is_causal together"),
    ((Q, Q, Q, torch.zeros(3, 3).double()), "mask dtype"),
    ((Q, Q, Q, torch.zeros(3, 3).half()), "mask dtype"),
    ((Q, Q, Q, torch.zeros(3, 3).byte()), "mask dtype"),
    ((Q, Q, Q, torch.zeros(3, 3, device="meta")), "mask on another device"),
    ((Q, Q, Q, [[True]]), "mask is not a dense tensor"),
    ((Q, Q, Q, torch.zeros(3)), "mask does not broadcast"),
    ((Q, Q, Q, torch.zeros(4, 3)), "mask does not broadcast"),
    ((Q, Q, Q, torch.zeros(2, 3, 3)), "mask does not broadcast"),
    ((Q, Q, Q, torch.zeros(3, 1, 3, 3)), "mask does not broadcast"),
    ((Q, Q, Q, torch.zeros(2, 2, 4, 3, 3)), "mask does not broadcast"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_refusal(arguments, reason):
    assert attention.refusal(*arguments) == reason


@given(calls(), st.booleans())
def test_nothing_good_is_refused_and_attend_computes_it(call, head_first):
    query, key, value, mask = call
    inputs = call[:3] if head_first else tuple(t.transpose(1, 2) for t in call[:3])
    assert attention.refusal(*inputs, mask, False, True, head_first) is None
    if mask is None:
        assert attention.refusal(*inputs, None, True, True, head_first) is None
    ours = attention.attend(*inputs, mask, head_first=head_first)
    ours = ours if head_first else ours.transpose(1, 2)
    assert torch.equal(ours, sdpa(query, key, value, mask))


def test_attend_looks_the_kernel_up_at_each_call(monkeypatch):
    monkeypatch.setattr(native, "attention", lambda *_: "replaced")
    assert attention.attend(Q, Q, Q) == "replaced"


def test_attend_hands_one_mask_value_to_the_backend(monkeypatch):
    seen = []
    monkeypatch.setattr(native, "attention", lambda *arguments: seen.append(arguments[3]))
    keep = torch.ones(3, 3, dtype=torch.bool)
    attention.attend(Q, Q, Q)
    attention.attend(Q, Q, Q, is_causal=True)
    attention.attend(Q, Q, Q, keep, None, True, masks.Band(-2, 5))
    assert seen[:2] == [None, masks.CAUSAL]
    assert seen[2].keep is keep
    assert seen[2][1:] == (None, masks.Band(-2, 0))
