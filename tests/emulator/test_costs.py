"""FLOPs and bytes of single launches against closed formulas."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd.emulator.outline import outline, withhold

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

import _costs

HALF = torch.float16
sizes = st.integers(1, 2048)
few = settings(max_examples=25, deadline=None)


def unknown(*shape, dtype=HALF):
    return withhold(torch.empty(shape, dtype=dtype, device="npu"))


def cost(call):
    with torch.no_grad(), outline(), _costs.costing() as counted:
        call()
    return counted


@few
@given(st.integers(1, 4), sizes, sizes, sizes, st.booleans())
def test_matrix_products(batch, rows, inner, columns, bias):
    flops = 2 * batch * rows * inner * columns
    a, b = unknown(batch, rows, inner), unknown(batch, inner, columns)
    assert cost(lambda: a @ b).flops == flops
    assert cost(lambda: torch.bmm(a, b)).flops == flops
    assert cost(lambda: a[0] @ b[0]).flops == flops // batch
    weight = unknown(columns, inner)
    counted = cost(lambda: F.linear(a, weight, unknown(columns) if bias else None))
    assert counted.flops == flops
    added = torch.addmm
    assert cost(lambda: added(unknown(columns), a[0], b[0])).flops == flops // batch


@few
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 4),
    sizes,
    sizes,
    st.sampled_from([16, 64, 128]),
    st.sampled_from(["BNSD", "BSND", "BSH", "SBH"]),
)
def test_attention(batch, kv_heads, group, rows, columns, dim, layout):
    import torch_npu

    heads = kv_heads * group

    def tensor(number, length):
        shape = {
            "BNSD": (batch, number, length, dim),
            "BSND": (batch, length, number, dim),
            "BSH": (batch, length, number * dim),
            "SBH": (length, batch, number * dim),
        }[layout]
        return unknown(*shape)

    q, k, v = tensor(heads, rows), tensor(kv_heads, columns), tensor(kv_heads, columns)
    counted = cost(lambda: torch_npu.npu_fusion_attention(q, k, v, heads, layout))
    assert counted.flops == 4 * batch * heads * rows * columns * dim
    if layout in ("BSH", "BNSD", "BSND") and rows > 1:
        counted = cost(
            lambda: torch_npu.npu_fused_infer_attention_score(
                q,
                k,
                v,
                num_heads=heads,
                num_key_value_heads=kv_heads,
                input_layout=layout,
            )
        )
        assert counted.flops == 4 * batch * heads * rows * columns * dim


def test_packed_attention_counts_each_sequence():
    import torch_npu

    q = unknown(30, 2, 64)
    counted = cost(
        lambda: torch_npu.npu_fusion_attention(
            q, q, q, 2, "TND", actual_seq_qlen=[10, 30], actual_seq_kvlen=[10, 30]
        )
    )
    assert counted.flops == 4 * 2 * 64 * (10 * 10 + 20 * 20)


def test_sdpa_is_counted_whatever_it_becomes():
    q = unknown(2, 4, 256, 64)
    mask = unknown(2, 1, 256, 256)
    flops = 4 * 2 * 4 * 256 * 256 * 64
    assert cost(lambda: F.scaled_dot_product_attention(q, q, q)).flops == flops
    # In pieces: the same products.
    assert cost(lambda: F.scaled_dot_product_attention(q, q, q, mask)).flops == flops


@few
@given(st.integers(1, 2), st.integers(1, 64), st.integers(1, 64), st.sampled_from([1, 3]))
def test_convolutions(batch, taken, given_, size):
    x, weight = unknown(batch, taken, 32, 24), unknown(given_, taken, size, size)
    counted = cost(lambda: F.conv2d(x, weight, padding=size // 2))
    assert counted.flops == 2 * batch * given_ * taken * size * size * 32 * 24
    back = cost(lambda: F.conv_transpose2d(x, weight.transpose(0, 1).contiguous()))
    assert back.flops == 2 * batch * given_ * taken * size * size * 32 * 24
    video = unknown(batch, taken, 4, 8, 8)
    patches = cost(lambda: F.conv3d(video, unknown(given_, taken, 1, 2, 2), stride=(1, 2, 2)))
    assert patches.flops == 2 * batch * given_ * taken * 4 * (4 * 4 * 4)


def test_bytes_are_those_of_arguments_and_results():
    x, y = unknown(100, 100), unknown(100, 100)
    counted = cost(lambda: x + y)
    (launch,) = counted.each
    assert (launch.flops, launch.bytes, launch.hidden) == (0, 3 * 100 * 100 * 2, 0)
    assert launch.written == 100 * 100 * 2
    assert counted.bytes == counted.bytes_read + counted.bytes_written


def test_the_time_of_a_launch_is_the_longer_of_the_two():
    device = _costs.Device("x", flops=1e12, bandwidth=1e9, memory=1e9, single=4)
    square = unknown(1000, 1000)
    (product,) = cost(lambda: square @ square).each
    assert product.seconds(device) == pytest.approx(max(2e9 / 1e12, 6e6 / 1e9))
    wide = unknown(1000, 1000, dtype=torch.float32)
    fast = _costs.Device("x", flops=1e9, bandwidth=1e15, memory=1e9, single=4)
    counted = cost(lambda: wide @ wide)
    assert counted.seconds(fast) == pytest.approx(4 * 2e9 / 1e9)
    assert counted.seconds(fast, 5e-6) == pytest.approx(4 * 2e9 / 1e9 + 5e-6)


def test_hidden_copies_take_time_too():
    import torch_npu

    device = _costs.Device("x", flops=1e15, bandwidth=1e9, memory=1e9, single=4)
    q = unknown(1, 64, 2, 64).transpose(1, 2)
    counted = cost(lambda: torch_npu.npu_fusion_attention(q, q, q, 2, "BNSD"))
    (launch,) = counted.each
    assert launch.hidden == 3 * 2 * q.numel() * 2
    kinds = counted.by_kind(device)
    assert kinds["copies"] == pytest.approx(launch.hidden / 1e9)
    assert sum(kinds.values()) == pytest.approx(counted.seconds(device))


def test_every_kind_has_operators():
    for name, kind in {
        "npu::npu_fusion_attention_v3": "attention",
        "npu::npu_rms_norm": "norm",
        "npu::npu_rotary_mul": "rope",
        "aten::native_layer_norm": "norm",
        "aten::convolution_overrideable": "convolution",
        "aten::addmm.out": "matmul",
        "aten::_softmax": "softmax",
        "aten::gelu": "activation",
        "aten::_to_copy": "copies",
        "aten::mul.Tensor": "elementwise",
        "aten::addcmul": "elementwise",
    }.items():
        assert _costs.kind_of(name) == kind


def test_an_operator_without_a_formula_is_an_error():
    with pytest.raises(NotImplementedError, match="no formula"):
        _costs.flops_of("aten::linear_of_the_future", ((), {}), torch.empty(0))
