"""Attention on the emulated device against float64, and against its own composition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.emulator import trace
from mindiesd.ops import attention
from mindiesd.ops.backends import native, npu
from mindiesd.ops.backends.npu import derived, forms, infer, prompt
from mindiesd.ops.backends.npu.call import describe
from mindiesd.ops.dispatch import KERNELS
from mindiesd.ops.masks import Band, attention_mask
from tests import oracles
from tests.npu.cases import FLOATS, HALF, Case, cases, masks, tensor


@settings(max_examples=200, deadline=None)
@given(cases())
def test_any_call(case):
    query, key, value = case.heads_first()
    plan = npu.explain(query, key, value, case.parts(), case.scale)
    assert plan.kernel.startswith("npu_fusion_attention"), plan
    case.check(case.attend())


@settings(max_examples=40, deadline=None)
@given(cases(dtypes=HALF, dims=(8, 16, 64)), st.sampled_from([infer, prompt]))
def test_the_other_kernels_inside_their_limits(case, module):
    query, key, value = case.heads_first()
    call = describe(query, key, value, case.parts(), case.scale, True)
    if module.refusal(call) is not None:
        return
    for layout in ("BNSD", "BSND", "BSH"):
        out = module.launch(call, layout, query, key, value, case.parts())
        case.check(out if case.head_first else out.transpose(1, 2))


@settings(max_examples=30, deadline=None)
@given(cases(dtypes=(torch.float16,), kinds=("bool",)), st.sampled_from(sorted(KERNELS)))
def test_manual_calls(case, name):
    if name[0] == "ascend_laser_attention":
        return
    kernel = KERNELS[name]
    query, key, value = case.heads_first()
    call = describe(query, key, value, case.parts(), case.scale, True)
    module = {"prompt_flash_attn": prompt}.get(name[0])
    if module is not None and module.refusal(call):
        with pytest.raises(mindiesd.ParametersInvalid, match="prompt_flash_attn"):
            case.attend(kernel)
        return
    case.check(case.attend(kernel))


@given(st.data(), st.sampled_from(FLOATS), st.booleans())
def test_fused_and_unfused_agree(data, dtype, head_first):
    query, key, value = (
        tensor((2, heads, length, 16), dtype, "BNSD") for heads, length in ((4, 6), (2, 7), (2, 7))
    )
    mask = data.draw(masks(2, 4, 6, 7, dtype))
    if not head_first:
        query, key, value = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    both = [
        mindiesd.attention_forward(
            query, key, value, mask, None, fused, head_first, window_size=(3, -1)
        )
        for fused in (True, False)
    ]
    unit = torch.finfo(dtype).eps
    extra = oracles.slack(mask.cpu())
    assert (both[0].float() - both[1].float()).abs().max() <= 8 * unit + 1e-5 + extra


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (5, 1), (9, 5), (5, 9), (7, 7)])
@pytest.mark.parametrize("window", [(-1, 0), (0, 0), (2, 1), (-1, 3), (1, -1), (0, 30)])
def test_windows(dtype, queries, keys, window):
    query = tensor((1, 2, queries, 16), dtype, "BSND")
    key, value = (tensor((1, 2, keys, 16), dtype, "BSND") for _ in range(2))
    case = Case(query, key, value, band=Band.window(*window, queries, keys))
    case.check(case.attend())
    by_hand = oracles.attention(
        query.cpu(), key.cpu(), value.cpu(), oracles.window(queries, keys, *window)
    )
    assert torch.equal(case.oracle(), by_hand)


@pytest.mark.parametrize(
    ("band", "queries", "keys", "mode"),
    [
        (Band(None, 0), 5, 9, forms.Sparse(2)),
        (Band(None, 4), 5, 9, forms.Sparse(3)),
        (Band(None, -4), 9, 5, forms.Sparse(3)),
        (Band(2, 5), 5, 9, forms.Sparse(4, 2, 1)),
        (Band(2, None), 5, 9, forms.Sparse(4, 2)),
        (Band(None, 6), 5, 9, forms.Sparse(4, forms.INT_MAX, 2)),
        (Band(5, 6), 5, 9, None),
        (Band(-3, 2), 5, 9, None),
        (Band(-99, 99), 5, 9, None),
    ],
)
def test_bands_as_modes(band, queries, keys, mode):
    query, key = (
        tensor((1, 1, queries, 8), HALF[0], "BNSD"),
        tensor((1, 1, keys, 8), HALF[0], "BNSD"),
    )
    mask = attention_mask(None, band=band)
    assert forms.sparse(describe(query, key, key, mask, None, True)) == mode


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_infinity_is_nothing_and_the_lowest_number_an_average(dtype):
    query, key, value = (tensor((1, 2, 4, 16), dtype, "BNSD") for _ in range(3))
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(4, 4)
    bias[0] = -math.inf
    bias[1] = lowest
    bias[2] = torch.tensor([lowest, -math.inf, lowest, -math.inf])
    out = Case(query, key, value, bias.npu()).attend().cpu().float()
    assert (out[:, :, 0] == 0).all()
    mean = value.cpu().float()
    close = {"atol": 2 * torch.finfo(dtype).eps * 4, "rtol": 0}
    torch.testing.assert_close(out[:, :, 1], mean.mean(2), **close)
    torch.testing.assert_close(out[:, :, 2], mean[:, :, ::2].mean(2), **close)


def test_the_bias_of_a_mask_and_a_band_together():
    query, key, value = (tensor((2, 2, 6, 16), torch.float32, "BNSD") for _ in range(3))
    bias = torch.randn(2, 1, 1, 6)
    bias[0, ..., :2] = torch.finfo(torch.float32).min
    case = Case(query, key, value, bias.npu(), causal=True)
    case.check(case.attend())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [None, 0.11])
def test_large_biases_lose_nothing(dtype, scale):
    """A bias divided by the scale in half precision would be off by whole units here."""
    query, key, value = (tensor((2, 4, 9, 40), dtype, "BSND") for _ in range(3))
    for kept in {dtype, torch.float32}:
        bias = (torch.randn(2, 4, 9, 9) * 200).to(kept).npu()
        case = Case(query, key, value, bias, scale=scale)
        case.check(case.attend())


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 2), (6, 6)])
def test_grouped_heads(heads, kv_heads):
    query = tensor((2, heads, 5, 16), torch.bfloat16, "BSND")
    key, value = (tensor((2, kv_heads, 7, 16), torch.bfloat16, "BSND") for _ in range(2))
    case = Case(query, key, value)
    case.check(case.attend())


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("head_first", [True, False])
def test_empty_sequences(lengths, head_first):
    def make(length, heads):
        shape = (2, heads, length, 8) if head_first else (2, length, heads, 8)
        return torch.randn(shape, device="npu", dtype=torch.float16)

    query, key = make(lengths[0], 4), make(lengths[1], 2)
    out = attention.attend(query, key, key, head_first=head_first)
    assert out.shape == query.shape and (out == 0).all()
    found = npu.explain(query, key, key, head_first=head_first)
    assert found.kernel == "none"


def test_float64_is_composed():
    query = torch.randn(1, 2, 5, 8, device="npu", dtype=torch.float64)
    found = npu.explain(query, query, query)
    assert found.kernel == "composed"
    assert ("npu_fusion_attention", "dtype is not float16, bfloat16 or float32") in found.refused
    case = Case(query, query, query)
    case.check(case.attend())


def test_a_transposed_result_is_a_view_in_the_layout_of_the_query():
    query = tensor((2, 4, 6, 16), torch.float16, "BSND")
    out = attention.attend(query, query, query)
    assert out.transpose(1, 2).is_contiguous()
    assert attention.attend(*[query.contiguous()] * 3).is_contiguous()


def test_the_contract_of_the_composition():
    assert npu.attention_composed is native.attention_composed


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("made", ["plain", "biased", "gappy", "wide"])
def test_autocast_decides_the_dtype(dtype, made):
    """As for PyTorch's own attention, which is among the operators that autocast casts."""
    size = 300 if made == "wide" else 16
    query, key, value = (torch.randn(2, 4, 6, size, device="npu") for _ in range(3))
    mask = {"biased": torch.randn(6, 6), "gappy": torch.rand(2, 1, 1, 6) > 0.3}.get(made)
    mask = mask if mask is None else mask.npu()

    def original():
        return torch._C._nn.scaled_dot_product_attention(query, key, value, mask)

    def ours():
        return attention.attend(query, key, value, mask)

    with torch.autocast("npu", dtype=dtype):
        theirs, out = original(), ours()
        traced = torch.compile(ours, fullgraph=True, backend="eager")()
        with torch.autocast("npu", enabled=False):
            assert ours().dtype is torch.float32
    exact = torch._C._nn.scaled_dot_product_attention(
        *(t.cpu().to(dtype).double() for t in (query, key, value)),
        mask if mask is None else mask.cpu() if made == "gappy" else mask.cpu().to(dtype).double(),
    )
    assert out.dtype is theirs.dtype is traced.dtype is dtype
    limit = 1.1 * (theirs.cpu().double() - exact).abs().max() + torch.finfo(dtype).eps
    assert (out.cpu().double() - exact).abs().max() <= limit
    assert (traced.cpu().double() - exact).abs().max() <= limit


