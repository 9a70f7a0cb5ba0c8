"""The demo's digits, its judge, and the sheets that it reads and writes."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.utils import make_image_grid
from PIL import Image

from scripts import _digits, _sheet


@pytest.fixture(scope="module")
def judge() -> _digits.Judge:
    return _digits.Judge()


def test_split_is_of_all_digits_and_shares_none():
    train, test = _digits.load()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    for part in (train, test):
        assert part.pixels.shape == (len(part.labels), 8, 8)
        assert part.pixels.min() == 0
        assert part.pixels.max() == 1
        assert set(part.labels) == set(range(10))
    seen = {pixels.tobytes() for pixels in train.pixels}
    assert not any(pixels.tobytes() in seen for pixels in test.pixels)
    again, _ = _digits.load()
    assert (again.pixels == train.pixels).all()


def test_enlarged_digits_reduce_to_nearly_themselves():
    pixels = _digits.load()[1].pixels
    large = _digits.enlarge(pixels)
    assert large.shape == (len(pixels), 32, 32)
    assert large.min() >= 0
    assert large.max() <= 1
    assert np.abs(_digits.reduce(large) - pixels).mean() < 0.06  # it is a little blurred


def test_reduce_takes_means_of_blocks():
    large = np.random.default_rng(0).random((2, 32, 32))
    small = _digits.reduce(large)
    assert small.shape == (2, 8, 8)
    assert small[1, 2, 5] == pytest.approx(large[1, 8:12, 20:24].mean())


def test_judge_reads_digits_that_it_never_saw(judge):
    right, of = judge.held_out
    assert of == 360
    assert right / of > 0.98
    test = _digits.load()[1]
    assert (judge.read(_digits.enlarge(test.pixels)) == test.labels).sum() == right


def test_judge_does_not_read_noise_as_what_was_asked(judge):
    noise = np.random.default_rng(0).random((200, 32, 32)).astype(np.float32)
    assert (judge.read(noise) == np.repeat(np.arange(10), 20)).mean() < 0.3


def test_cut_undoes_the_grid_of_diffusers():
    values = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    grid = make_image_grid([Image.fromarray(v).convert("RGB") for v in values], rows=2, cols=3)
    assert np.allclose(_digits.cut(np.asarray(grid), 2) * 255, values)


@pytest.mark.parametrize(("shape", "rows"), [((64, 40, 3), 2), ((63, 64, 3), 2), ((64, 64, 3), 3)])
def test_cut_refuses_a_sheet_of_another_size(shape, rows):
    with pytest.raises(ValueError, match="has no"):
        _digits.cut(np.zeros(shape, np.uint8), rows)


def compose(**changed) -> np.ndarray:
    values = np.linspace(0.2, 0.8, 2 * 5)[:, None, None] * np.ones((2 * 5, 32, 32))
    pictures = values.reshape(2, 5, 32, 32)
    other = {"pictures": pictures, "wrong": np.zeros((2, 5), bool)} | changed
    columns = [_sheet.Column("one", ["a remark"], pictures), _sheet.Column("two", [], **other)]
    return np.asarray(_sheet.compose(columns, ["first", "second"], "foot")).astype(int)


def test_sheet_shows_the_pictures_of_every_column():
    sheet = compose()
    for value in np.linspace(0.2, 0.8, 10).reshape(2, 5)[:, :4].flat:
        # 64 x 64 in each of two columns.
        assert (sheet == round(value * 255)).all(axis=-1).sum() >= 2 * 64 * 64


def red(sheet: np.ndarray) -> int:
    return int(((sheet[..., 0] > 150) & (sheet[..., 1] < 90) & (sheet[..., 2] < 90)).sum())


def test_sheet_frames_what_is_wrong():
    wrong = np.zeros((2, 5), bool)
    assert red(compose()) == 0
    wrong[1, 2] = True
    one = red(compose(wrong=wrong))
    wrong[0, 0] = True
    assert red(compose(wrong=wrong)) == 2 * one > 0


def test_sheet_says_what_was_not_drawn():
    absent = compose(pictures=None, wrong=None, absent="no NPU here")
    assert red(absent) > 100  # letters
    other = compose(pictures=None, wrong=None, absent="no compiler here")
    assert (absent != other).any()


def test_long_remarks_stay_in_their_column():
    lines = _sheet._wrapped(["word " * 40], 260)
    assert len(lines) > 3
    from PIL import ImageFont

    font = ImageFont.load_default(size=_sheet._SMALL)
    assert max(font.getlength(line) for line in lines) <= 260
