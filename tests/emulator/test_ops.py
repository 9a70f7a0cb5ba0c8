"""Rotary embeddings, norms, activations and casts of npu::."""

from __future__ import annotations

import pytest
import torch

from . import oracle

H, BF, FULL = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {H: 2e-3, BF: 2e-2, FULL: 2e-6}
DTYPES = [H, BF, FULL]


@pytest.fixture
def ops(npu):
    import torch_npu

    return torch_npu


def close(got, expected, dtype):
    assert got.device.type == "npu"
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.cpu().double(), expected.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def refuses(call, *args, match, **kwargs):
    with pytest.raises(RuntimeError, match=match):
        call(*args, **kwargs)


class TestRotaryMul:
    SHAPE = (2, 3, 5, 16)  # BNSD, or BSND, or SBND

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "table",
        [
            (1, 1, 5, 16),
            (2, 1, 5, 16),
            (2, 3, 5, 16),
            (1, 3, 1, 16),
            (2, 3, 1, 16),
            (2, 1, 1, 16),
        ],
    )
    def test_half(self, ops, table, dtype):
        x, cos, sin = (torch.rand(s, dtype=dtype) * 2 - 1 for s in (self.SHAPE, table, table))
        got = ops.npu_rotary_mul(x.npu(), cos.npu(), sin.npu())
        close(got, x.double() * cos.double() + oracle.rotate_half(x.double()) * sin.double(), dtype)

    @pytest.mark.parametrize("table", [(1, 1, 5, 16), (1, 3, 1, 16), (2, 1, 1, 16)])
    def test_interleave(self, ops, table):
        x, cos, sin = (torch.rand(s) * 2 - 1 for s in (self.SHAPE, table, table))
        got = ops.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "interleave")
        turned = oracle.rotate_interleave(x.double())
        close(got, x.double() * cos.double() + turned * sin.double(), FULL)

    def test_three_dimensions_and_a_matrix(self, ops):
        x, cos, sin = torch.randn(5, 3, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16)
        for mode, rotate in (
            ("half", oracle.rotate_half),
            ("interleave", oracle.rotate_interleave),
        ):
            expected = x.double() * cos.double() + rotate(x.double()) * sin.double()
            close(ops.npu_rotary_mul(*(t.npu() for t in (x, cos, sin)), mode), expected, FULL)
            matrix = rotate(torch.eye(16))
            got = ops.npu_rotary_mul(*(t.npu() for t in (x, cos, sin)), mode, matrix.npu())
            close(got, expected, FULL)

    def test_tables_are_cast_to_the_dtype_of_x(self, ops):
        x = torch.ones(1, 1, 2, 16, dtype=BF)
        cos, sin = torch.full((1, 1, 2, 16), 1 / 3), torch.zeros(1, 1, 2, 16)
        got = ops.npu_rotary_mul(x.npu(), cos.npu(), sin.npu())
        assert torch.equal(got.cpu(), cos.to(BF))

    @pytest.mark.parametrize("mode", ["half", "interleave"])
    def test_gradient(self, ops, mode):
        rotate = oracle.rotate_half if mode == "half" else oracle.rotate_interleave
        x, cos, sin = torch.randn(self.SHAPE), torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)
        weight = torch.randn(self.SHAPE)
        here = x.clone().requires_grad_()
        ((here * cos + rotate(here) * sin) * weight).sum().backward()
        there = x.npu().requires_grad_()
        (ops.npu_rotary_mul(there, cos.npu(), sin.npu(), mode) * weight.npu()).sum().backward()
        torch.testing.assert_close(there.grad.cpu(), here.grad, atol=1e-5, rtol=1e-5)

    def test_limits(self, ops):
        call = ops.npu_rotary_mul

        def z(*shape):
            return torch.zeros(shape, device="npu")

        x = z(*self.SHAPE)
        refuses(call, x, z(5, 16), z(5, 16), match="dimensions")
        refuses(call, x, z(1, 1, 5, 8), z(1, 1, 5, 8), match="does not go with")
        refuses(call, x, z(1, 1, 1, 16), z(1, 1, 1, 16), match="does not go with")
        refuses(call, x, z(1, 1, 5, 16), z(1, 3, 1, 16), match="differ")
        refuses(call, x, z(2, 1, 5, 16), z(2, 1, 5, 16), "interleave", match="does not go with")
        refuses(call, x, z(2, 3, 5, 16), z(2, 3, 5, 16), "interleave", match="does not go with")
        refuses(call, x, z(1, 1, 5, 16), z(1, 1, 5, 16), "quarter", match="rotary_mode")
        refuses(call, z(1, 1, 5, 15), z(1, 1, 5, 15), z(1, 1, 5, 15), match="even")
        refuses(call, z(1, 1, 5, 896), z(1, 1, 5, 896), z(1, 1, 5, 896), match="896")
        many = z(1000, 1000, 1, 2)
        refuses(call, many, z(1, 1, 1, 2), z(1, 1, 1, 2), match="1000|go with")
        wide = z(40, 25, 5, 2)
        refuses(call, wide, z(1, 1, 5, 2), z(1, 1, 5, 2), "interleave", match="below 1000")
        refuses(call, x.double(), z(1, 1, 5, 16), z(1, 1, 5, 16), match="dtype")


