"""Drawn attention calls, and what they must give."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from mindiesd.ops import attention
from mindiesd.ops.masks import attention_mask
from tests import oracles

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


class Case(NamedTuple):
    query: Any
    key: Any
    value: Any
    mask: Any = None
    causal: bool = False
    band: Any = None
    scale: float | None = None
    head_first: bool = True

    def attend(self, kernel=None):
        return attention.attend(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.scale,
            self.causal,
            self.band,
            self.head_first,
            kernel,
        )

    def parts(self):
        return attention_mask(self.mask, self.causal, self.band)

    def heads_first(self):
        tensors = (self.query, self.key, self.value)
        return tensors if self.head_first else tuple(t.transpose(1, 2) for t in tensors)

    def oracle(self):
        """[B, N, Sq, Dv] in float64, on the host."""
        query, key, value = (t.cpu() for t in self.heads_first())
        mask = self.parts()
        keep = bias = None
        if mask is not None:
            queries, keys = query.shape[2], key.shape[2]
            if mask.band is not None:
                low, high = mask.band

                def rule(i, j):
                    return (low is None or j - i >= low) and (high is None or j - i <= high)

                keep = oracles.predicate(queries, keys, rule)
            if mask.keep is not None:
                own = mask.keep.cpu()
                keep = own if keep is None else own & keep
            bias = None if mask.bias is None else mask.bias.cpu()
        return oracles.attention(query, key, value, keep, bias, self.scale)

    def composed(self):
        from mindiesd.ops.backends import native

        query, key, value = self.heads_first()
        return native.attention_composed(query, key, value, self.parts(), self.scale, True)

    def _rounding_of_scores(self):
        """A relative error of the weights: scores in float32 are off by their size's rounding."""
        query, key, _ = (t.cpu().double() for t in self.heads_first())
        scale = query.shape[-1] ** -0.5 if self.scale is None else abs(self.scale)
        if 0 in query.shape or 0 in key.shape:
            return 0.0
        largest = scale * query.norm(dim=-1).max().item() * key.norm(dim=-1).max().item()
        return torch.finfo(torch.float32).eps * largest

    def check(self, out):
        """``out`` is as accurate as the composition in float32, and right by itself."""
        shape = list(self.query.shape)
        shape[-1] = self.value.shape[-1]
        assert list(out.shape) == shape
        assert out.dtype is self.query.dtype and out.device == self.query.device
        out = out if self.head_first else out.transpose(1, 2)
        host = None if self.mask is None else self.mask.cpu()
        slack = oracles.slack(host) + self._rounding_of_scores()
        expected = self.oracle()
        oracles.assert_as_accurate(out.cpu(), self.composed().cpu(), expected, slack)
        oracles.assert_close(out.cpu(), expected, slack)


def tensor(shape, dtype, memory, device="npu"):
    """Random [B, N, S, D] whose memory is in another order, or part of something larger."""
    batch, heads, length, dim = shape
    options = {"dtype": torch.float32}
    if memory == "BNSD":
        made = torch.randn(batch, heads, length, dim, **options)
    elif memory == "BSND":
        made = torch.randn(batch, length, heads, dim, **options).transpose(1, 2)
    elif memory == "sliced":
        made = torch.randn(batch, length, 3, heads, dim, **options)[:, :, 1].transpose(1, 2)
    else:
        made = torch.randn(batch, heads, dim, length, **options).transpose(2, 3)
    cast = made.to(dtype)
    moved = torch.empty_strided(cast.shape, cast.stride(), dtype=dtype, device=device)
    if memory == "sliced":
        moved = torch.empty(batch, length, 3, heads, dim, dtype=dtype, device=device)[:, :, 1]
        moved = moved.transpose(1, 2)
    return moved.copy_(cast)


MEMORIES = ("BNSD", "BSND", "sliced", "SD transposed")
LENGTHS = st.sampled_from([1, 2, 3, 5, 8, 17])


@st.composite
def masks(draw, batch, heads, queries, keys, dtype, kinds=("bool", "finite", "infinite", "lowest")):
    """A mask of any kind and any shape that broadcasts; some rows without a key."""
    kind = draw(st.sampled_from(kinds))
    rank = draw(st.integers(2, 4))
    full = (batch, heads, queries, keys)[4 - rank :]
    shape = [draw(st.sampled_from([1, size])) for size in full]
    if draw(st.booleans()):
        shape[-1] = keys
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    chance = torch.rand(shape, generator=generator)
    if kind == "bool":
        made = chance > 0.4
        if draw(st.booleans()):
            made[..., 0, :] = False
        return made.npu()
    kept = dtype if draw(st.booleans()) else torch.float32
    made = (torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 3.0, 50.0]))).to(
        kept
    )
    if kind == "infinite":
        made[chance > 0.6] = -torch.inf
        if draw(st.booleans()):
            made[..., 0, :] = -torch.inf
    if kind == "lowest":
        made[chance > 0.5] = torch.finfo(kept).min
        if draw(st.booleans()):
            made[..., 0, :] = torch.finfo(kept).min
        if draw(st.booleans()):
            made[..., 0, : keys // 2] = -torch.inf
    return made.npu()


@st.composite
def cases(
    draw, dtypes=FLOATS, dims=(1, 8, 16, 40, 64), kinds=("bool", "finite", "infinite", "lowest")
):
    """Any legal call."""
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    queries, keys = draw(LENGTHS), draw(LENGTHS)
    dim = draw(st.sampled_from(dims))
    value_dim = draw(st.sampled_from([dim, dim, *dims]))
    memory = [draw(st.sampled_from(MEMORIES)) for _ in range(3)]
    if draw(st.booleans()):
        memory = memory[:1] * 3
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    query = tensor((batch, heads, queries, dim), dtype, memory[0])
    key = tensor((batch, kv_heads, keys, dim), dtype, memory[1])
    value = tensor((batch, kv_heads, keys, value_dim), dtype, memory[2])
    mask = None
    if kinds and draw(st.booleans()):
        mask = draw(masks(batch, heads, queries, keys, dtype, kinds))
    band = None
    if draw(st.integers(0, 3)) == 0:
        from mindiesd.ops.masks import Band

        band = Band.window(draw(st.integers(-1, 6)), draw(st.integers(-1, 6)), queries, keys)
    head_first = draw(st.booleans())
    tensors = (query, key, value)
    if not head_first:
        tensors = tuple(t.transpose(1, 2) for t in tensors)
    return Case(
        *tensors,
        mask,
        draw(st.integers(0, 3)) == 0,
        band,
        draw(st.sampled_from([None, None, 0.0, 0.3, -0.5, 2.0])),
        head_first,
    )
