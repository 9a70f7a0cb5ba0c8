"""Norms, rotary embedding and GELU on the emulated device against float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mindiesd
from mindiesd.emulator import trace
from mindiesd.ops import ada_norm, norm
from mindiesd.ops.backends import native, npu
from mindiesd.ops.backends.npu import norms, rope, soc
from mindiesd.ops.rope import rotate
from tests import oracles

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


def made(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).npu()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("kept", [None, *FLOATS, torch.float64])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 4, 40), (1, 1, 1, 1, 1, 1, 1, 2, 40)])
def test_rms_norm(dtype, kept, shape):
    x = made(*shape, dtype=dtype)
    weight = None if kept is None else made(40, dtype=kept)
    with trace() as counted:
        out = norm.rms_norm(x, weight, 1e-6)
    assert out.dtype is dtype and out.shape == x.shape
    own = None if weight is None else weight.cpu()
    oracles.assert_close(out.cpu(), oracles.rms_norm(x.cpu(), own, 1e-6))
    if torch.float64 not in (dtype, kept) and len(shape) <= 8:
        assert counted.launches["npu::npu_rms_norm"] == 1


def test_rms_norm_of_nothing():
    out = norm.rms_norm(made(0, 8, dtype=torch.float16), None, 1e-6)
    assert out.shape == (0, 8) and out.dtype is torch.float16


def test_the_gamma_of_ones_is_made_once():
    x = made(2, 4, 16, dtype=torch.float16)
    with trace() as counted:
        for _ in range(5):
            norm.rms_norm(x, None, 1e-6)
    assert counted.launches == {"aten::ones": 1, "npu::npu_rms_norm": 5}


@pytest.mark.parametrize(
    ("dtype", "size", "refused"),
    [
        (torch.float16, 16, False),
        (torch.float16, 15, True),
        (torch.float32, 8, False),
        (torch.float32, 7, True),
        (torch.bfloat16, 64, True),
    ],
)
def test_rms_norm_limits_of_the_310p(dtype, size, refused):
    found = norms.rms_norm_refusal(torch.empty(2, size, dtype=dtype), soc.I310P)
    assert (found is not None) is refused


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kept", [None, *FLOATS])
def test_layer_norm(dtype, kept):
    x = made(2, 5, 24, dtype=dtype)
    weight, bias = (None, None) if kept is None else made(2, 24, dtype=kept)
    out = norm.layer_norm(x, (24,), weight, bias, 1e-5)
    assert out.dtype is dtype
    own = [None if t is None else t.cpu() for t in (weight, bias)]
    oracles.assert_close(out.cpu(), oracles.layer_norm(x.cpu(), *own, 1e-5))


def composed_in(dtype, x, weight, bias, scale, shift):
    """What model code writes, every step rounded to its own dtype."""
    normed = nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    return normed * (1 + scale) + shift


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("modulation", FLOATS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 7), (3, 7)])
@pytest.mark.parametrize("affine", ["none", "weight", "both"])
@pytest.mark.parametrize("fast", [False, True])
def test_modulated_layer_norm(dtype, modulation, batch, tokens, affine, fast):
    x = made(batch, 7, 256, dtype=dtype)
    scale, shift = made(2, batch, tokens, 256, dtype=modulation)
    weight = None if affine == "none" else made(256, dtype=dtype)
    bias = made(256, dtype=dtype) if affine == "both" else None
    out = ada_norm.layer_norm_scale_shift(x, weight, bias, 1e-6, scale, shift, fast)
    assert out.dtype is dtype and out.shape == x.shape
    host = [None if t is None else t.cpu() for t in (x, weight, bias, scale, shift)]
    normed = oracles.layer_norm(*host[:3], 1e-6)
    expected = normed * (1 + host[3].double()) + host[4].double()
    theirs = composed_in(dtype, *host).to(dtype)
    if not fast:
        # At every element as near as its dtype allows, so nothing is nearer anywhere.
        distance = (out.cpu().double() - expected).abs()
        least = (expected.to(dtype).double() - expected).abs()
        slack = 1e-5 if dtype is torch.float32 else 1e-5 * expected.abs() + 1e-6
        assert (distance <= least + slack).all()
        return

    # By the mean square: which of two random roundings is larger at one element is luck.
    def root_mean_square(result):
        return (result.double() - expected).square().mean().sqrt().item()

    mine, other = root_mean_square(out.cpu()), root_mean_square(theirs)
    assert mine <= 1.02 * other + 1e-6, (mine, other)


def test_launches_of_a_modulated_layer_norm():
    x, scale, shift = made(1, 9, 64).half(), *made(2, 1, 1, 64).half()
    for tensors, fast, launches in (
        ((x, scale, shift), True, 2),
        ((x, scale, shift), False, 6),
        ((x.float(), scale.float(), shift.float()), False, 2),
        (
            (x.expand(2, -1, -1).contiguous(), *(t.expand(2, 1, -1) for t in (scale, shift))),
            True,
            3,
        ),
    ):
        with trace() as counted:
            ada_norm.layer_norm_scale_shift(tensors[0], None, None, 1e-6, *tensors[1:], fast)
        assert counted.total == launches, (fast, counted.launches)


@st.composite
def rotations(draw):
    dtype, table = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    rank = draw(st.integers(3, 4))
    shape = [draw(st.sampled_from([1, 2, 5])) for _ in range(rank - 1)]
    dim = draw(st.sampled_from([2, 8, 64]))
    own = [draw(st.sampled_from([1, size])) for size in shape]
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    x = torch.randn(*shape, dim).to(dtype).npu()
    if rank == 4 and draw(st.booleans()):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    angles = torch.rand(*own, dim) * 6
    cos, sin = (f(angles).to(table).npu() for f in (torch.cos, torch.sin))
    if draw(st.booleans()):
        cos, sin = (t.expand(*shape, dim) for t in (cos, sin))
    return x, cos, sin, draw(st.booleans())


@given(rotations())
def test_rotation(case):
    x, cos, sin, interleaved = case
    out = rotate(x, cos, sin, interleaved)
    assert out.dtype is x.dtype and out.shape == x.shape
    host = [t.cpu() for t in (x, cos, sin)]
    oracles.assert_close(out.cpu(), oracles.rope(*host, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "table"),
    [
        ((2, 3, 5, 16), (5, 16)),
        ((2, 3, 5, 16), (2, 3, 5, 16)),
        ((2, 3, 5, 16), (2, 1, 5, 16)),
        ((2, 3, 5, 16), (1, 3, 5, 16)),
        ((2, 3, 5, 16), (16,)),
        ((7, 16), (7, 16)),
        ((2, 2, 3, 5, 16), (5, 16)),
        ((2, 3, 5, 894), (5, 894)),
        ((2, 3, 5, 896), (5, 896)),
        ((1, 1000, 2, 8), (1, 1, 2, 8)),
        ((1000, 1, 2, 8), (1, 1, 2, 8)),
        ((999, 1, 2, 8), (1, 1, 2, 8)),
        ((500, 2, 2, 8), (1, 1, 2, 8)),
        ((1, 2, 1000, 8), (1, 2, 1, 8)),
        ((2, 2000, 3, 8), (1, 2000, 1, 8)),
        ((2000, 2, 3, 8), (2000, 1, 1, 8)),
        ((0, 2, 3, 8), (3, 8)),
    ],
)
def test_rotation_at_the_limits(shape, table, interleaved):
    """The emulated kernel raises beyond its limits, so that no error means that it was not hit."""
    x = made(*shape, dtype=torch.bfloat16)
    cos, sin = made(2, *table, dtype=torch.bfloat16).clamp(-1, 1)
    out = rotate(x, cos, sin, interleaved)
    oracles.assert_close(out.cpu(), oracles.rope(x.cpu(), cos.cpu(), sin.cpu(), interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_table_shape_that_is_taken_is_one_that_the_kernel_takes(interleaved):
    shape = (2, 3, 5, 8)
    x = made(*shape)
    for own in itertools.product(*[(1, size) for size in shape[:-1]]):
        cos, sin = made(2, *own, 8)
        refused = rope.refusal(x, cos, sin, interleaved, soc.A2)
        if refused is None:
            torch.ops.npu.npu_rotary_mul(x, cos, sin, "interleave" if interleaved else "half")
        else:
            with pytest.raises(RuntimeError, match="does not go with"):
                torch.ops.npu.npu_rotary_mul(x, cos, sin, "interleave" if interleaved else "half")


def test_rotation_on_the_310p():
    x, table = torch.empty(2, 3, 5, 128, dtype=torch.float16), torch.empty(1, 1, 5, 128).half()
    assert rope.refusal(x, table, table, False, soc.I310P) is None
    assert rope.refusal(x, table, table, True, soc.I310P)
    assert rope.refusal(x[..., :64], table[..., :64], table[..., :64], False, soc.I310P)


def test_tables_are_cast_once_and_views_cost_no_copy():
    x = made(2, 9, 4, 16, dtype=torch.float16).transpose(1, 2)
    cos, sin = made(2, 9, 16)
    with trace() as counted:
        for _ in range(4):
            rotate(x, cos, sin, False)
    assert counted.launches["npu::npu_rotary_mul"] == 4
    assert counted.total == 4 * 3 and not counted.layout_copies
    half = [t.half().float().bfloat16() for t in (cos, sin)]
    y = made(2, 4, 9, 16)
    with trace() as counted:
        for _ in range(4):
            rotate(y, *half, False)
    assert counted.total == 4 + 2


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("kind", ["none", "tanh", "fast"])
def test_gelu_is_the_one_that_was_asked_for(dtype, kind):
    x = torch.linspace(-6, 6, 4001).to(dtype)
    out = npu.gelu(x.npu(), kind).cpu()
    assert out.dtype is dtype
    wide = x.double()
    if kind == "fast":
        expected = wide * torch.sigmoid(1.702 * wide)
    else:
        expected = nn.functional.gelu(wide, approximate=kind)
    oracles.assert_close(out, expected)
    layer = mindiesd.get_activation_layer({"none": "gelu"}.get(kind, f"gelu-{kind}"))
    assert torch.equal(layer(x.npu()).cpu(), out)


def test_atens_gelu_would_have_been_the_other_one():
    x = torch.linspace(-6, 6, 4001).npu()
    wrong = (native.gelu(x, "none") - npu.gelu(x, "none")).abs().max()
    assert wrong > 4e-4


def test_the_strides_of_norms_are_those_of_what_they_replace():
    x = made(2, 9, 4, 16, dtype=torch.float16).transpose(1, 2)
    weight, bias = made(2, 16, dtype=torch.float16)
    with trace() as counted:
        out = norm.rms_norm(x, weight, 1e-6)
    assert counted.total == 1 and not counted.layout_copies
    assert out.transpose(1, 2).is_contiguous()
    host = [t.cpu() for t in (x, weight, bias)]
    oracles.assert_close(out.cpu(), oracles.rms_norm(host[0], host[1], 1e-6))
    # As ATen's, whose callers may go on with a view.
    out = norm.layer_norm(x, (16,), weight, bias, 1e-6)
    assert out.is_contiguous()
    oracles.assert_close(out.cpu(), oracles.layer_norm(*host, 1e-6))
    whole = norm.layer_norm(x, (9, 16), None, None, 1e-6)
    oracles.assert_close(whole.cpu(), oracles.layer_norm(host[0], None, None, 1e-6, dims=2))


@given(st.data())
def test_rms_norm_of_any_strides_copies_in_sight(data):
    rank = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(1, 4)) for _ in range(rank)]
    x = made(*shape).permute(data.draw(st.permutations(range(rank))))
    if data.draw(st.booleans()):
        axis = data.draw(st.integers(0, rank - 1))
        x = torch.cat([x, x], axis).narrow(axis, 1, x.shape[axis])
    weight = made(x.shape[-1]) if data.draw(st.booleans()) else None
    own = None if weight is None else weight.cpu()
    expected = oracles.rms_norm(x.cpu(), own, 1e-6)
    norm.rms_norm(x, weight, 1e-6)  # makes the ones of a norm without a weight
    with trace() as counted:
        out = norm.rms_norm(x, weight, 1e-6)
    assert not counted.layout_copies and counted.total <= 2
    oracles.assert_close(out.cpu(), expected)
    assert out.is_contiguous() or out.transpose(1, 2).is_contiguous()
    with trace() as counted:
        out = norm.rms_norm(x, weight, 1e-6, as_is=True)
    assert counted.total == 1
    oracles.assert_close(out.cpu(), expected)


@given(st.data())
def test_rotation_of_parts_of_a_larger_tensor_copies_in_sight(data):
    whole = made(2, 3, 6, 16)
    axis = data.draw(st.integers(0, 3))
    x = whole.narrow(axis, 0, max(2, whole.shape[axis] // 2))
    if data.draw(st.booleans()):
        x = x.transpose(1, 2)
    cos, sin = made(2, *x.shape[-2:]).clamp(-1, 1)
    with trace() as counted:
        out = rotate(x, cos, sin, interleaved := data.draw(st.booleans()))
    assert not counted.layout_copies and counted.total <= 2
    oracles.assert_close(out.cpu(), oracles.rope(x.cpu(), cos.cpu(), sin.cpu(), interleaved))
