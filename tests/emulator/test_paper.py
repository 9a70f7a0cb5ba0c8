"""The page of real models on paper, of one that takes a second."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mindiesd.emulator.outline import is_unknown, outline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

import _paper
import _paper_models


@pytest.mark.slow
def test_a_decoder_before_and_after():
    (result,) = _paper.results(["auto"])
    assert result.subject.name.startswith("AutoencoderKL")
    assert 0 < result.after.total < result.before.total
    # The 3 x 3 convolutions of four resolutions: fusing changes no product.
    assert result.after.flops == result.before.flops > 9e12
    assert result.parameters == pytest.approx(result.subject.published * 1e9, rel=0.01)
    page = _paper.page([result])
    counts = f"| {result.subject.name} | {result.before.total} → {result.after.total} |"
    assert counts in page
    assert "nothing here was" in page and "(!)" not in page.partition("## Counted")[2][:300]


@pytest.mark.slow
def test_what_does_not_fit_has_no_gain():
    (result,) = _paper.results(["auto"])
    result.peaks = [65 * 10**9, 10**9]
    page = _paper.page([result])
    assert "65 **(!)** → 1" in page
    (row,) = [line for line in page.splitlines() if "one picture" in line]
    assert row.count("no memory → ") == 3 and row.count("| – |") == 3


@pytest.mark.slow
@pytest.mark.parametrize("subject", _paper_models.SUBJECTS, ids=lambda subject: subject.name)
def test_the_models_have_the_published_number_of_parameters(subject):
    with outline():
        model, count = _paper_models.placed(subject)
        assert count == pytest.approx(subject.published * 1e9, rel=0.01)
        assert all(is_unknown(parameter) for parameter in model.parameters())
        dtypes = {parameter.dtype for parameter in model.parameters()}
        assert subject.dtype in dtypes <= {subject.dtype, torch.float32}
        assert not any(buffer.is_meta for buffer in model.buffers())
