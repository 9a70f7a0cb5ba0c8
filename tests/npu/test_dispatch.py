"""opt_mode on the emulated device: static, measured once, or by name."""

import threading

import pytest
import torch

from mindiesd import ParametersInvalid, attention_forward
from mindiesd.emulator import trace
from mindiesd.ops import attention
from mindiesd.ops.backends import npu
from mindiesd.ops.backends.npu import clock, dense, fusion, infer, prompt
from mindiesd.ops.dispatch import KERNELS, MEASURED, Fastest
from mindiesd.ops.masks import AttentionMask
from tests.npu.cases import Case, tensor

PFA, FIA, FA = (module.NAME for module in (prompt, infer, fusion))


def qkv(length=9, dtype=torch.float16, dim=16):
    return [tensor((2, 4, length, dim), dtype, "BSND") for _ in range(3)]


@pytest.fixture
def ticking(monkeypatch):
    """A clock that says which kernel was timed, and that the inference kernel is the fastest."""
    timed = []
    times = {FA: 3.0, FIA: 1.0, PFA: 2.0}

    def milliseconds(device, run):
        with trace() as counted:
            run()
        (name,) = [n.removeprefix("npu::") for n in counted.launches if n.startswith("npu::")]
        timed.append(name)
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(clock, "ticks", lambda device: True)
    monkeypatch.setattr(clock, "milliseconds", milliseconds)
    return timed, times


def test_a_device_without_a_clock_is_not_measured():
    query, key, value = qkv()
    with trace() as counted:
        attention_forward(*(t.transpose(1, 2) for t in (query, key, value)))
    assert counted.launches == {"npu::npu_fusion_attention": 1}
    assert not clock.ticks(query.device)


def test_runtime_takes_the_fastest_and_measures_once(ticking):
    timed, _ = ticking
    inputs = [t.transpose(1, 2) for t in qkv()]
    for _ in range(5):
        with trace() as counted:
            attention_forward(*inputs)
    assert timed == [FA, FIA, PFA]
    assert counted.launches == {f"npu::{FIA}": 1}
    found = npu.explain(*inputs, head_first=False, kernel=MEASURED)
    assert (found.kernel, found.reason) == (FIA, "the fastest when timed")


def test_static_and_redirected_calls_measure_nothing(ticking):
    timed, _ = ticking
    inputs = qkv()
    with trace() as counted:
        attention.attend(*inputs)
        attention_forward(*inputs, head_first=True, opt_mode="static")
    assert not timed and counted.launches == {f"npu::{FA}": 2}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c._replace(
            query=c.query.bfloat16(), key=c.key.bfloat16(), value=c.value.bfloat16()
        ),
        lambda c: c._replace(scale=0.5),
        lambda c: c._replace(causal=True),
        lambda c: c._replace(mask=torch.ones(9, 9, dtype=torch.bool, device="npu")),
        lambda c: c._replace(key=c.key[:, :2], value=c.value[:, :2]),
        lambda c: c._replace(query=c.query.contiguous()),
        lambda c: c._replace(query=c.query[:, :, :5]),
    ],
)
def test_every_kind_of_call_has_its_own_measurement(ticking, change):
    timed, _ = ticking
    case = Case(*qkv())
    case.attend(MEASURED)
    first = len(timed)
    case.attend(MEASURED)
    assert len(timed) == first
    other = change(case)
    other.check(other.attend(MEASURED))
    assert len(timed) > first


def test_a_failing_candidate_is_dropped_with_its_reason(ticking):
    _timed, times = ticking
    times[FIA] = RuntimeError("EZ9999: inner error\nmore")
    case = Case(*qkv())
    case.check(case.attend(MEASURED))
    found = npu.explain(*case[:3], kernel=MEASURED)
    assert found.kernel == PFA
    assert found.refused == ((FIA, "RuntimeError: EZ9999: inner error"),)
    for name in times:
        times[name] = RuntimeError("no")
    other = Case(*qkv(7))
    other.check(other.attend(MEASURED))


