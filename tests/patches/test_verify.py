"""verify=N: calls run both ways, a line that fails goes back to the original and is named."""

from __future__ import annotations

import _thread
import copy
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mindiesd
from mindiesd.ops import norm
from mindiesd.patches import sdpa, verify
from mindiesd.patches.report import Report


def entry(migration: Any, name: str) -> Any:
    return next(patch for patch in migration.report().patches if patch.name == name)


@pytest.fixture
def wrong_rms_norm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes our RMSNorm 1 % too large; the list counts its calls."""
    calls: list[int] = []
    right = norm.rms_norm

    def wrong(*args: Any) -> torch.Tensor:
        calls.append(1)
        return right(*args) * 1.01

    monkeypatch.setattr(norm, "rms_norm", wrong)
    return calls


def test_right_calls_are_verified_and_counted() -> None:
    migration = mindiesd.patch_all(verify=3)
    x, weight = torch.randn(4, 64), torch.randn(64)
    for _ in range(5):
        got = F.rms_norm(x, (64,), weight)
    report = entry(migration, "torch_rms_norm")
    assert (report.redirected, report.verified) == (5, 3)
    assert 0 < report.largest_error < 1e-6
    assert not report.failed_verification
    assert "3 verified" in migration.report().summary()
    mindiesd.unpatch_all()
    torch.testing.assert_close(got, F.rms_norm(x, (64,), weight), rtol=0, atol=0)


def test_a_line_that_was_verified_launches_nothing_more() -> None:
    class Count(TorchDispatchMode):
        launched = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.launched += 1
            return func(*args, **kwargs or {})

    model, x = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.LayerNorm(8)), torch.randn(4, 8)
    launched = {}
    for verify_first in (0, 2):
        mindiesd.patch_all(verify=verify_first)
        numbers = []
        for _ in range(4):
            with torch.no_grad(), Count() as count:
                model(x)
            numbers.append(count.launched)
        launched[verify_first] = numbers
        mindiesd.unpatch_all()
    plain = launched[0][-1]
    assert all(number > plain for number in launched[2][:2]), "it was not verified at all"
    assert launched[2][2:] == [plain, plain]


def test_a_thread_that_runs_nothing_but_the_call() -> None:
    """No line of Python calls it: the function itself is the place."""
    migration = mindiesd.patch_all(verify=1)
    raised: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, raised.append
    try:
        _thread.start_new_thread(F.rms_norm, (torch.randn(4, 8), (8,)))
        deadline = time.monotonic() + 60
        while not raised and not entry(migration, "torch_rms_norm").verified:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sys.unraisablehook = hook
    assert not raised
    assert entry(migration, "torch_rms_norm").verified == 1


def test_wrong_calls_give_the_original_and_are_named(wrong_rms_norm: list[int]) -> None:
    x = torch.randn(4, 64)
    expected = F.rms_norm(x, (64,))
    migration = mindiesd.patch_all(verify=2)
    results = [F.rms_norm(x, (64,)) for _ in range(4)]
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len(wrong_rms_norm) == 1, "after its failure the line must not come to us again"
    report = entry(migration, "torch_rms_norm")
    assert report.fell_back == {verify.FAILED: 3}
    (failure,) = report.failed_verification
    assert __file__ in failure
    assert "float32[4, 64] on cpu" in failure
    text = " ".join(str(migration.report()).split())
    assert "FAILED verification" in text and "1 lines FAILED" in text


def test_nobody_gets_an_unjudged_result_while_the_first_is_judged(
    monkeypatch: pytest.MonkeyPatch, wrong_rms_norm: list[int]
) -> None:
    x = torch.randn(4, 64)
    expected = F.rms_norm(x, (64,))
    judging, done, right = threading.Event(), threading.Event(), verify.judge

    def slowly(*args: Any) -> Any:
        if not judging.is_set():
            judging.set()
            assert done.wait(60)
        return right(*args)

    monkeypatch.setattr(verify, "judge", slowly)
    results = []
    mindiesd.patch_all(verify=1)

    def call() -> None:
        results.append(F.rms_norm(x, (64,)))

    first = threading.Thread(target=call)
    first.start()
    assert judging.wait(60)
    call()
    done.set()
    first.join()
    assert len(results) == 2
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_failure_concerns_its_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm.rms_norm
    monkeypatch.setattr(
        norm, "rms_norm", lambda x, *rest: right(x, *rest) * (2 if x.shape[0] == 3 else 1)
    )
    migration = mindiesd.patch_all(verify=2)
    F.rms_norm(torch.randn(3, 8), (8,))
    F.rms_norm(torch.randn(4, 8), (8,))
    report = entry(migration, "torch_rms_norm")
    assert report.verified == 1
    assert len(report.failed_verification) == 1


def test_only_the_first_calls_cost_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    right = verify.judge
    monkeypatch.setattr(verify, "judge", lambda *args: judged.append(1) or right(*args))
    mindiesd.patch_all(verify=2)
    for _ in range(10):
        F.rms_norm(torch.randn(4, 8), (8,))
    assert len(judged) == 2


def test_the_line_is_the_users_not_torchs() -> None:
    migration = mindiesd.patch_all(verify=1)
    module = torch.nn.RMSNorm(8)
    with torch.no_grad():
        module(torch.randn(2, 8))
        module(torch.randn(2, 8))
    assert entry(migration, "torch_rms_norm").verified == 2


def test_calls_that_fall_back_are_not_verified() -> None:
    migration = mindiesd.patch_all(verify=5)
    F.rms_norm(torch.randn(4, 8, requires_grad=True), (8,)).sum().backward()
    report = entry(migration, "torch_rms_norm")
    assert (report.verified, report.fell_back) == (0, {"needs gradients": 1})


def test_compiled_calls_are_not_verified_and_stay_whole() -> None:
    migration = mindiesd.patch_all(verify=5)
    compiled = torch.compile(lambda x: F.rms_norm(x, (8,)), backend="eager", fullgraph=True)
    compiled(torch.randn(2, 8))
    report = entry(migration, "torch_rms_norm")
    assert (report.traced, report.verified) == (1, 0)


def test_inside_the_original_everything_is_original(monkeypatch: pytest.MonkeyPatch) -> None:
    # MultiheadAttention would not do: its fast path calls nothing. The reference of a module runs
    # its own forward, which must not come back to us.
    normalization = pytest.importorskip("diffusers.models.normalization")
    migration = mindiesd.patch_all(verify=1)
    module = normalization.FP32LayerNorm(16)
    with torch.no_grad():
        module(torch.randn(2, 16, dtype=torch.bfloat16))
    assert entry(migration, "fp32_layer_norm").verified == 1
    assert entry(migration, "torch_layer_norm").redirected == 0


def test_one_pipeline_is_verified_and_no_other() -> None:
    ours, other = torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)
    mindiesd.patch_all()
    with torch.no_grad(), mindiesd.patch_pipeline(ours, verify=4) as migration:
        ours(torch.randn(2, 8))
        other(torch.randn(2, 8))
        assert entry(migration, "torch_rms_norm").verified == 1
    process = entry(mindiesd.patch_all(), "torch_rms_norm")
    assert (process.redirected, process.verified) == (1, 0)


def test_verifying_after_patching_without_installs_anew_and_is_undone() -> None:
    held = {"sdpa": F.scaled_dot_product_attention, "rms": F.rms_norm}
    mindiesd.patch_all()
    with mindiesd.patch_pipeline(torch.nn.RMSNorm(8), verify=1):
        assert F.rms_norm is not held["rms"]
    assert F.rms_norm is not held["rms"]
    mindiesd.unpatch_all()
    assert F.rms_norm is held["rms"]
    assert F.scaled_dot_product_attention is held["sdpa"]


def test_a_function_mode_sees_the_public_function() -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func is F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    mindiesd.patch_all(verify=1)
    q = torch.randn(1, 2, 4, 8)
    with Mode():
        F.scaled_dot_product_attention(q, q, q)
    assert any(seen)


@pytest.mark.parametrize("value", [-1, 1.0, True, "1"])
def test_bad_values_are_refused(value: Any) -> None:
    with pytest.raises(mindiesd.ParametersInvalid, match="verify"):
        mindiesd.patch_all(verify=value)


def test_the_report_survives_json_and_merging(wrong_rms_norm: list[int]) -> None:
    migration = mindiesd.patch_all(verify=1)
    F.rms_norm(torch.randn(2, 8), (8,))
    report = Report.from_dict(migration.report().to_dict())
    both = Report.merged([report, copy.deepcopy(report)])
    patch = next(patch for patch in both.patches if patch.name == "torch_rms_norm")
    assert len(patch.failed_verification) == 1


# The judge.


def noisy(size: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    noise = torch.randn(1000, generator=generator, dtype=torch.float64)
    return truth, (truth + size * noise).to(dtype)


def test_the_judge_takes_the_more_accurate_and_refuses_the_less() -> None:
    truth, coarse = noisy(0.1, torch.float32)
    _, fine = noisy(0.01, torch.float32)
    assert verify.judge(fine, coarse, truth).passed
    assert not verify.judge(coarse, fine, truth).passed


def test_the_judge_does_not_tell_rounding_from_rounding() -> None:
    truth, original = noisy(0.0, torch.bfloat16)
    bits = original.view(torch.int16)
    assert verify.judge((bits + 1).view(torch.bfloat16), original, truth).passed
    assert not verify.judge((bits + 16).view(torch.bfloat16), original, truth).passed


def test_the_judge_looks_at_dtype_shape_structure_and_infinities() -> None:
    truth, original = noisy(0.0, torch.float32)
    assert not verify.judge(original.double(), original, truth).passed
    assert not verify.judge(original[None], original, truth).passed
    assert not verify.judge((original,), (original, original), (truth, truth)).passed
    broken = original.clone()
    broken[3] = torch.nan
    assert not verify.judge(broken, original, truth).passed
    assert verify.judge(broken, broken, truth).passed
    # An overflow of the original that ours does not have is no fault of ours.
    assert verify.judge(original, broken, truth).passed


def test_without_a_reference_the_original_is_the_measure() -> None:
    _, original = noisy(0.0, torch.float32)
    assert verify.judge(original, original, None).passed
    assert not verify.judge(original * 1.001, original, None).passed


def test_an_original_that_raises_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 64)
    expected = F.rms_norm(x, (64,), eps=1e-6)
    migration = mindiesd.patch_all(only="torch_rms_norm", verify=1)

    def raising(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel here")

    monkeypatch.setattr(norm, "rms_norm", lambda *args: expected)
    monkeypatch.setattr(torch, "rms_norm", raising)
    assert F.rms_norm(x, (64,), eps=1e-6) is expected
    report = entry(migration, "torch_rms_norm")
    assert report.without_reference == {"the original raised RuntimeError": 1}
    assert not report.failed_verification and report.redirected == 1


# The reference of attention.


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 40),
    keys=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["none", "bool", "row", "additive", "causal"]),
    most=st.sampled_from([2, 5, 1000]),
)
def test_the_reference_is_attention(
    length: int, keys: int, kv_heads: int, kind: str, most: int
) -> None:
    generator = torch.Generator().manual_seed(length * 100 + keys)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    query, key, value = (
        draw(2, 4, length, 8),
        draw(2, kv_heads, keys, 8),
        draw(2, kv_heads, keys, 8),
    )
    mask = {
        "bool": draw(2, 1, length, keys) > 0,
        "row": draw(2, 1, 1, keys) > 0,
        "additive": draw(length, keys),
    }.get(kind)
    expected = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=kind == "causal", enable_gqa=True
    )
    before, sdpa._REFERENCE_WORK = sdpa._REFERENCE_WORK, most * 2 * 4 * keys * 16
    try:
        got, pick = sdpa.reference(
            query, key, value, mask, is_causal=kind == "causal", enable_gqa=True
        )
    finally:
        sdpa._REFERENCE_WORK = before
    assert got.shape[2] <= max(2, most)
    torch.testing.assert_close(got, pick(expected))


def test_sampled_rows_are_spread_and_hold_both_ends() -> None:
    assert verify.sample_rows(5, 10) == [0, 1, 2, 3, 4]
    rows = verify.sample_rows(1000, 7)
    assert rows[0] == 0 and rows[-1] == 999 and len(rows) == 7
    assert verify.sample_rows(1, 1) == [0]
    assert verify.sample_rows(9, 1) == [8]
