"""A redirect that raises never costs the user a result, and hides no error of theirs."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.ops import attention
from mindiesd.ops.backends import native
from mindiesd.patches import faults, verify
from mindiesd.patches.engine import ENGINE
from tests.tiny import flux_inputs, tiny_flux_transformer


def entry(migration: Any, name: str) -> Any:
    return next(patch for patch in migration.report().patches if patch.name == name)


class Broken:
    """A kernel that raises; it counts its calls."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        raise self.error()


def device_error() -> RuntimeError:
    return RuntimeError("call aclnnRmsNorm failed, error code is 561002\n[ERROR] EZ9999: ...")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    kernel = Broken(device_error)
    monkeypatch.setattr(native, "rms_norm", kernel)
    return kernel


REASON = "the kernel raised RuntimeError: call aclnnRmsNorm failed, error code is 561002"


def test_the_original_is_called_and_the_shape_remembered(
    broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    expected = F.rms_norm(x, (64,), weight)
    migration = mindiesd.patch_all()
    with caplog.at_level(logging.WARNING, "mindiesd"):
        for _ in range(5):
            assert torch.equal(F.rms_norm(x, (64,), weight), expected)
        assert broken.calls == 1, "this shape was tried again"
        assert torch.equal(F.rms_norm(x[:3], (64,), weight=weight), expected[:3])
        assert broken.calls == 2, "another shape was not tried"
    report = entry(migration, "torch_rms_norm")
    assert (report.redirected, report.fell_back) == (0, {REASON: 6})
    assert [record.getMessage() for record in caplog.records] == [
        f"torch_rms_norm: {REASON}; the original is called"
    ], "one warning for one reason"


def test_what_works_is_still_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.rms_norm

    def sometimes(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.shape[0] == 3:
            raise device_error()
        return right(x, *rest)

    monkeypatch.setattr(native, "rms_norm", sometimes)
    migration = mindiesd.patch_all()
    for rows in (3, 4, 3, 4, 4):
        F.rms_norm(torch.randn(rows, 8), (8,))
    report = entry(migration, "torch_rms_norm")
    assert (report.redirected, report.fell_back) == (3, {REASON: 2})


def test_a_new_patch_all_tries_again(broken: Broken) -> None:
    x = torch.randn(4, 8)
    for number in (1, 2):
        mindiesd.patch_all(only="torch_rms_norm")
        F.rms_norm(x, (8,))
        F.rms_norm(x, (8,))
        mindiesd.unpatch_all()
        assert broken.calls == number


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 1 GiB total)"),
        lambda: RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you"),
        lambda: MemoryError(),
        lambda: KeyboardInterrupt(),
        lambda: SystemExit(3),
    ],
    ids=["torch", "npu", "cpu", "python", "interrupt", "exit"],
)
def test_lack_of_memory_and_interrupts_are_raised_unchanged(
    error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = error()
    kernel = Broken(lambda: raised)
    monkeypatch.setattr(native, "rms_norm", kernel)
    mindiesd.patch_all()
    for number in (1, 2):
        with pytest.raises(type(raised)) as caught:
            F.rms_norm(torch.randn(4, 8), (8,))
        assert caught.value is raised
        assert kernel.calls == number, "a shape that did not fit once may fit later"


def test_the_allocators_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "rms_norm", lambda *args: torch.empty(2**60))
    mindiesd.patch_all()
    with pytest.raises(RuntimeError, match="memory"):
        F.rms_norm(torch.randn(4, 8), (8,))


def test_strict_raises(broken: Broken) -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm", strict=True)
    with pytest.raises(RuntimeError, match="aclnnRmsNorm"):
        F.rms_norm(torch.randn(4, 8), (8,))
    assert entry(migration, "torch_rms_norm").fell_back == {}
    mindiesd.unpatch_all()
    mindiesd.patch_all(only="torch_rms_norm")
    F.rms_norm(torch.randn(4, 8), (8,))


