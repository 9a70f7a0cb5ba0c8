"""The order of video tokens in blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mindiesd.ops.sparse.pooling import block_means
from mindiesd.ops.sparse.rearrange import sequence_order, tile_order

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))


@given(SIZES)
def test_every_token_has_one_place(latent):
    t, h, w = latent
    order = tile_order(*latent)
    assert sorted(order.tolist()) == list(range(t * h * w))
    frames = order.div(h * w, rounding_mode="floor")
    assert torch.equal(frames, frames.sort().values)


@given(SIZES)
def test_a_tile_is_64_tokens_in_a_row(latent):
    t, h, w = latent
    order = tile_order(*latent).tolist()
    whole = h % 8 == 0 and w % 8 == 0
    place = {token: at for at, token in enumerate(order)}
    for frame in range(0 if whole else 1, t):
        for row in range(0, h - h % 8, 8):
            for column in range(0, w - w % 8, 8):
                first = place[(frame * h + row) * w + column]
                for y in range(8):
                    for x in range(8):
                        token = (frame * h + row + y) * w + column + x
                        assert place[token] == first + 8 * y + x


# Sums of order[i] * (i + 1) modulo 1000003, worked out from the description alone.
CHECKSUMS = [
    ((2, 16, 16), 452220),
    ((3, 10, 9), 539004),
    ((3, 16, 12), 224451),
    ((2, 12, 16), 802506),
    ((5, 9, 8), 551835),
    ((1, 8, 8), 87360),
    ((21, 30, 52), 952298),
]


@pytest.mark.parametrize(("latent", "expected"), CHECKSUMS)
def test_known_orders(latent, expected):
    order = tile_order(*latent)
    assert int((order * torch.arange(1, order.shape[0] + 1)).sum()) % 1000003 == expected


@given(SIZES, st.integers(0, 5), st.booleans())
def test_text_goes_to_the_end_and_back(latent, text, text_last):
    t, h, w = latent
    order = sequence_order(latent, text, text_last, torch.device("cpu"))
    length = t * h * w + text
    tokens = torch.randn(length, 3)
    back = torch.empty_like(tokens)
    back[order] = tokens[order]
    assert torch.equal(back, tokens)
    words = range(t * h * w, length) if text_last else range(text)
    assert order[t * h * w :].tolist() == list(words)


def test_an_order_made_in_inference_mode_serves_outside():
    latent = (1, 3, 5)
    sequence_order.cache_clear()
    with torch.inference_mode():
        order = sequence_order(latent, 2, False, torch.device("cpu"))
    assert not order.is_inference()
    assert sequence_order(latent, 2, False, torch.device("cpu")) is order


@given(
    st.sampled_from([1, 127, 128, 129, 2100]),
    st.sampled_from([torch.float32, torch.float16, torch.float64]),
    st.booleans(),
)
def test_block_means(length, dtype, ordered):
    x = torch.randn(2, 3, length, 5).to(dtype)
    order = torch.randperm(length) if ordered else None
    means = block_means(x, order)
    placed = (x if order is None else x[:, :, order]).double()
    expected = torch.stack([part.mean(2) for part in placed.split(128, 2)], 2)
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)