def test_apply_rotary_pos_emb_is_in_place(ops):
    q, k = torch.randn(2, 5, 3, 64), torch.randn(2, 5, 2, 64)
    cos, sin = torch.randn(2, 5, 1, 64), torch.randn(2, 5, 1, 64)
    there = [t.npu() for t in (q, k)]
    got = ops.npu_apply_rotary_pos_emb(*there, cos.npu(), sin.npu())
    for one, two, x in zip(got, there, (q, k), strict=True):
        expected = x.double() * cos.double() + oracle.rotate_half(x.double()) * sin.double()
        close(one, expected, FULL)
        assert torch.equal(one, two)
        assert one.data_ptr() == two.data_ptr()
    call = ops.npu_apply_rotary_pos_emb
    cos, sin = cos.npu(), sin.npu()
    refuses(call, *there, cos, sin, "BNSD", match="layout")
    refuses(call, *there, cos, sin, "BSND", "interleave", match="half")
    refuses(call, *there, cos[:, :, 0], sin[:, :, 0], match="shape")
    refuses(call, there[0].half(), there[1], cos, sin, match="key must be")
    narrow = [t[..., :32].contiguous() for t in (*there, cos, sin)]
    refuses(call, *narrow, match="64 or 128")


def test_interleave_rope_gives_half_order(ops):
    x = torch.randn(2, 3, 5, 64, dtype=H)
    cos, sin = torch.randn(2, 1, 5, 64, dtype=H), torch.randn(2, 1, 5, 64, dtype=H)
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1).double()
    expected = halves * cos.double() + oracle.rotate_half(halves) * sin.double()
    call = ops.npu_interleave_rope
    close(call(x.npu(), cos.npu(), sin.npu()), expected, H)
    refuses(call, *(t.float().npu() for t in (x, cos, sin)), match="dtype")
    refuses(call, *(t[..., :32].npu() for t in (x, cos, sin)), match="64")
    refuses(call, x.npu(), cos[:, :, :2].npu(), sin[:, :, :2].npu(), match="shape")


PAIRS = [(H, H), (BF, BF), (FULL, FULL), (H, FULL), (BF, FULL)]