def test_a_block_has_its_own_counts_and_its_own_strictness(broken: Broken) -> None:
    norm, other = torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)
    x = torch.randn(2, 8)
    everywhere = mindiesd.patch_all()
    with torch.no_grad():
        with mindiesd.patch_pipeline(norm) as migration:
            norm(x)
        assert entry(migration, "torch_rms_norm").fell_back == {REASON: 1}
        assert entry(everywhere, "torch_rms_norm").fell_back == {}
        with mindiesd.patch_pipeline(norm, only="torch_rms_norm", strict=True):
            other(x)
            with pytest.raises(RuntimeError, match="aclnnRmsNorm"):
                norm(x[:1])
    assert entry(everywhere, "torch_rms_norm").fell_back == {REASON: 1}


def test_a_bug_in_the_decision_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*args: Any) -> str | None:
        raise AttributeError("our own bug")

    # Where an error comes from is told by the module of the function that raised.
    ours = FunctionType(refusal.__code__, vars(attention))
    monkeypatch.setattr(attention, "refusal", ours)
    q = torch.randn(1, 2, 4, 8)
    expected = F.scaled_dot_product_attention(q, q, q)
    migration = mindiesd.patch_all(only="sdpa")
    for _ in range(2):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
    (report,) = migration.report().patches
    assert report.redirected == 0
    assert report.fell_back == {"the kernel raised AttributeError: our own bug": 2}


