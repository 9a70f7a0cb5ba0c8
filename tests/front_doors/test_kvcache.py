"""flash_attn_with_kvcache against a reference that handles one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindiesd import ParametersInvalid
from mindiesd.patches.front_doors import flash_attn as fa
from tests import oracles

CAPACITY, DIM = 12, 8


def rotate(x, cos, sin, begin, interleaved, standing=False):
    steps = [begin if standing else begin + s for s in range(x.shape[0])]
    return oracles.rotary_half_tables(x[None], cos, sin, [steps], interleaved)[0].to(x.dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_against_one_sequence_at_a_time(data) -> None:
    draw = data.draw
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    new = draw(st.sampled_from([0, 1, 3]))
    paged, rows = draw(st.booleans()), batch + 2
    shared = draw(st.booleans())
    lengths = [draw(st.integers(0, CAPACITY - new)) for _ in range(batch)]
    if shared:
        lengths = lengths[:1] * batch
    causal = draw(st.booleans())
    window = draw(st.sampled_from([(-1, -1), (2, 1), (3, -1)]))
    softcap = draw(st.sampled_from([0.0, 2.0]))
    interleaved = draw(st.booleans())
    slopes = torch.rand(kv_heads * groups) if draw(st.booleans()) else None
    cos, sin = torch.randn(CAPACITY + 4, 3), torch.randn(CAPACITY + 4, 3)
    rotary = new > 0 and draw(st.booleans())

    q = torch.randn(batch, queries, kv_heads * groups, DIM)
    k_new, v_new = (torch.randn(batch, new, kv_heads, DIM) for _ in range(2))
    more = {}
    if paged:
        page, blocks = 4, CAPACITY // 4
        numbers = torch.randperm(batch * blocks + 2)[: batch * blocks].view(batch, blocks)
        shape = (batch * blocks + 2, page)
        more["block_table"] = numbers.int()
    else:
        shape = (rows, CAPACITY)
        where = list(range(batch))
        if draw(st.booleans()):
            where = draw(st.permutations(range(rows)))[:batch]
            more["cache_batch_idx"] = torch.tensor(where, dtype=torch.int32)
        if draw(st.booleans()):
            pads = [draw(st.integers(0, length)) for length in lengths]
            more["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    caches = [torch.full((*shape, kv_heads, DIM), float("nan")) for _ in range(2)]

    def line(cache, b):
        """The row of one sequence, as a list of views of single tokens."""
        if paged:
            return [cache[number, at] for number in numbers[b].tolist() for at in range(page)]
        return list(cache[where[b]])

    for cache in caches:  # only what is occupied is filled; the rest stays NaN
        for b in range(batch):
            for token in line(cache, b)[: lengths[b]]:
                token.normal_()
    before = [cache.clone() for cache in caches]
    if new:
        more |= {"k": k_new, "v": v_new}
    if rotary:
        more |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    seqlens = lengths[0] if shared else torch.tensor(lengths, dtype=torch.int32)
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=seqlens, causal=causal, window_size=window, softcap=softcap,
        alibi_slopes=slopes, return_softmax_lse=True, **more,
    )  # fmt: skip
    assert not out.isnan().any()
    for b in range(batch):
        query, key = q[b], k_new[b]
        if rotary:
            standing = not causal and window == (-1, -1)
            query = rotate(query, cos, sin, lengths[b], interleaved, standing)
            key = rotate(key, cos, sin, lengths[b], interleaved)
        begin = more["cache_leftpad"].tolist()[b] if "cache_leftpad" in more else 0
        whole = []
        for old, fresh in zip(before, (key, v_new[b]), strict=True):
            whole.append(
                torch.stack([*line(old, b)[: lengths[b]], *fresh, torch.zeros(kv_heads, DIM)])
            )
        for cache, kept in zip(caches, whole, strict=True):
            written = torch.stack([*line(cache, b)[: lengths[b] + new], torch.zeros(kv_heads, DIM)])
            torch.testing.assert_close(written, kept)
        k, v = (t[begin:-1].transpose(0, 1)[None] for t in whole)
        keep = oracles.window(queries, k.shape[2], window[0], 0 if causal else window[1])
        bias = None
        if slopes is not None:
            bias = oracles.alibi(slopes, 1, q.shape[2], queries, k.shape[2])
        one = (query.transpose(0, 1)[None], k)
        want = oracles.attention(*one, v, keep, bias, softcap=softcap)
        oracles.assert_close(out[b].transpose(0, 1)[None], want)
        want = oracles.log_sum_exp(*one, keep, bias, softcap=softcap)
        torch.testing.assert_close(lse[b][None].double(), want, rtol=1e-5, atol=1e-5)
    used = torch.zeros(shape, dtype=torch.bool)
    for b in range(batch):
        for token in line(used, b)[: lengths[b] + new]:
            token.fill_(True)
    for cache in caches:  # nothing else was written
        assert cache[~used].isnan().all()


def test_equal_lengths_are_read_where_they_lie(monkeypatch) -> None:
    """No copy of the cache: the kernel is given views of it."""
    from mindiesd.patches.front_doors import attention

    seen = []
    dense = attention.dense
    monkeypatch.setattr(attention, "dense", lambda *a: seen.append(a[2:4]) or dense(*a))
    cache = torch.randn(2, CAPACITY, 2, DIM)
    fa.flash_attn_with_kvcache(torch.randn(2, 1, 2, DIM), cache, cache, cache_seqlens=5)
    ((key, value),) = seen
    assert key.shape[1] == 5 and key.data_ptr() == value.data_ptr() == cache.data_ptr()


def test_whole_cache_without_lengths() -> None:
    q, cache = torch.randn(2, 3, 2, DIM), torch.randn(2, CAPACITY, 2, DIM)
    out = fa.flash_attn_with_kvcache(q, cache, cache)
    want = oracles.attention(*(t.transpose(1, 2) for t in (q, cache, cache))).transpose(1, 2)
    oracles.assert_close(out, want)


BAD = [
    ({"k": torch.ones(2, 1, 2, DIM)}, "k and v"),
    ({"k": torch.ones(2, 1, 2, DIM), "v": torch.ones(2, 1, 2, DIM)}, "cache_seqlens"),
    ({"cache_seqlens": CAPACITY + 1}, "cache_seqlens"),
    ({"cache_seqlens": torch.tensor([1, -1])}, "cache_seqlens"),
    ({"cache_seqlens": torch.tensor([1])}, "cache_seqlens"),
    (
        {
            "k": torch.ones(2, 2, 2, DIM),
            "v": torch.ones(2, 2, 2, DIM),
            "cache_seqlens": CAPACITY - 1,
        },
        "cache_seqlens",
    ),
    ({"cache_batch_idx": torch.tensor([0, 2])}, "cache_batch_idx"),
    ({"cache_leftpad": torch.tensor([0, 9]), "cache_seqlens": 5}, "cache_leftpad"),
    ({"rotary_cos": torch.ones(9, 2)}, "rotary_cos"),
    ({"block_table": torch.tensor([[0], [5]])}, "block_table"),
    ({"block_table": torch.tensor([[0]])}, "block_table"),
]


@pytest.mark.parametrize(("wrong", "argument"), BAD)
def test_bad_arguments_are_named(wrong, argument) -> None:
    q, cache = torch.ones(2, 1, 2, DIM), torch.ones(2, CAPACITY, 2, DIM)
    fa.flash_attn_with_kvcache(q, cache, cache)
    with pytest.raises(ParametersInvalid) as caught:
        fa.flash_attn_with_kvcache(q, cache, cache, **wrong)
    assert caught.value.argument == argument


def test_no_gradient() -> None:
    q = torch.ones(1, 1, 2, DIM, requires_grad=True)
    cache = torch.ones(1, 3, 2, DIM)
    with pytest.raises(ParametersInvalid, match="gradient"):
        fa.flash_attn_with_kvcache(q, cache, cache)