def test_one_measurement_under_eight_threads(ticking):
    timed, _ = ticking
    case = Case(*qkv())
    barrier, outs = threading.Barrier(8), []

    def work():
        barrier.wait()
        outs.append(case.attend(MEASURED))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 8 and len(timed) == 3
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_fastest_is_bounded_and_survives_interruptions():
    table = Fastest(size=3)
    for key in range(10):
        assert table.of(key, ["a", "b"], {"a": 2.0, "b": 1.0}.get).winner == "b"
    assert len(table) == 3

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.of("key", ["a"], interrupted)
    assert table.known("key") is None
    assert table.of("key", ["a"], lambda _: 1.0).winner == "a"
    assert table.of("nan", ["a", "b"], {"a": float("nan"), "b": 1.0}.get) == (
        "b",
        (("a", "no time was measured"),),
    )


def test_waiting_threads_measure_after_an_interruption():
    table, entered, release, seen = Fastest(), threading.Event(), threading.Event(), []

    def slow(_):
        entered.set()
        release.wait()
        raise KeyboardInterrupt

    def first():
        try:
            table.of("key", ["a"], slow)
        except KeyboardInterrupt:
            seen.append("interrupted")

    def second():
        entered.wait()
        seen.append(table.of("key", ["a"], lambda _: 1.0).winner)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    entered.wait()
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["a", "interrupted"]


@pytest.mark.parametrize("name", ["fused_attn_score", "prompt_flash_attn"])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("head_first", [True, False])
def test_manual_is_honoured(name, layout, head_first, monkeypatch):
    monkeypatch.delenv("MINDIE_SD_FA_TYPE", raising=False)
    inputs = qkv()
    if not head_first:
        inputs = [t.transpose(1, 2) for t in inputs]
    kernel = {"fused_attn_score": FA, "prompt_flash_attn": PFA}[name]
    with trace() as counted:
        out = attention_forward(
            *inputs, head_first=head_first, opt_mode="manual", op_type=name, layout=layout
        )
    assert counted.launches[f"npu::{kernel}"] == 1
    found = npu.explain(*inputs, head_first=head_first, kernel=KERNELS[name, layout])
    assert (found.kernel, found.layout, found.reason) == (kernel, layout, "asked for by name")
    Case(*inputs, head_first=head_first).check(out)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("prompt_flash_attn", {"dtype": torch.float32}, "dtype is not float16 or bfloat16"),
        ("prompt_flash_attn", {"dim": 513}, "head dimension is not 1 to 512"),
        ("fused_attn_score", {"dtype": torch.float64}, "dtype is not float16, bfloat16 or float32"),
        ("fused_attn_score", {"dim": 513}, "head dimension is not 1 to 512"),
        ("ascend_laser_attention", {"length": 2048}, "no library with the kernel"),
    ],
)
def test_illegal_combinations_are_named(name, change, reason, monkeypatch):
    monkeypatch.delenv("MINDIE_SD_FA_TYPE", raising=False)
    monkeypatch.delenv("MINDIESD_KERNEL_LIBRARY", raising=False)
    with pytest.raises(ParametersInvalid, match=reason) as caught:
        attention_forward(*qkv(**change), head_first=True, opt_mode="manual", op_type=name)
    assert name in str(caught.value)


def test_short_laser_calls_go_to_fused_attention(monkeypatch):
    monkeypatch.setenv("MINDIE_SD_FA_TYPE", "ascend_laser_attention")
    inputs = qkv()
    with trace() as counted:
        attention_forward(*inputs, head_first=True, opt_mode="manual")
    assert counted.launches == {f"npu::{FA}": 1}
    found = npu.explain(*inputs, kernel=KERNELS["ascend_laser_attention", "BNSD"])
    assert "2048" in found.reason


def test_masks_per_head_and_biases_by_name():
    inputs = qkv()
    keep = torch.ones(2, 4, 9, 9, dtype=torch.bool, device="npu")
    bias = torch.zeros(9, 9, device="npu", dtype=torch.float16)
    for mask, reason in (
        (AttentionMask(keep), "a mask for each head"),
        (AttentionMask(None, bias), "an additive mask"),
    ):
        with pytest.raises(ParametersInvalid, match=reason):
            npu.explain(*inputs, mask, kernel=KERNELS["prompt_flash_attn", "BNSD"])


def test_plans_are_remembered_and_bounded(monkeypatch):
    monkeypatch.setattr(dense, "PLANS", 4)
    for length in range(1, 12):
        attention.attend(*qkv(length))
    assert len(dense._plans) <= 4