def error_of(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


MISTAKES: dict[str, Callable[[], Any]] = {
    "shapes of attention": lambda: F.scaled_dot_product_attention(
        torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 8)
    ),
    "a mask that does not fit": lambda: F.scaled_dot_product_attention(
        *[torch.randn(1, 2, 4, 8)] * 3, attn_mask=torch.zeros(3, 5)
    ),
    "no tensor": lambda: F.rms_norm("x", (8,)),
    "a weight that does not fit": lambda: F.rms_norm(torch.randn(4, 8), (8,), torch.randn(7)),
    "a missing argument": lambda: F.rms_norm(torch.randn(4, 8)),
    "an unknown argument": lambda: F.gelu(torch.randn(4), approximation="tanh"),
    "a shape of a layer norm": lambda: torch.nn.LayerNorm(8)(torch.randn(4, 7)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_users_mistake_is_the_same_error(mistake: str) -> None:
    before = error_of(MISTAKES[mistake])
    migration = mindiesd.patch_all()
    after = error_of(MISTAKES[mistake])
    # From Python 3.13 on a Python function suggests another argument; a builtin does not.
    said = str(after).partition(". Did you mean")[0]
    assert (type(after), said) == (type(before), str(before))
    assert after.__context__ is None and after.__cause__ is None
    assert not any(
        reason.startswith(faults.RAISED)
        for patch in migration.report().patches
        for reason in patch.fell_back
    )


def test_an_error_of_both_is_the_originals(broken: Broken) -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (8,), None, torch.tensor([1.0, 2.0]))  # eps is no number

    x = torch.randn(4, 8)
    before = error_of(lambda: Picky()(x))
    migration = mindiesd.patch_all()
    after = error_of(lambda: Picky()(x))
    assert (type(after), str(after)) == (type(before), str(before))
    assert after.__context__ is None
    report = entry(migration, "torch_rms_norm")
    assert (report.redirected, report.fell_back) == (0, {faults.BOTH_RAISED: 1})


def test_code_of_the_user_that_raises_is_not_run_twice() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    layer = activations.GEGLU(8, 8)
    raised, calls = ValueError("from a hook"), []

    def hook(*args: Any) -> None:
        calls.append(1)
        raise raised

    migration = mindiesd.patch_all()
    with torch.no_grad():
        layer(torch.randn(2, 8))
        assert entry(migration, "diffusers_GEGLU").redirected == 1, (
            "or this test would not test anything"
        )
        layer.proj.register_forward_hook(hook)
        assert error_of(lambda: layer(torch.randn(2, 8))) is raised
    assert len(calls) == 1


def test_nothing_of_a_failed_call_is_kept(broken: Broken) -> None:
    mindiesd.patch_all()
    x = torch.randn(4, 8)
    there = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        F.rms_norm(x, (8,))
        del x
        assert there() is None, "a traceback or a cycle holds the tensors of the call"
    finally:
        gc.enable()


def test_what_is_remembered_is_bounded(broken: Broken) -> None:
    migration = mindiesd.patch_all(only="torch_rms_norm")
    for rows in range(1, faults.MOST_KINDS + 50):
        x = torch.randn(rows, 4)
        assert F.rms_norm(x, (4,)).shape == x.shape
    assert broken.calls == faults.MOST_KINDS + 49
    assert sum(entry(migration, "torch_rms_norm").fell_back.values()) == broken.calls
    F.rms_norm(torch.randn(1, 4), (4,))
    F.rms_norm(torch.randn(faults.MOST_KINDS + 40, 4), (4,))
    assert broken.calls == faults.MOST_KINDS + 50, "the first is remembered, the last is not"


def test_a_failed_call_is_not_called_verified(broken: Broken) -> None:
    migration = mindiesd.patch_all(verify=3)
    for _ in range(2):
        F.rms_norm(torch.randn(4, 8), (8,))
    report = entry(migration, "torch_rms_norm")
    assert (report.verified, report.redirected, report.fell_back) == (0, 0, {REASON: 2})


def test_every_kernel_of_a_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_flux_transformer()
    inputs = flux_inputs(model)
    kernel = Broken(lambda: RuntimeError("no such kernel"))
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        names = [
            "attention", "rms_norm", "layer_norm", "layer_norm_scale_shift", "rotate", "gelu",
            "geglu", "swiglu",
        ]  # fmt: skip
        for name in names:
            monkeypatch.setattr(native, name, kernel)
        with mindiesd.patch_pipeline(model) as migration:
            for number in (1, 2):
                # Gated residuals are no kernel of these, and are still one addcmul.
                torch.testing.assert_close(model(**inputs, return_dict=False)[0], expected)
                if number == 1:
                    tried = kernel.calls
            assert kernel.calls == tried, "kinds of call that failed were tried again"
    reasons = [reason for patch in migration.report().patches for reason in patch.fell_back]
    assert reasons.count("the kernel raised RuntimeError: no such kernel") >= 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_shape_that_failed_and_a_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is of eager calls; compiling sees the replacement and stays whole."""
    right = native.rms_norm
    monkeypatch.setattr(native, "rms_norm", Broken(device_error))
    migration = mindiesd.patch_all(only="torch_rms_norm")
    x = torch.randn(4, 8)
    expected = F.rms_norm(x, (8,))
    monkeypatch.setattr(native, "rms_norm", right)
    compiled = torch.compile(lambda x: F.rms_norm(x, (8,)), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert entry(migration, "torch_rms_norm").traced == 1
    torch.compiler.reset()


def test_what_is_installed_has_the_signature_and_the_code_of_its_own() -> None:
    import inspect

    mindiesd.patch_all()
    installed = [ENGINE.state(name).replaced[-1].new for name in ("sdpa", "torch_rms_norm", "gelu")]
    assert len({id(function.__code__) for function in installed}) == 3
    assert list(inspect.signature(F.scaled_dot_product_attention).parameters)[:4] == [
        "query", "key", "value", "attn_mask",
    ]  # fmt: skip


def test_verification_that_breaks_down_leaves_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*args: Any) -> None:
        raise RuntimeError("the judge is ill")

    monkeypatch.setattr(verify, "judge", judge)
    x = torch.randn(4, 8)
    expected = F.rms_norm(x, (8,))
    migration = mindiesd.patch_all(verify=2)
    torch.testing.assert_close(F.rms_norm(x, (8,)), expected)
    report = entry(migration, "torch_rms_norm")
    assert report.verified == 0
    assert report.without_reference == {"could not be judged: RuntimeError": 1}
