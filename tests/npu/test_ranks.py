"""SDPA calls that are not 4-D reach a kernel on the NPU, and stay what they are elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mindiesd
from mindiesd.emulator import trace
from tests import oracles


@pytest.fixture
def patched():
    migration = mindiesd.patch_all(only="sdpa")
    yield migration
    mindiesd.unpatch_all()


def expected(query, key, value, mask, causal):
    """In float64, with as many dimensions as given."""
    scores = query.double() @ key.double().transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ value.double()


@pytest.mark.usefixtures("patched")
@given(st.data())
def test_other_ranks_reach_a_kernel(data):
    rank = data.draw(st.sampled_from([3, 5, 6]))
    leading = [data.draw(st.integers(1, 3)) for _ in range(rank - 2)]
    queries, keys, dim = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)), 8
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    query = torch.randn(*leading, queries, dim).to(dtype)
    key, value = (torch.randn(*leading, keys, dim).to(dtype) for _ in range(2))
    kind = data.draw(st.sampled_from(["none", "causal", "bool", "bias"]))
    mask = None
    if kind in ("bool", "bias"):
        before = data.draw(st.integers(0, 1))
        heads = [data.draw(st.sampled_from([1, leading[-1]]))] * before
        mask = torch.randn(*heads, queries, keys)
        mask = mask > -0.5 if kind == "bool" else mask.to(dtype)
    there = None if mask is None else mask.npu()
    with trace() as counted:
        out = F.scaled_dot_product_attention(
            query.npu(), key.npu(), value.npu(), there, is_causal=kind == "causal"
        )
    assert out.dtype is dtype and out.shape == query.shape
    assert any(name.startswith("npu::npu_fusion") for name in counted.launches)
    reference = expected(query, key, value, mask, kind == "causal")
    oracles.assert_close(out.cpu(), reference, 1e-6)


@pytest.mark.parametrize(
    ("shape", "mask", "options"),
    [
        ((2, 3, 2, 4, 8), (2, 3, 2, 4, 4), {}),
        ((2, 4, 8), None, {"enable_gqa": True}),
        ((2, 4, 8), (4, 4), {"is_causal": True}),
    ],
)
def test_the_rest_goes_to_the_original(patched, shape, mask, options):
    tensors = [torch.randn(shape).npu() for _ in range(3)]
    given_mask = None if mask is None else torch.randn(mask).npu()

    def call():
        return F.scaled_dot_product_attention(*tensors, given_mask, **options)

    try:
        out = call()
    except RuntimeError as error:
        mindiesd.unpatch_all()
        with pytest.raises(RuntimeError, match=str(error).splitlines()[0][:30]):
            call()
        return
    (found,) = patched.report().patches
    assert found.redirected == 0 and sum(found.fell_back.values()) == 1
    mindiesd.unpatch_all()
    assert torch.equal(out.cpu(), call().cpu())


def test_gradients_go_to_the_original(patched):
    query = torch.randn(2, 4, 8).npu().requires_grad_()
    assert F.scaled_dot_product_attention(query, query, query).requires_grad
    (found,) = patched.report().patches
    assert found.redirected == 0 and found.fell_back == {"needs gradients": 1}