class TestNorms:
    @pytest.mark.parametrize(("dtype", "gamma_dtype"), PAIRS)
    def test_rms(self, ops, dtype, gamma_dtype):
        x, gamma = torch.randn(2, 3, 32).to(dtype), torch.randn(32).to(gamma_dtype)
        y, rstd = ops.npu_rms_norm(x.npu(), gamma.npu(), 1e-3)
        close(y, oracle.rms(x, 1e-3) * gamma.double(), dtype)
        assert rstd.shape == (2, 3, 1)
        close(rstd, (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt(), FULL)

    def test_rms_rounds_once(self, ops):
        x, gamma = torch.randn(64, 256).to(BF), torch.randn(256).to(BF)
        got = ops.npu_rms_norm(x.npu(), gamma.npu())[0].cpu()
        exact = oracle.rms(x, 1e-6) * gamma.double()
        # one rounding is at most half a unit in the last place, 2^-9 relative
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8).all()

    def test_rms_over_several_dimensions(self, ops):
        x, gamma = torch.randn(2, 3, 8), torch.randn(3, 8)
        y, rstd = ops.npu_rms_norm(x.npu(), gamma.npu())
        expected = oracle.rms(x.reshape(2, 24), 1e-6).reshape(2, 3, 8) * gamma.double()
        close(y, expected, FULL)
        assert rstd.shape == (2, 1, 1)

    def test_rms_limits(self, ops):
        x, gamma = torch.ones(2, 32, device="npu"), torch.ones(32, device="npu")
        for call in (ops.npu_rms_norm, ops.npu_gemma_rms_norm):
            refuses(call, x, None, match="gamma")
            refuses(call, x, gamma.half(), match="not supported")
            refuses(call, x, gamma.double(), match="dtype")
            refuses(call, x.bfloat16(), gamma.half(), match="not supported")
            refuses(call, x, gamma[:16], match="last dimensions")
            refuses(call, x.reshape((1,) * 7 + (2, 32)), gamma, match="dimensions")
        refuses(ops.npu_gemma_rms_norm, x.half(), gamma, match="not supported")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gemma(self, ops, dtype):
        x, gamma = torch.randn(2, 3, 32, dtype=dtype), torch.randn(32, dtype=dtype)
        y, _ = ops.npu_gemma_rms_norm(x.npu(), gamma.npu())
        close(y, oracle.rms(x, 1e-6) * (1 + gamma.double()), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_add_rms(self, ops, dtype):
        a, b, gamma = (torch.randn(s, dtype=dtype) for s in ((2, 32), (2, 32), (32,)))
        y, rstd, total = ops.npu_add_rms_norm(a.npu(), b.npu(), gamma.npu())
        close(y, oracle.rms(a.double() + b.double(), 1e-6) * gamma.double(), dtype)
        close(total, a.double() + b.double(), dtype)
        assert rstd.shape == (2, 1)
        refuses(ops.npu_add_rms_norm, a.npu(), b[:1].npu(), gamma.npu(), match="agree")
        if dtype != FULL:
            refuses(ops.npu_add_rms_norm, a.npu(), b.npu(), gamma.float().npu(), match="supported")
            wide, narrow, _, again = ops.npu_add_rms_norm_cast(a.npu(), b.npu(), gamma.npu())
            assert wide.dtype == FULL
            assert torch.equal(narrow, y)
            assert torch.equal(wide, y.float())
            assert torch.equal(again, total)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layer_norms(self, ops, dtype):
        x, gx, w, b = (torch.randn(s, dtype=dtype) for s in ((2, 3, 32),) * 2 + ((32,),) * 2)
        there = [t.npu() for t in (x, gx, w, b)]
        expected = oracle.layer(x, 1e-5) * w.double() + b.double()
        close(ops.npu_layer_norm_eval(there[0], [32], there[2], there[3]), expected, dtype)
        close(ops.npu_layer_norm_eval(there[0], [32]), oracle.layer(x, 1e-5), dtype)
        y, mean, rstd, total = ops.npu_add_layer_norm(*there, 1e-5, True)
        added = x.double() + gx.double()
        close(y, oracle.layer(added, 1e-5) * w.double() + b.double(), dtype)
        close(total, added, dtype)
        assert mean.shape == rstd.shape == (2, 3, 1)
        assert mean.dtype == rstd.dtype == FULL
        assert ops.npu_add_layer_norm(*there)[3].isnan().all()
        mean, rstd, y = ops.npu_deep_norm(there[0], there[1], there[3], there[2], 0.5, 1e-5)
        mixed = 0.5 * x.double() + gx.double()
        close(y, oracle.layer(mixed, 1e-5) * w.double() + b.double(), dtype)
        close(mean, mixed.mean(-1, keepdim=True), FULL)
        refuses(ops.npu_layer_norm_eval, there[0], [16], match="normalized_shape")
        refuses(ops.npu_layer_norm_eval, there[0], [32], there[2][:4], match="weight")
        refuses(ops.npu_deep_norm, there[0], there[1][:1], there[3], there[2], match="one shape")
        refuses(ops.npu_add_layer_norm, *there[:3], there[3][:4], match="beta")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_group_norms(self, ops, dtype):
        x, w, b = (torch.randn(s, dtype=dtype) for s in ((2, 6, 4, 4), (6,), (6,)))
        normal = oracle.layer(x.reshape(2, 3, -1), 1e-5).reshape(x.shape)
        normal = normal * w.double()[:, None, None] + b.double()[:, None, None]
        y, mean, rstd = ops.npu_group_norm_silu(x.npu(), w.npu(), b.npu(), 3)
        close(y, normal * torch.sigmoid(normal), dtype)
        assert mean.shape == rstd.shape == (2, 3)
        y, *_ = ops.npu_group_norm_swish(x.npu(), 3, w.npu(), b.npu(), swish_scale=0.7)
        close(y, normal * torch.sigmoid(0.7 * normal), dtype)
        refuses(ops.npu_group_norm_silu, x.npu(), w.npu(), b.npu(), 4, match="multiple")
        refuses(ops.npu_group_norm_silu, x.npu(), w[:3].npu(), b.npu(), 3, match="weight")

    def test_gradient(self, ops):
        x, gamma, weight = torch.randn(4, 32), torch.randn(32), torch.randn(4, 32)
        here = [t.clone().requires_grad_() for t in (x, gamma)]
        normal = here[0] * (here[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        (normal * here[1] * weight).sum().backward()
        there = [t.npu().requires_grad_() for t in (x, gamma)]
        (ops.npu_rms_norm(*there)[0] * weight.npu()).sum().backward()
        for one, other in zip(there, here, strict=True):
            torch.testing.assert_close(one.grad.cpu(), other.grad, atol=1e-5, rtol=1e-5)


ACTIVATIONS = {
    "npu_fast_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "fast_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "npu_gelu": oracle.gelu,
    "npu_silu": lambda x: x * torch.sigmoid(x),
    "npu_mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "npu_swiglu": lambda x: x[..., :8] * torch.sigmoid(x[..., :8]) * x[..., 8:],
    "npu_gelu_mul": lambda x: oracle.gelu(x[..., :8]) * x[..., 8:],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(ops, name, dtype):
    x = torch.randn(4, 16, dtype=dtype)
    op = getattr(torch.ops.npu, name)
    close(op(x.npu()), ACTIVATIONS[name](x.double()), dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        op(x.double().npu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_gelu(ops, dtype):
    x = torch.randn(4, 16, dtype=dtype)
    left, right = x.double().chunk(2, -1)
    there = x.npu()
    close(ops.npu_gelu(there, approximate="tanh"), oracle.gelu_tanh(x.double()), dtype)
    tanh = ops.npu_gelu_mul(there, approximate="tanh")
    close(tanh, oracle.gelu_tanh(left) * right, dtype)
    out, gelu = ops.npu_geglu(there)
    close(out, left * oracle.gelu_tanh(right), dtype)
    close(gelu, oracle.gelu_tanh(right), dtype)
    close(ops.npu_geglu(there, -1, 0, True)[0], right * oracle.gelu(left), dtype)
    refuses(ops.npu_gelu, there, approximate="fast", match="approximate")
    refuses(ops.npu_gelu_mul, there, approximate="fast", match="approximate")
    refuses(ops.npu_geglu, there, -1, 2, match="approximate")


GRADIENTS = {
    "npu_fast_gelu": (lambda op, x: op(x), ACTIVATIONS["npu_fast_gelu"]),
    "npu_gelu": (lambda op, x: op(x), oracle.gelu),
    "npu_silu": (lambda op, x: op(x), ACTIVATIONS["npu_silu"]),
    "npu_mish": (lambda op, x: op(x), ACTIVATIONS["npu_mish"]),
    "npu_swiglu": (lambda op, x: op(x), ACTIVATIONS["npu_swiglu"]),
    "npu_geglu": (
        lambda op, x: op(x)[0],
        lambda x: x[..., :8] * oracle.gelu_tanh(x[..., 8:]),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_activations(ops, name):
    call, formula = GRADIENTS[name]
    x, weight = torch.randn(4, 16), torch.randn(4, 16)
    here, there = x.double().requires_grad_(), x.npu().requires_grad_()
    expected = formula(here)
    weight = weight[:, : expected.shape[1]]
    (expected * weight).sum().backward()
    (call(getattr(torch.ops.npu, name), there) * weight.npu()).sum().backward()
    torch.testing.assert_close(there.grad.cpu().double(), here.grad, atol=1e-5, rtol=1e-5)


def test_limits_of_activations(ops):
    x = torch.zeros(4, 15, device="npu")
    for name in ("npu_swiglu", "npu_gelu_mul", "npu_geglu"):
        refuses(getattr(ops, name), x, match="even")
    refuses(ops.npu_gelu_mul, torch.zeros(2, 1026, device="npu"), match="1024")
    refuses(ops.npu_swiglu, torch.zeros(16, 4, device="npu").t(), match="contiguous")


@pytest.mark.parametrize("triangle", [False, True])
def test_scaled_masked_softmax(ops, triangle):
    x, mask = torch.randn(2, 3, 32, 64), torch.rand(2, 1, 32, 64) < 0.3
    got = ops.npu_scaled_masked_softmax(x.npu(), mask.npu(), 0.5, triangle)
    out = torch.ones(32, 64).triu(1).bool() if triangle else mask
    close(got, (x.double() * 0.5).masked_fill(out, -10000).softmax(-1), FULL)
    call = ops.npu_scaled_masked_softmax
    refuses(call, x[..., :31, :].npu(), mask[..., :31, :].npu(), match="32")
    refuses(call, x[..., :48].npu(), mask[..., :48].npu(), match="32")
    refuses(call, x.npu(), mask.half().npu(), match="dtype")
    refuses(call, x.npu(), mask[:, :, :, :32].npu(), match="does not go")


def test_casts(ops):
    x = torch.randn(3, 4)
    there = x.npu()
    assert torch.equal(ops.npu_dtype_cast(there, H).cpu(), x.half())
    grad = torch.zeros(3, 4, device="npu").requires_grad_()
    ops.npu_dtype_cast(grad, H).sum().backward()
    assert grad.grad.dtype == FULL
    assert torch.equal(ops.npu_format_cast(there, 2), there)
    nz = ops.npu_format_cast(there, 29)
    assert torch.equal(nz, there)
    assert nz.data_ptr() != there.data_ptr()
    conv = torch.nn.Conv2d(3, 4, 3).npu()
    assert conv(torch.zeros(1, 3, 8, 8, device="npu")).shape == (1, 4, 6, 6)


def test_inputs_on_the_host_are_refused(ops):
    x = torch.ones(2, 32, device="npu")
    with pytest.raises(RuntimeError, match="same device"):
        ops.npu_rms_norm(x, torch.ones(32))
    with pytest.raises(NotImplementedError, match="npu_rms_norm"):
        ops.npu_rms_norm(x.cpu(), torch.ones(32))