def test_inference_mode():
    query = tensor((2, 4, 6, 16), torch.float16, "BSND")
    keep = torch.rand(2, 1, 1, 6, device="npu") > 0.3
    case = Case(query, query, query, keep)
    with torch.inference_mode():
        case.check(case.attend())
        made = torch.rand(6, 6, device="npu") > 0.3
        other = Case(query, query, query, made)
        other.check(other.attend())
        made[0] = False
        other.check(other.attend())
    case.check(case.attend())


@pytest.mark.parametrize("memory", ["BNSD", "BSND"])
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_large_bias_is_not_repeated_for_each_head(dtype, memory, head_first):
    tensors = [tensor((2, 3, 130, 8), dtype, memory) for _ in range(3)]
    bias = torch.randn(130, 130)
    bias[3] = -math.inf
    bias[4] = torch.finfo(torch.float32).min
    if not head_first:
        tensors = [t.transpose(1, 2) for t in tensors]
    case = Case(*tensors, bias.to(dtype).npu(), causal=True, head_first=head_first)
    for _ in range(2):
        with trace() as counted:
            out = case.attend()
        case.check(out)
    # A copy of each of the three tensors at most, and not one mask of [B, N, Sq, Skv].
    assert counted.bytes_written <= 5 * 2 * 3 * 130 * 128 * 8
    (entry,) = derived.TABLE._entries.values()
    for pair in entry.forms.values():
        assert all(made.shape == (1, 1, 130, 130) for made in pair)


def test_function_transforms_take_no_kernel():
    inputs = torch.randn(3, 1, 2, 4, 16).npu()
    with trace() as counted:
        out = torch.vmap(lambda x: attention.attend(x, x, x))(inputs)
    assert not any(name.startswith("npu::") for name in counted.launches)
    for one, expected in zip(inputs, out, strict=True):
        Case(one, one, one).check(expected)
