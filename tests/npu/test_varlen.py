"""Packed attention on the emulated device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd.emulator import trace
from mindiesd.ops.varlen import attention_forward_varlen
from tests import oracles

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check(lengths_q, lengths_k, dtype, left=-1, right=-1, dims=(16, 16), heads=(4, 2)):
    q = torch.randn(sum(lengths_q), heads[0], dims[0]).to(dtype)
    k = torch.randn(sum(lengths_k), heads[1], dims[0]).to(dtype)
    v = torch.randn(sum(lengths_k), heads[1], dims[1]).to(dtype)

    def keep(queries, keys):
        return oracles.window(queries, keys, left, right)

    expected = oracles.attention_varlen(q, k, v, lengths_q, lengths_k, keep)
    moved = [t.npu() for t in (q, k, v)]
    cu = [starts(lengths).npu() for lengths in (lengths_q, lengths_k)]
    with trace() as counted:
        out = attention_forward_varlen(*moved, *cu, window_size=(left, right))
    assert out.dtype is dtype and out.device == moved[0].device
    oracles.assert_close(out.cpu(), expected)
    return counted


LENGTHS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 5, 9]), st.sampled_from([0, 1, 3, 5])),
    min_size=1,
    max_size=4,
)


@given(
    LENGTHS,
    st.sampled_from(FLOATS),
    st.sampled_from([(-1, -1), (-1, 0), (0, 0), (2, 1), (1, -1)]),
    st.sampled_from([(16, 16), (16, 8), (8, 16), (10, 7)]),
)
def test_any_lengths(lengths, dtype, window, dims):
    if not sum(n for n, _ in lengths):
        return
    check([n for n, _ in lengths], [m for _, m in lengths], dtype, *window, dims)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
def test_one_kernel_for_all_sequences(window):
    counted = check([3, 0, 5, 1], [4, 0, 5, 7], torch.float16, *window)
    assert counted.launches["npu::npu_fusion_attention"] == 1


def test_lengths_are_read_from_the_device_once():
    q = torch.randn(8, 2, 16, device="npu", dtype=torch.float16)
    cu = starts([3, 5]).npu()
    with trace() as counted:
        for _ in range(6):
            attention_forward_varlen(q, q, q, cu, cu)
    assert sum(counted.transfers.values()) <= 1
    assert counted.launches["npu::npu_fusion_attention"] == 6
    before = attention_forward_varlen(q, q, q, cu, cu)
    cu[1] = 6
    after = attention_forward_varlen(q, q, q, cu, cu)
    assert not torch.equal(before, after)
    fresh = attention_forward_varlen(q, q, q, [0, 6, 8], [0, 6, 8])
    assert torch.equal(after, fresh)


def test_more_sequences_than_the_kernel_takes():
    lengths = [1, 2] * 513
    q = torch.randn(sum(lengths), 1, 8, device="npu", dtype=torch.float16)
    cu = starts(lengths)
    out = attention_forward_varlen(q, q, q, cu, cu)
    assert out.shape == q.shape


def test_two_hundred_and_fifty_seven_heads():
    counted = check([2, 3], [3, 2], torch.float16, heads=(257, 257))
    assert not any("fusion" in name for name in counted.launches)


def test_float64_and_softcap_go_elsewhere():
    counted = check([2, 3], [3, 2], torch.float64)
    assert not any(name.startswith("npu::npu_f") for name in counted.launches)
    q = torch.randn(5, 2, 16, device="npu", dtype=torch.float16)
    out = attention_forward_varlen(q, q, q, [0, 2, 5], [0, 2, 5], softcap=3.0)
    host = q.cpu()
    expected = oracles.attention_varlen(
        host, host, host, [2, 3], [2, 3], lambda n, m: None, softcap=3.0
    )
    oracles.assert_close(out.cpu(), expected)
