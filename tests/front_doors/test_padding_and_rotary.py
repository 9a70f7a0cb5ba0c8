"""flash_attn.bert_padding and flash_attn.layers.rotary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd import ParametersInvalid
from mindiesd.patches.front_doors import bert_padding, rotary
from tests import oracles


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_unpad_and_pad(batch, length, as_bool, unused, data) -> None:
    # At least one token: upstream, too, has no largest length without.
    lengths = [data.draw(st.integers(1 if b == 0 else 0, length)) for b in range(batch)]
    mask = torch.tensor([[s < n for s in range(length)] for n in lengths])
    spare = None
    if unused:
        spare = torch.tensor([[s == n for s in range(length)] for n in lengths])
    every = mask if spare is None else mask | spare
    x = torch.randn(batch, length, 2, 3)
    masks = [m if m is None or as_bool else m.int() for m in (mask, spare)]
    tokens, indices, starts, longest, used = bert_padding.unpad_input(x, *masks)
    assert torch.equal(tokens, torch.stack([x[b, s] for b, s in every.nonzero().tolist()]))
    assert indices.tolist() == [b * length + s for b, s in every.nonzero().tolist()]
    counts = every.sum(1).tolist()
    assert starts.dtype is torch.int32
    assert starts.tolist() == [sum(counts[:b]) for b in range(batch + 1)]
    assert longest == max(counts) and type(longest) is int
    assert used.tolist() == lengths and used.dtype is torch.int32
    back = bert_padding.pad_input(tokens, indices, batch, length)
    assert torch.equal(back, x * every[:, :, None, None])


def test_concatenated_sequences() -> None:
    rows = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    tokens, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(x, rows)
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert starts.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6


def test_padding_is_differentiable() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])

    def there_and_back(x):
        tokens, indices, *_ = bert_padding.unpad_input(x, mask)
        return bert_padding.pad_input(tokens * tokens, indices, 3, 4)

    assert torch.autograd.gradcheck(there_and_back, (x,))
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4])
    assert torch.autograd.gradcheck(
        lambda r: bert_padding.index_first_axis_residual(r, index), (rows,)
    )
    assert torch.autograd.gradcheck(
        lambda r: bert_padding.index_put_first_axis(r, torch.tensor([7, 0, 3, 5, 1]), 9), (rows,)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["int", "tensor", "packed", "packed tensor"]),
    st.booleans(),
    st.data(),
)
def test_apply_rotary_emb(dtype, interleaved, rotated, kind, inplace, data) -> None:
    table, heads = 9, 3
    cos, sin = (torch.randn(table, rotated // 2).to(dtype) for _ in range(2))
    lengths = [data.draw(st.integers(0, 4)) for _ in range(3)]
    x = torch.randn(2, 4, heads, 8).to(dtype)
    more = {"interleaved": interleaved, "inplace": inplace}
    if kind.startswith("packed"):
        x = torch.randn(sum(lengths), heads, 8).to(dtype)
        begins = [data.draw(st.integers(0, 5)) if "tensor" in kind else 2 for _ in range(3)]
        more["seqlen_offsets"] = torch.tensor(begins) if "tensor" in kind else 2
        more["cu_seqlens"] = torch.tensor([sum(lengths[:b]) for b in range(4)], dtype=torch.int32)
        more["max_seqlen"] = 4
        steps = [at + s for at, n in zip(begins, lengths, strict=True) for s in range(n)]
        want = oracles.rotary_half_tables(x[None], cos, sin, [steps], interleaved)[0]
    else:
        begins = [data.draw(st.integers(0, 5)) for _ in range(2)] if kind == "tensor" else [3, 3]
        more["seqlen_offsets"] = torch.tensor(begins) if kind == "tensor" else 3
        steps = [[at + s for s in range(4)] for at in begins]
        want = oracles.rotary_half_tables(x, cos, sin, steps, interleaved)
    given_ = x.clone()
    out = rotary.apply_rotary_emb(given_, cos, sin, **more)
    assert out.dtype is dtype
    oracles.assert_close(out, want)
    assert (out is given_) is inplace
    if not inplace:
        assert torch.equal(given_, x)


def test_rotary_in_packed_tensors() -> None:
    cos, sin, cos_k, sin_k = (torch.randn(6, 2) for _ in range(4))
    steps = [list(range(1, 6))] * 2

    def want(x, cos, sin):
        return oracles.rotary_half_tables(x, cos, sin, steps, False)

    qkv = torch.randn(2, 5, 3, 4, 8)
    kept = qkv.clone()
    out = rotary.apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, seqlen_offsets=1)
    assert out is qkv
    oracles.assert_close(out[:, :, 0], want(kept[:, :, 0], cos, sin))
    oracles.assert_close(out[:, :, 1], want(kept[:, :, 1], cos_k, sin_k))
    assert torch.equal(out[:, :, 2], kept[:, :, 2])

    qkv = torch.randn(2, 5, 8, 8)  # 4 query heads, 2 key heads
    kept = qkv.clone()
    rotary.apply_rotary_emb_qkv_(qkv, cos, sin, seqlen_offsets=1, num_heads_q=4)
    oracles.assert_close(qkv[:, :, :6], want(kept[:, :, :6], cos, sin))
    assert torch.equal(qkv[:, :, 6:], kept[:, :, 6:])

    kv = torch.randn(2, 5, 2, 4, 8)
    kept = kv.clone()
    assert rotary.apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=1) is kv
    oracles.assert_close(kv[:, :, 0], want(kept[:, :, 0], cos, sin))
    assert torch.equal(kv[:, :, 1], kept[:, :, 1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_differentiable(interleaved) -> None:
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(5, 2, dtype=torch.float64) for _ in range(2))

    def run(x):
        return rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=2)

    assert torch.autograd.gradcheck(run, (x,))

    def in_place(x):
        return rotary.apply_rotary_emb((x * 1), cos, sin, interleaved, inplace=True)

    assert torch.autograd.gradcheck(in_place, (x,))


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(scale_base, interleaved) -> None:
    embedding = rotary.RotaryEmbedding(4, interleaved=interleaved, scale_base=scale_base)
    q, kv = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 2, 3, 8)
    before = q.clone(), kv.clone()
    out_q, out_kv = embedding(q, kv, seqlen_offset=2)
    assert out_q is q and out_kv is kv
    positions = torch.arange(7, dtype=torch.float64)
    angles = positions[:, None] / 10000 ** (torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    grow = torch.ones(7, 2, dtype=torch.float64)
    if scale_base:
        base = (torch.arange(0, 4, 2, dtype=torch.float64) + 0.4 * 4) / (1.4 * 4)
        grow = base ** ((positions[:, None] - 7 // 2) / scale_base)
    steps = [[2, 3, 4, 5, 6]] * 2
    want = oracles.rotary_half_tables(
        before[0], angles.cos() * grow, angles.sin() * grow, steps, interleaved
    )
    torch.testing.assert_close(q.double(), want, rtol=1e-6, atol=1e-6)
    want = oracles.rotary_half_tables(
        before[1][:, :, 0], angles.cos() / grow, angles.sin() / grow, steps, interleaved
    )
    torch.testing.assert_close(kv[:, :, 0].double(), want, rtol=1e-6, atol=1e-6)
    # A shorter sequence, in a model cast to half precision: other tables.
    half = embedding.to(torch.bfloat16)(torch.ones(1, 3, 3, 1, 8).to(torch.bfloat16))
    assert half.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"x": torch.ones(2, 3, 4)}, "x"),
        ({"sin": torch.ones(4, 3)}, "sin"),
        ({"cos": torch.ones(9, 5), "sin": torch.ones(9, 5)}, "cos"),
        ({"seqlen_offsets": 7}, "cos"),
        ({"seqlen_offsets": -1}, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([0, 7])}, "seqlen_offsets"),
        ({"seqlen_offsets": torch.tensor([0])}, "seqlen_offsets"),
        ({"x": torch.ones(3, 2, 8), "cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ({"interleaved": 1}, "interleaved"),
    ],
)
def test_bad_arguments_are_named(wrong, argument) -> None:
    right = {"x": torch.ones(2, 3, 2, 8), "cos": torch.ones(9, 2), "sin": torch.ones(9, 2)}
    rotary.apply_rotary_emb(**right)
    with pytest.raises(ParametersInvalid) as caught:
        rotary.apply_rotary_emb(**{**right, **wrong})
    assert caught.value.argument == argument
