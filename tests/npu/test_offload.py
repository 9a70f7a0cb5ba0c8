"""Pipelines that move their models between the host and the device, patched as unpatched."""

from __future__ import annotations

import pytest
import torch

import mindiesd
from mindiesd.emulator import trace
from tests.emulator.test_pipelines import call, make

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MODES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def draw(pipe):
    return call(pipe, "npu", generator=torch.Generator("cpu").manual_seed(3)).cpu()


def counts(migration):
    return {p.name: p.redirected for p in migration.report().patches if p.redirected}


def scope_left(pipe):
    return [
        name
        for model in pipe.components.values()
        if isinstance(model, torch.nn.Module)
        for module in model.modules()
        for name in vars(module)
        if "mindiesd" in name
    ]


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("mode", MODES)
def test_in_a_block(mode, when):
    """Each picture is redirected as much as the first; model offload hooks on anew after each."""
    expected = draw(make().to("npu"))
    pipe = make()
    if when == "before":
        getattr(pipe, mode)(device="npu")
        draw(pipe)
    with mindiesd.patch_pipeline(pipe) as migration:
        if when == "inside":
            getattr(pipe, mode)(device="npu")
        for number in (1, 2):
            with trace() as counted:
                got = draw(pipe)
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
            if number == 1:
                once = counts(migration)
            assert once["sdpa"] > 0 and counted.total > 0
            assert counts(migration) == {name: number * count for name, count in once.items()}
    inside = counts(migration)
    torch.testing.assert_close(draw(pipe), expected, atol=1e-5, rtol=0)
    assert counts(migration) == inside
    pipe.remove_all_hooks()
    assert scope_left(pipe) == []


@pytest.mark.parametrize("mode", MODES)
def test_in_the_process(mode):
    expected = draw(make().to("npu"))
    pipe = make()
    getattr(pipe, mode)(device="npu")
    migration = mindiesd.patch_all(verify=1)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), expected, atol=2e-4, rtol=0)
    report = migration.report()
    failed = [line for patch in report.patches for line in patch.failed_verification]
    assert not failed, failed
    assert counts(migration)["sdpa"] > 0
    assert any(patch.verified for patch in report.patches)
    mindiesd.unpatch_all()
    torch.testing.assert_close(draw(pipe), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_to_inside_a_block(when):
    """A pipeline that is moved inside of its block goes on there."""
    expected = draw(make().to("npu"))
    pipe = make()
    if when == "before":
        pipe.to("npu")
    with mindiesd.patch_pipeline(pipe) as migration:
        pipe.to("npu")
        torch.testing.assert_close(draw(pipe), expected, atol=2e-4, rtol=0)
        first = counts(migration)
        pipe.to("cpu").to("npu")
        torch.testing.assert_close(draw(pipe), expected, atol=2e-4, rtol=0)
        assert counts(migration) == {name: 2 * count for name, count in first.items()}
    assert scope_left(pipe) == []
