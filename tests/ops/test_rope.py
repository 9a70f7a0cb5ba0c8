"""Rotary embedding against the oracle and, bit for bit, against diffusers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd import ParametersInvalid, rotary_position_embedding
from mindiesd.ops.rope import rotate
from tests import oracles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODES = ("rotated_half", "rotated_interleaved")


def strided(x, how):
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "expanded":
        return x[:, :1].expand_as(x)
    if how == "sliced":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    return x


@st.composite
def inputs(draw, table_dtypes=DTYPES):
    batch, heads, length = (draw(st.integers(0, 3)) for _ in range(3))
    dim = 2 * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, heads, length, dim, generator=generator)
    x = x.to(draw(st.sampled_from(DTYPES)))
    # Unrelated entries within a pair: a formula that reads the wrong one is found out.
    cos, sin = torch.randn(2, length, dim, generator=generator)
    dtype = draw(st.sampled_from(table_dtypes))
    how = draw(st.sampled_from(["plain", "expanded", "sliced"]))
    if heads == 0 and how == "expanded":
        how = "plain"
    return strided(x, how), cos.to(dtype), sin.to(dtype)


@given(inputs(), st.sampled_from(MODES), st.booleans())
def test_every_layout_against_the_oracle(case, mode, fused):
    x, cos, sin = case
    length, dim = cos.shape
    before = x.clone()
    oracle = oracles.rope(x, cos, sin, mode == "rotated_interleaved")
    four = cos.view(1, 1, length, dim), sin.view(1, 1, length, dim)

    def check(out, oracle):
        assert out.dtype is x.dtype
        oracles.assert_close(out, oracle)

    # BNSD, by two and by four dimensions.
    check(rotary_position_embedding(x, cos, sin, mode, True, fused), oracle)
    check(rotary_position_embedding(x, *four, mode, True, fused), oracle)
    check(rotary_position_embedding(x, *four, mode, False, fused), oracle)
    # BSND.
    swapped, expected = x.transpose(1, 2), oracle.transpose(1, 2)
    check(rotary_position_embedding(swapped, cos, sin, mode, False, fused), expected)
    tables = [t.view(1, length, 1, dim) for t in (cos, sin)]
    check(rotary_position_embedding(swapped, *tables, mode, False, fused), expected)
    # SBND.
    swapped, expected = x.permute(2, 0, 1, 3), oracle.permute(2, 0, 1, 3)
    tables = [t.view(length, 1, 1, dim) for t in (cos, sin)]
    check(rotary_position_embedding(swapped, *tables, mode, False, fused), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("how", ["plain", "transposed", "expanded", "sliced"])
def test_bit_for_bit_diffusers(dtype, table_dtype, mode, sequence_dim, how):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    shape = (2, 3, 33, 16) if sequence_dim == 2 else (2, 33, 3, 16)
    x = strided(torch.randn(shape).to(dtype), how)
    cos, sin = torch.randn(2, 33, 16).to(table_dtype)
    theirs = embeddings.apply_rotary_emb(
        x,
        (cos, sin),
        use_real_unbind_dim=-2 if mode == "rotated_half" else -1,
        sequence_dim=sequence_dim,
    )
    ours = rotary_position_embedding(x, cos, sin, mode, head_first=sequence_dim == 2)
    assert torch.equal(ours, theirs)
    at = (None, None) if sequence_dim == 2 else (None, slice(None), None)
    assert torch.equal(rotate(x, cos[at], sin[at], mode == "rotated_interleaved"), theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "table"), [(torch.float64, torch.float64), (torch.float32, torch.float64)]
)
def test_float64(mode, dtype, table):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).to(dtype)
    cos, sin = torch.randn(2, 5, 8, dtype=torch.float64).to(table)
    out = rotary_position_embedding(x, cos, sin, mode)
    assert out.dtype is dtype
    oracle = oracles.rope(x, cos[None, :, None], sin[None, :, None], mode == MODES[1])
    # float32 x and float64 tables: computed in float64, rounded once.
    assert torch.equal(out, oracle.to(dtype)) or oracles.error(out, oracle) < 1e-14


def test_x_is_never_rounded_to_the_tables_dtype():
    x = torch.randn(1, 64, 2, 32)
    cos, sin = torch.randn(2, 64, 32).bfloat16()
    out = rotary_position_embedding(x, cos, sin)
    assert out.dtype is torch.float32
    assert oracles.error(out, oracles.rope(x, cos[:, None], sin[:, None], False)) < 2e-6


def test_a_table_per_batch():
    x, cos, sin = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8), torch.randn(2, 5, 1, 8)
    oracles.assert_close(rotary_position_embedding(x, cos, sin), oracles.rope(x, cos, sin, False))


X = torch.randn(2, 5, 3, 8)
T = torch.randn(5, 8)
WRONG = [
    ("x", {"x": None}),
    ("x", {"x": X[0]}),
    ("x", {"x": X.int()}),
    ("x", {"x": X[..., :7], "cos": T[:, :7], "sin": T[:, :7]}),
    ("cos", {"cos": T[None]}),
    ("cos", {"cos": T[:4]}),
    ("cos", {"cos": T[:, :4]}),
    ("cos", {"cos": T.int()}),
    ("cos", {"cos": T.to("meta")}),
    ("cos", {"cos": 1.0}),
    ("cos", {"head_first": True}),
    ("cos", {"cos": T.view(1, 1, 5, 8), "sin": T.view(1, 1, 5, 8)}),
    ("cos", {"cos": torch.randn(1, 6, 1, 8)}),
    ("cos", {"cos": torch.randn(1, 5, 1, 4)}),
    ("sin", {"sin": torch.randn(1, 5, 3, 8)}),
    ("sin", {"sin": torch.randn(6, 8)}),
    ("sin", {"sin": None}),
    ("rotated_mode", {"rotated_mode": "half"}),
    ("rotated_mode", {"rotated_mode": None}),
    ("head_first", {"head_first": 1}),
    ("fused", {"fused": "no"}),
]


@pytest.mark.parametrize(("argument", "changes"), WRONG)
def test_wrong_arguments(argument, changes):
    with pytest.raises(ParametersInvalid) as caught:
        rotary_position_embedding(**{"x": X, "cos": T, "sin": T, **changes})
    assert caught.value.argument == argument


def test_the_error_tells_what_sbnd_needs():
    with pytest.raises(ParametersInvalid, match=r"\[S, B, N, D\] needs a table \[S, 1, 1, D\]"):
        rotary_position_embedding(torch.randn(5, 2, 3, 8), T, T)
