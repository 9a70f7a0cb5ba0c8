"""The compiled kernel: what it converts, when it is used, and what happens where it cannot be."""

from __future__ import annotations

import functools
import logging
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import mindiesd
from mindiesd.compiled.library import FOLDER, Library, LibraryUnavailable
from mindiesd.ops.sparse import compiled, kernel, threaded
from mindiesd.ops.sparse.selection import Selection

HALVES = (torch.float16, torch.bfloat16)


EVERYTHING = Selection(torch.ones(1, 512, 1, 1, dtype=torch.bool))


def test_this_machine_has_it():
    """The other tests of it would be left out without a word."""
    if platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("written for x86-64 with AVX2")
    assert Library().instructions in ("avx2", "avx512")
    assert compiled.functions() is not None


def all_halves(dtype: torch.dtype) -> torch.Tensor:
    """Every value that sixteen bits can be, [1, 512, 1, 128]."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(1, 512, 1, 128)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_comes_through(dtype):
    """One key: its value is the result."""
    value = all_halves(dtype)
    query = torch.zeros(1, 512, 1, 8, dtype=dtype)
    out = compiled.attention(query, query, value, EVERYTHING, 1.0, True)
    assert torch.equal(out.isnan(), value.isnan())
    plain = ~value.isnan()
    assert torch.equal(out[plain], value[plain])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("apart", [1, 2, 3, 5, 1000])
def test_every_tie_goes_to_even(dtype, apart):
    """Two keys alike: the result is the mean, which for neighbours lies between two halves."""
    one = all_halves(dtype)
    value = torch.stack([one, one.view(-1).roll(-apart).view_as(one)], 3).squeeze(2)
    assert value.shape == (1, 512, 2, 128)
    query, key = (torch.zeros(1, 512, n, 8, dtype=dtype) for n in (1, 2))
    out = compiled.attention(query, key, value, EVERYTHING, 1.0, True)
    expected = value.float().mean(2, keepdim=True).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_first", [True, False])
def test_it_is_what_sparse_attention_uses(dtype, head_first, monkeypatch):
    assert compiled.functions() is not None  # found now: trying them uses them
    used = []
    for name in ("attention", "estimate"):
        function = getattr(compiled, name)
        monkeypatch.setattr(
            compiled, name, lambda *args, n=name, f=function: used.append(n) or f(*args)
        )
    shape, layout = ((1, 1, 512, 16), "BNSD") if head_first else ((1, 512, 1, 16), "BSND")
    query = torch.randn(shape, dtype=dtype)
    options = {"sparse_type": "ada_bsa", "sparsity": 0.5, "input_layout": layout}
    mindiesd.sparse_attention(query, query, query, **options)
    assert used == ["estimate", "attention"]


@pytest.mark.parametrize("kind", ["float64", "strided", "negated"])
def test_what_it_cannot_read_is_computed_elsewhere(kind, monkeypatch):
    monkeypatch.setattr(compiled, "attention", None)
    query = torch.randn(1, 2, 300, 16, dtype=torch.float64 if kind == "float64" else None)
    value = {
        "float64": query,
        "strided": query.transpose(2, 3).contiguous().transpose(2, 3),
        "negated": torch._neg_view(query),
    }[kind]
    selection = Selection(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    out = kernel.over_blocks(query, query, value, selection, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, value, scale=0.25)
    torch.testing.assert_close(out, expected)


@pytest.fixture
def copied(tmp_path) -> Path:
    for name in ("rows.c", "rows.h", "_rows.so"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def test_without_a_library(copied):
    assert Library(copied).instructions
    (copied / "_rows.so").unlink()
    with pytest.raises(LibraryUnavailable, match="no C compiler"):
        Library(copied)


def test_a_library_made_from_other_sources_is_refused(copied):
    with (copied / "rows.h").open("a") as file:
        file.write("\n")
    with pytest.raises(LibraryUnavailable, match="other sources: install mindiesd anew"):
        Library(copied)


def test_a_library_without_its_sources_is_refused(copied):
    (copied / "rows.c").unlink()
    with pytest.raises(LibraryUnavailable, match=r"cannot be used: .*rows\.c"):
        Library(copied)


def test_a_file_that_is_no_library_is_refused(copied):
    (copied / "_rows.so").write_bytes(b"not a library")
    with pytest.raises(LibraryUnavailable, match="cannot be used"):
        Library(copied)


@pytest.fixture
def unloaded(monkeypatch):
    """The library is looked for again, and what is found here is forgotten afterwards."""
    monkeypatch.setattr(compiled, "functions", functools.cache(compiled.functions.__wrapped__))
    return monkeypatch


@pytest.mark.parametrize("wrong", ["rows", "estimate"])
def test_a_library_that_computes_something_else_is_not_used(wrong, unloaded, caplog):
    typed = compiled.typed

    def spoiled(function_of):
        right = typed(function_of)

        def function(call, pair, first, stop):
            call.factor *= 1.01
            return getattr(right, wrong)(call, pair, first, stop)

        return right._replace(**{wrong: function})

    unloaded.setattr(compiled, "typed", spoiled)
    assert compiled.functions() is None
    assert "wrong on this machine and is not used" in caplog.text
    unloaded.setattr(compiled, "attention", None)
    query = torch.randn(1, 1, 512, 16)
    mindiesd.sparse_attention(query, query, query, sparse_type="ada_bsa", sparsity=0.5)


def test_why_there_is_none_is_told_where_it_is_asked_for(unloaded, caplog):
    def absent():
        raise LibraryUnavailable("not today")

    unloaded.setattr(compiled, "Library", absent)
    with caplog.at_level(logging.INFO, logger="mindiesd"):
        assert compiled.functions() is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "not today" in caplog.text


@contextmanager
def another_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "mode", [another_dtype, torch.inference_mode, lambda: torch.device("meta"), FakeTensorMode]
)
def test_it_is_found_whatever_the_caller_is_about(mode, unloaded, caplog):
    with mode():
        assert compiled.functions() is not None
    assert not caplog.text


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["rf_v2", "ada_bsa"])
@pytest.mark.parametrize("aten", [False, True])
def test_another_default_device_and_dtype_change_nothing(kind, threads, aten, unloaded):
    if aten:
        unloaded.setattr(compiled, "functions", lambda: None)
    query = torch.randn(1, 2, 4096, 16)
    options = {"sparse_type": kind, "sparsity": 0.5, "latent_shape_q": (4, 32, 32)}
    expected = mindiesd.sparse_attention(query, query, query, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with another_dtype(), torch.device("meta"):
            out = mindiesd.sparse_attention(query, query, query, **options)
    finally:
        torch.set_num_threads(before)
    assert out.device.type == "cpu" and out.dtype is torch.float32
    torch.testing.assert_close(out, expected)


def test_missing_memory_is_an_error():
    without = compiled.Functions(lambda *_: 1, lambda *_: 1)
    query = torch.randn(1, 1, 8, 8)
    selection = Selection(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(MemoryError, match="sparse attention"):
        compiled.attention(query, query, query, selection, 1.0, True, without)
    with pytest.raises(MemoryError, match="sparse attention"):
        compiled.estimate(query, query, torch.tensor([0]), 1.0, False, without)


def test_it_agrees_with_atens_operators_on_a_video():
    """Two ways to the same numbers, at a size at which all their loops are used."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 2000, 128)
    keep = torch.rand(1, 2, 16, 16) < 0.3
    keep[..., 0] = True
    selection = Selection(keep, torch.randperm(2000), torch.randperm(2000))
    arguments = (query, key, value, selection, 128**-0.5, True)
    torch.testing.assert_close(
        compiled.attention(*arguments), threaded.attention(*arguments), rtol=1e-5, atol=2e-6
    )
