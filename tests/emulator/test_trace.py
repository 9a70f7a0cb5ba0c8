"""What a trace counts: the launches of single calls, lines, bytes, casts, copies, squares."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from mindiesd.emulator import record, trace

FUSED = "npu::npu_fusion_attention_v3"


def count(call):
    with trace() as counted:
        call()
    return counted


@pytest.fixture(scope="module")
def q(npu):
    return torch.randn(2, 4, 16, 32, device=npu, dtype=torch.float16)


def launches(call):
    return dict(count(call).launches)


def test_sdpa_is_one_kernel(q):
    k = q[:, :2].contiguous()
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert launches(lambda: F.scaled_dot_product_attention(q, q, q)) == {FUSED: 1}
    assert launches(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)) == {FUSED: 1}
    assert launches(lambda: F.scaled_dot_product_attention(*[transposed] * 3)) == {FUSED: 1}


@pytest.mark.parametrize("shape", [(16, 16), (2, 1, 1, 16), (2, 4, 16, 16)])
def test_sdpa_with_a_bool_mask(q, shape):
    mask = torch.ones(shape, dtype=torch.bool, device="npu")
    assert launches(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask)) == {
        "aten::logical_not": 1,
        FUSED: 1,
    }


def test_causal_sdpa_makes_a_mask_every_time(q):
    counted = count(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert counted.launches.total() == 3
    assert counted.launches[FUSED] == 1
    assert {name.split("::")[1].split(".")[0] for name in counted.launches} >= {"triu"}
    assert counted.squares.total() == 2
    assert counted.square_bytes == 2 * 2048 * 2048


# What aten::_safe_softmax does after the softmax.
SAFE = {"isneginf": 1, "all": 1, "fill_": 1, "where": 1}


def without_casts(counted):
    return {
        name.split("::")[1].split(".")[0]: number
        for name, number in counted.launches.items()
        if name != "aten::_to_copy"
    }


def test_sdpa_with_a_float_mask_materialises_the_scores(q):
    mask = torch.zeros(2, 1, 16, 16, device="npu", dtype=torch.float16)
    counted = count(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    pieces = {"mul": 2, "matmul": 2, "softmax": 1, **SAFE}
    assert without_casts(counted) == {**pieces, "add_": 1}
    assert dict(counted.squares) == {
        "aten::matmul": 1,
        "aten::add_.Tensor": 1,
        "aten::softmax.int": 1,
        "aten::isneginf.out": 1,
        "aten::where.self_out": 1,
        "aten::_to_copy": 1,
    }
    assert counted.square_bytes == 2 * 4 * 16 * 16 * (4 * 4 + 1 + 2)
    flat = q.float()[0]
    counted = count(lambda: F.scaled_dot_product_attention(flat, flat, flat))
    assert without_casts(counted) == pieces
    odd = q.float()[..., :30]
    assert FUSED not in launches(lambda: F.scaled_dot_product_attention(odd, odd, odd))
    even = q.float().contiguous()
    assert launches(lambda: F.scaled_dot_product_attention(even, even, even)) == {FUSED: 1}


def test_norms(q):
    import diffusers.models.normalization as norms

    x = q.float()
    ours = torch.nn.RMSNorm(32, eps=1e-6).npu()
    assert count(lambda: ours(x)).total == 6
    with_weight = norms.RMSNorm(32, eps=1e-6).npu()
    assert launches(lambda: with_weight(x)) == {"npu::npu_rms_norm": 1}
    layer = torch.nn.LayerNorm(32).npu()
    assert launches(lambda: layer(x)) == {"aten::native_layer_norm": 1}


def test_views_and_allocations_are_no_launches(q):
    def call():
        view = q.transpose(1, 2).reshape(2, 64, 32)[:, ::2].unsqueeze(0)
        torch.empty_like(view)
        torch.empty(4, device="npu")
        q.view(-1).split(32)
        q.expand(3, 2, 4, 16, 32)
        q.detach().to("npu")

    counted = count(call)
    assert dict(counted.launches) == {"aten::clone": 1}  # reshape of a transposed tensor


def test_bytes_casts_and_transfers():
    x = torch.zeros(8, 4, device="npu")
    counted = count(lambda: x.half())
    assert dict(counted.casts) == {"float32 -> float16": 1}
    assert (counted.bytes_read, counted.bytes_written) == (128, 64)
    counted = count(lambda: (x + x).sum().item())
    assert dict(counted.launches) == {"aten::add.Tensor": 1, "aten::sum": 1}
    assert counted.bytes_read == 3 * 128
    assert counted.bytes_written == 128 + 4
    assert dict(counted.transfers) == {"item": 1}
    counted = count(lambda: (x.cpu(), torch.ones(8).to("npu"), x.to("cpu", torch.float64)))
    assert dict(counted.transfers) == {"device -> host": 2, "host -> device": 1}
    assert counted.transfer_bytes == 128 + 32 + 256
    assert dict(counted.casts) == {"float32 -> float64": 1}
    assert count(lambda: x[:0] + 1).total == 0


def test_layout_copies(q):
    import torch_npu

    memory = q.transpose(1, 2).contiguous()  # [B, S, N, D]
    view = memory.transpose(1, 2)
    counted = count(lambda: F.scaled_dot_product_attention(view, view, q))
    assert dict(counted.layout_copies) == {f"{FUSED}(query)": 1, f"{FUSED}(key)": 1}
    assert counted.layout_copy_bytes == 2 * 2 * 2 * q.numel()
    counted = count(lambda: torch_npu.npu_fusion_attention(*[memory] * 3, 4, "BSND"))
    assert not counted.layout_copies
    fused = torch.zeros(2, 16, 3, 4, 32, device="npu", dtype=torch.float16)
    counted = count(lambda: torch_npu.npu_fusion_attention(*fused.unbind(2), 4, "BSND"))
    assert counted.layout_copies.total() == 3


def test_lines():
    x = torch.zeros(8, device="npu")
    with trace() as counted:
        x + 1
        line = sys._getframe().f_lineno - 1
        F.silu(x)
    sites = counted.sites
    assert sites[f"{__file__}:{line}"] == {"aten::add.Tensor": 1}
    assert sites[f"{__file__}:{line + 2}"] == {"aten::silu": 1}


def test_lines_of_backward():
    x = torch.zeros(8, device="npu", requires_grad=True)
    y = F.silu(x).sum()
    counted = count(y.backward)
    assert counted.launches["aten::silu_backward"] == 1


def test_reports(q):
    counted = count(
        lambda: F.scaled_dot_product_attention(q.transpose(1, 2), q.mT.mT, q, is_causal=True)
    )
    data = json.loads(json.dumps(counted.to_dict()))
    assert data["total_launches"] == counted.total == sum(data["launches"].values())
    assert sum(sum(line.values()) for line in data["sites"].values()) == counted.total
    text = str(counted)
    assert f"{counted.total} launches" in text
    assert FUSED in text
    assert "no clock" in text


def test_nested_and_off():
    x = torch.zeros(8, device="npu")
    with trace() as outer:
        x + 1
        with trace() as inner:
            x + 1
        assert record.active
    x + 1
    assert (outer.total, inner.total) == (2, 1)
    assert not record.active


def test_the_module_is_the_function_too():
    import mindiesd.emulator.trace as module

    with module() as counted:
        torch.zeros(8, device="npu")
    assert counted.total == 1
