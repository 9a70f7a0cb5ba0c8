"""Attention over chosen blocks: each kernel against a float64 reference with a token mask."""

import ctypes
import functools
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mindiesd.compiled.library import FOLDER
from mindiesd.ops.sparse import compiled, gathered, threaded
from mindiesd.ops.sparse.selection import BLOCK, Selection, blocks_of
from mindiesd.ops.sparse.workers import WORKERS, Workers
from tests import oracles

WIDE = """
#include "rows.c"
#define TARGET "avx2,fma"
#define NAME(x) x##_wide
#define LANES 16
#define VECTORS 4
#include "rows.h"
"""


@functools.cache
def wide():
    """The code for AVX-512's registers, computed with AVX2's, which every machine here has."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "wide.c"), Path(folder, "wide.so")
        source.write_text(WIDE)
        flags = ["-O1", "-w", "-shared", "-fPIC", '-DMADE_FROM=""', f"-I{FOLDER}"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
        loaded = ctypes.CDLL(str(library))
    return compiled.typed(lambda name: loaded[f"mindiesd_{name}_wide"])


def by_wide(*arguments):
    return compiled.attention(*arguments, wide())


KERNELS = {"threaded": threaded.attention, "gathered": gathered.attention}
if compiled.functions() is not None:
    KERNELS |= {"compiled": compiled.attention, "wide": by_wide}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_mask(selection, queries, keys):
    """The [B, N, Sq, Skv] mask that a selection means, a token at a time."""
    place_q = torch.arange(queries)
    place_k = torch.arange(keys)
    if selection.order_q is not None:
        place_q = torch.empty_like(place_q).index_copy_(0, selection.order_q, place_q)
    if selection.order_k is not None:
        place_k = torch.empty_like(place_k).index_copy_(0, selection.order_k, place_k)
    mask = selection.keep[:, :, place_q // BLOCK][..., place_k // BLOCK]
    return mask & oracles.top_left(queries, keys) if selection.causal else mask


def random_selection(batch, heads, queries, keys, causal, ordered, density=0.5):
    keep = torch.rand(batch, heads, blocks_of(queries), blocks_of(keys)) < density
    if causal:
        keep &= torch.ones(keep.shape[-2:], dtype=torch.bool).tril()
    keep[..., 0] |= ~keep.any(-1)
    orders = (torch.randperm(queries), torch.randperm(keys)) if ordered else (None, None)
    return Selection(keep, *orders, causal)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None)
@given(
    st.sampled_from([1, 127, 128, 129, 300]),
    st.sampled_from([1, 127, 128, 129, 400]),
    st.sampled_from([(1, 1), (4, 2)]),
    st.sampled_from([(8, 8), (40, 24), (70, 130)]),
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", "ordered", "causal"]),
    st.booleans(),
    st.sampled_from([1.0, 40.0]),
)
def test_any_shape(kernel, queries, keys, heads, dims, dtype, kind, head_first, magnitude):
    assume(dtype is not torch.float64 or kernel in ("threaded", "gathered"))
    query = torch.randn(2, heads[0], queries, dims[0]).mul(magnitude).to(dtype)
    key = torch.randn(2, heads[1], keys, dims[0]).to(dtype)
    value = torch.randn(2, heads[1], keys, dims[1]).to(dtype)
    selection = random_selection(2, heads[0], queries, keys, kind == "causal", kind == "ordered")
    given_ = [t if head_first else t.transpose(1, 2).contiguous() for t in (query, key, value)]
    scale = dims[0] ** -0.5
    out = KERNELS[kernel](*given_, selection, scale, head_first)
    assert out.dtype is dtype
    assert out.shape[:-1] == given_[0].shape[:-1] and out.shape[-1] == dims[1]
    mask = token_mask(selection, queries, keys)
    expected = oracles.attention(query, key, value, keep=mask, scale=scale)
    # Large scores are rounded before the exponential, in relation to their size.
    extra = (1e-12 if dtype is torch.float64 else 2e-4) if magnitude > 1 else 0.0
    oracles.assert_close(out if head_first else out.transpose(1, 2), expected, extra)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_of_a_fused_projection(kernel):
    projection = torch.randn(2, 200, 3, 4, 16)
    query, key, value = (t.transpose(1, 2) for t in projection.unbind(2))
    selection = random_selection(2, 4, 200, 200, False, True)
    out = KERNELS[kernel](query, key, value, selection, 0.25, True)
    mask = token_mask(selection, 200, 200)
    oracles.assert_close(out, oracles.attention(query, key, value, keep=mask))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [1e3, 1e6])
def test_scores_beyond_the_range_of_the_exponential(kernel, magnitude):
    """Also where they are all very negative, which a softmax does not mind."""
    query, key = torch.randn(1, 2, 256, 16), torch.randn(1, 2, 256, 16)
    key[..., 0] = magnitude
    query[..., 0] = torch.tensor([1.0, -1.0])[None, :, None]
    value = torch.randn(1, 2, 256, 16)
    selection = random_selection(1, 2, 256, 256, False, False)
    out = KERNELS[kernel](query, key, value, selection, 0.25, True)
    mask = token_mask(selection, 256, 256)
    expected = oracles.attention(query, key, value, keep=mask, scale=0.25)
    # float32 scores of this size are so coarse.
    oracles.assert_close(out, expected, extra=magnitude * 0.25 * torch.finfo(torch.float32).eps * 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_of_large_values_do_not_overflow(kernel):
    query, key = torch.randn(2, 1, 1, 256, 8)
    value = torch.full((1, 1, 256, 8), 1e35)
    selection = Selection(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    out = KERNELS[kernel](4 * query, key, value, selection, 0.5, True)
    assert torch.allclose(out, value, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_a_number_stays_in_its_rows(kernel):
    query, key, value = torch.randn(3, 1, 1, 256, 8)
    query[..., 5, :] = torch.nan
    selection = Selection(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    out = KERNELS[kernel](query, key, value, selection, 1.0, True)
    assert out[..., 5, :].isnan().all()
    assert out[..., :5, :].isfinite().all() and out[..., 6:, :].isfinite().all()


@pytest.fixture
def threads():
    """Sets the number of ATen's threads, until the test has ended."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "gathered"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_result_does_not_depend_on_the_threads(kernel, number, monkeypatch, threads):
    arguments = (*torch.randn(3, 1, 3, 700, 16), random_selection(1, 3, 700, 700, False, True))
    expected = KERNELS[kernel](*arguments, 0.3, True)
    workers = Workers()
    for module in (threaded, compiled):
        monkeypatch.setattr(module, "WORKERS", workers)
    threads(number)
    out = workers.alone(lambda: KERNELS[kernel](*arguments, 0.3, True))
    assert torch.get_num_threads() == number
    # Threads that are started later are not slowed down.
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [number]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def in_threads(work, tasks=100):
    """Run ``work`` in threads of its own."""
    workers = Workers()
    workers.alone(lambda: workers.run(work, tasks))


