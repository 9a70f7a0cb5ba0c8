"""What reaches a kernel is what its documentation says, written down a second time.

The emulated kernels have rules of their own; here every launch of a fused operator is looked at
from outside, with the narrowest reading where sentences differ: shapes, dtypes and contiguity of
masks, biases, tables and parameters, and values of the scalars.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd.emulator import record
from mindiesd.errors import ParametersInvalid
from mindiesd.ops import attention, norm, varlen
from mindiesd.ops.dispatch import Kernel
from mindiesd.ops.rope import rotate
from tests.npu.cases import FLOATS, HALF, MEMORIES, cases, tensor

INT_MAX = 2147483647


def heads_first(tensor, layout, heads):
    """Batch, heads, length, head dimension of an argument."""
    if layout == "BNSD":
        return tuple(tensor.shape)
    if layout == "BSND":
        batch, length, count, dim = tensor.shape
        return batch, count, length, dim
    batch, length, width = tensor.shape
    assert layout == "BSH" and width % heads == 0
    return batch, heads, length, width // heads


class Strict:
    """Looks at every launch, and remembers which operators there were."""

    def __init__(self):
        self.seen = set()

    def on_copy(self, name, source, target):
        pass

    def on_launch(self, name, inputs, outputs):
        if not name.startswith("npu::"):
            return
        operator = name.removeprefix("npu::").partition(".")[0]
        schema = getattr(torch.ops.npu, operator).default._schema
        arguments = {item.name: item.default_value for item in schema.arguments}
        arguments.update(zip(arguments, inputs[0], strict=False))
        arguments.update(inputs[1])
        self.seen.add(operator)
        if operator.startswith("npu_fusion_attention"):
            self.fusion(operator, arguments)
        elif operator in ("npu_prompt_flash_attention", "npu_fused_infer_attention_score"):
            self.inference(operator, arguments)
        elif operator == "npu_rms_norm":
            x, gamma = arguments["input"], arguments["gamma"]
            assert 2 <= x.dim() <= 8 and gamma.shape == x.shape[-1:] and gamma.is_contiguous()
            assert gamma.dtype in (x.dtype, torch.float32)
        elif operator == "npu_rotary_mul":
            x, cos, sin = (arguments[key] for key in ("input", "r1", "r2"))
            assert x.dtype is cos.dtype is sin.dtype and cos.shape == sin.shape
            assert x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
            assert x.dim() == cos.dim() and x.shape[-1] == cos.shape[-1] < 896
        else:
            raise AssertionError(f"no rules for {operator}")

    def fusion(self, operator, given):
        query, key, value = given["query"], given["key"], given["value"]
        assert query.dtype is key.dtype is value.dtype and query.dtype in FLOATS
        layout, heads = given["input_layout"], given["head_num"]
        assert given["keep_prob"] == 1.0 and given["inner_precise"] in (0, 2)
        assert given["padding_mask"] is given["prefix"] is given["sink"] is None
        mask, pse, mode = given["atten_mask"], given["pse"], given["sparse_mode"]
        window = [given[key] for key in given if key.endswith(("tokens", "tockens"))]
        if layout == "TND":
            assert query.dim() == key.dim() == value.dim() == 3 and operator[-3:] != "_v3"
            for ends, packed in (("actual_seq_qlen", query), ("actual_seq_kvlen", key)):
                assert all(type(end) is int for end in given[ends]) and given[ends][0] > 0
                assert sorted(given[ends]) == list(given[ends]) and given[ends][-1] == len(packed)
            assert pse is None and mode in (0, 3, 4)
            queries = keys = None
        else:
            assert given["actual_seq_qlen"] is None and given["actual_seq_kvlen"] is None
            assert operator != "npu_fusion_attention_v3" or layout == "BNSD"
            batch, count, queries, dim = heads_first(query, layout, heads)
            assert count == heads
            # Of BSH, only dim tells the number of heads.
            kv_heads = key.shape[-1] // dim if layout == "BSH" else heads
            found, kv_heads, keys, key_dim = heads_first(key, layout, kv_heads)
            value_dim = heads_first(value, layout, kv_heads)[-1]
            assert heads % kv_heads == 0 and key_dim == dim >= value_dim and found == batch
            assert dim <= 512 and (query.dtype is not torch.float32 or dim % 4 == 0)
            assert layout == "BSH" or key.shape[:-1] == value.shape[:-1]
        if mode in (2, 3, 4):
            assert mask.shape == (2048, 2048) and mask.dtype is torch.bool
            assert torch.equal(mask.cpu(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
            assert pse is None and all(0 <= side <= INT_MAX for side in window)
            return
        assert mode == 0 and window == [INT_MAX, INT_MAX]
        if mask is not None:
            shapes = [(batch, heads), (batch, 1), (1, 1)]
            assert mask.shape in [(*shape, queries, keys) for shape in shapes]
            assert mask.dtype is torch.bool and mask.is_contiguous()
            assert given["inner_precise"] == 2
        if pse is not None:
            assert pse.dtype is query.dtype and pse.is_contiguous()
            assert not pse.isinf().any()
            shapes = [(batch, heads, queries), (1, heads, queries), (batch, heads, 1)]
            assert pse.shape in [(*shape, keys) for shape in shapes]
            assert given.get("pse_type", 1) == 0 or given["scale"] == 1.0

    def inference(self, operator, given):
        query, key, value = given["query"], given["key"], given["value"]
        assert query.dtype is key.dtype is value.dtype and query.dtype in HALF
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        layout, heads = given["input_layout"], given["num_heads"]
        batch, _, queries, dim = heads_first(query, layout, heads)
        kv_heads = given["num_key_value_heads"] or heads
        _, found, keys, key_dim = heads_first(key, layout, kv_heads)
        assert found == kv_heads and heads % kv_heads == 0 and heads // kv_heads <= 64
        assert dim == key_dim and key.shape == value.shape and dim <= 512
        fia = operator == "npu_fused_infer_attention_score"
        mode = given["sparse_mode"]
        if fia:
            assert dim % 16 == 0 and given["inner_precise"] in (0, 2) and mode in (0, 2, 3, 4)
        else:
            assert mode in (0, 2, 3, 4, 10, 12, 13, 14) and given["pse_shift"] is None
            mode %= 10
            assert layout == "BNSD" or heads * dim < 65535
        mask, pse = given["atten_mask"], given["pse_shift"]
        if mode:
            assert mask.shape == (2048, 2048) and mask.dtype is torch.bool and queries > 1
        elif mask is not None:
            assert mask.shape in [(batch, 1, queries, keys), (1, 1, queries, keys)]
            assert mask.dtype is torch.bool and mask.is_contiguous()
            assert not fia or queries > 1
            assert fia or not mask.all(-1).any()
        if pse is not None:
            assert pse.dtype is query.dtype and pse.is_contiguous() and not pse.isinf().any()
            assert pse.shape in [(batch, heads, queries, keys), (1, heads, queries, keys)]


@pytest.fixture(scope="module")
def strict():
    watching = Strict()
    record.add(watching)
    yield watching
    record.remove(watching)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_attention(strict, case):
    case.check(case.attend())


@settings(max_examples=40, deadline=None)
@given(case=cases(dtypes=HALF, dims=(8, 40, 64)), data=st.data())
def test_attention_by_name(strict, case, data):
    operator = data.draw(st.sampled_from(["prompt_flash_attn", "fused_attn_score"]))
    layout = data.draw(st.sampled_from(["BNSD", "BSND", "BSH"]))
    try:
        out = case.attend(Kernel(operator, layout))
    except ParametersInvalid:
        return
    case.check(out)


@settings(max_examples=40, deadline=None)
@given(case=cases(dtypes=HALF, dims=(8, 64)))
def test_the_inference_kernel(strict, case):
    from mindiesd.ops.backends.npu import infer
    from mindiesd.ops.backends.npu.call import describe

    given_mask = case.parts()
    call = describe(*case[:3], given_mask, case.scale, case.head_first)
    if infer.refusal(call) is None:
        case.check(infer.launch(call, call.layout, *case[:3], given_mask))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed(strict, data):
    dtype = data.draw(st.sampled_from(FLOATS))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
    starts = [[0], [0]]
    for pair in lengths:
        for side, length in zip(starts, pair, strict=True):
            side.append(side[-1] + length)
    dim, kv_heads = data.draw(st.sampled_from([5, 8, 16])), data.draw(st.integers(1, 2))
    q = torch.randn(starts[0][-1], kv_heads * 2, dim).to(dtype).npu()
    k, v = (torch.randn(starts[1][-1], kv_heads, dim).to(dtype).npu() for _ in range(2))
    window = (data.draw(st.integers(-1, 3)), data.draw(st.integers(-1, 3)))
    out = varlen.attention_forward_varlen(
        q, k, v, *starts, causal=data.draw(st.booleans()), window_size=window
    )
    assert out.shape == q.shape and out.dtype is dtype


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_norms_and_rotation(strict, data):
    dtype, memory = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(MEMORIES))
    x = tensor((2, 3, 5, 16), dtype, memory)
    weight = torch.randn(16, 2).npu()[:, 0]
    norm.rms_norm(x, weight.to(data.draw(st.sampled_from(FLOATS))), 1e-6)
    tables = torch.rand(2, 5, 16).to(data.draw(st.sampled_from(FLOATS))).npu()
    rotate(x, *tables, data.draw(st.booleans()))
    attention.attend(x, x, x)


def test_every_operator_is_seen(strict):
    # The tests above run here again: they may have run in another process.
    for drawn in (
        test_attention,
        test_attention_by_name,
        test_the_inference_kernel,
        test_packed,
        test_norms_and_rotation,
    ):
        drawn(strict=strict)
    assert strict.seen == {
        "npu_fused_infer_attention_score",
        "npu_fusion_attention",
        "npu_fusion_attention_v2",
        "npu_prompt_flash_attention",
        "npu_rms_norm",
        "npu_rotary_mul",
    }