def test_an_error_in_a_thread_reaches_the_caller(threads):
    threads(3)
    met = threading.Barrier(3)

    def fail(which):
        if met.wait(60) == which:
            raise ValueError("inside")

    # Whichever thread it is, and the others have ended.
    for which in range(3):
        with pytest.raises(ValueError, match="inside"):
            in_threads(lambda which=which: fail(which))


def test_threads_stay_alone_after_their_first_operator(threads):
    """A thread's first operator may take over the process's number, which is the caller's."""
    seen = []
    threads(2)
    met = threading.Barrier(2)

    def work():
        met.wait(60)
        torch.ones(64, 64) @ torch.ones(64, 64)
        seen.append((torch.get_num_threads(), threading.current_thread()))

    in_threads(work)
    assert [number for number, _ in seen] == [1, 1]
    assert len({thread for _, thread in seen}) == 2
    assert threading.current_thread() not in {thread for _, thread in seen}


def test_callers_that_take_all_threads_do_not_wait_for_each_other(threads):
    threads(2)
    workers, met, done = Workers(), threading.Barrier(2), []

    def compute():
        met.wait(60)  # both threads are taken now
        workers.each(range(10), done.append)

    callers = [threading.Thread(target=workers.alone, args=(compute,)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert sorted(done) == sorted([*range(10), *range(10)])


def test_each_item_is_taken_once(threads):
    threads(2)
    workers, seen = Workers(), []
    workers.alone(lambda: workers.each(range(1000), seen.append))
    assert sorted(seen) == list(range(1000))
    seen.clear()
    workers.each(range(3), seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "gathered"])
def test_in_inference_mode_with_threads(kernel, threads):
    threads(2)
    with torch.inference_mode():
        query = torch.randn(1, 2, 600, 8)
        selection = random_selection(1, 2, 600, 600, False, True)
        out = WORKERS.alone(lambda: KERNELS[kernel](query, query, query, selection, 0.3, True))
        assert out.is_inference()
    mask = token_mask(selection, 600, 600)
    oracles.assert_close(out, oracles.attention(query, query, query, keep=mask, scale=0.3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_score_matrix_is_built(kernel):
    """The largest tensor made on the way is far smaller than Sq x Skv."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, torch.Tensor):
                    self.numel = max(self.numel, one.numel())
            return out

    length = 4096
    query = torch.randn(1, 1, length, 8)
    selection = random_selection(1, 1, length, length, False, True)
    with Largest() as largest:
        KERNELS[kernel](query, query, query, selection, 0.3, True)
    assert largest.numel <= length * length // 8
