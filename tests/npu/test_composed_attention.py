"""Attention that models write out, on the emulated device: one fused kernel, no softmax."""

from __future__ import annotations

import copy

import pytest
import torch

import mindiesd
from mindiesd.emulator import trace
from tests.emulator.tiny_models import MODELS, first_tensor, move, without_torch_npu
from tests.patches.composed_cases import CASES, build

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SOFTMAX = ("aten::_softmax", "aten::softmax.int", "aten::_safe_softmax")
MASK = 8  # launches at most, see docs/npu_backend.md; two of them casts of half precision


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def there(value, dtype=None):
    def to(tensor):
        return tensor.to("npu", dtype if tensor.is_floating_point() else None)

    return move(value, to)


def launched(counted, names) -> int:
    return sum(counted.launches[name] for name in names)


def fused(counted) -> int:
    return sum(n for name, n in counted.launches.items() if "attention" in name)


@torch.no_grad()
def run(module, given):
    args, kwargs = given
    return module(*args, **kwargs)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_one_kernel_an_attention(name: str, dtype) -> None:
    case = CASES[name]
    module = build(name, dtype)
    exact_module, on_device = copy.deepcopy(module).double(), copy.deepcopy(module).npu()
    # One picture in half precision says little: where a softmax picks one of two says it all.
    pictures = 6 if dtype is torch.bfloat16 else 1
    given, exact = [], []
    for seed in range(pictures):
        torch.manual_seed(seed)
        rounded = move(case.inputs(), lambda t: t.to(dtype) if t.is_floating_point() else t)
        exact.append(run(exact_module, move(rounded, _double)))
        given.append(there(rounded, dtype))
    with trace() as before:
        theirs = [run(on_device, one) for one in given]
    migration = mindiesd.patch_all(only=(case.record, "sdpa"))
    run(on_device, given[0])  # what is made of parameters is made once
    with trace() as after:
        ours = [run(on_device, one) for one in given]
    attentions = pictures * case.attentions
    assert launched(before, SOFTMAX) == attentions
    assert launched(after, SOFTMAX) == 0, after
    assert fused(after) == attentions, after
    # Two launches less; a mask that was not seen before is turned into what the kernel takes.
    # And three launches for the rows that see no key.
    of_masks = (MASK + 3) * attentions if "attention_mask" in given[0][1] else 0
    assert after.total <= before.total - 2 * attentions + of_masks, (before, after)
    (patch,) = [p for p in migration.report().patches if p.name == case.record]
    calls = (pictures + 1) * (case.attentions + case.others)
    assert (patch.redirected, patch.fell_back) == (calls, {})
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (other.dtype, other.shape, other.device)
    largest = max(one.abs().max().item() for one in exact)
    slack = 4 * torch.finfo(torch.float32).eps * max(1.0, largest)
    assert rms(ours, exact) <= 1.1 * rms(theirs, exact) + slack


def rms(results, exact) -> float:
    pairs = zip(results, exact, strict=True)
    errors = torch.cat([(one.cpu().double() - right).flatten() for one, right in pairs])
    return errors.square().mean().sqrt().item()


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(("masked", "kernels"), [(False, 1), (True, 3)])
def test_slices_together_or_each(masked: bool, kernels: int) -> None:
    """Without a mask the whole attention is one kernel; what that refuses is one for each slice."""
    module, (args, kwargs) = build("sliced").npu(), there(CASES["sliced"].inputs())
    if not masked:
        del kwargs["attention_mask"]
    expected = run(module, (args, kwargs))
    mindiesd.patch_all()
    run(module, (args, kwargs))
    with trace() as counted:
        out = run(module, (args, kwargs))
    assert (launched(counted, SOFTMAX), fused(counted)) == (0, kernels)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["unet1d", "consisid", "t5_film", "siglip_vision"])
def test_whole_models_have_no_softmax_left(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(model(**inputs))
    model, inputs = model.npu(), there(inputs)
    with torch.no_grad():
        with trace() as before:
            model(**inputs)
        migration = mindiesd.patch_all()
        with trace() as after:
            out = first_tensor(model(**inputs))
    assert launched(before, SOFTMAX) > 0
    assert launched(after, SOFTMAX) == 0, after
    assert fused(after) >= fused(before) + launched(before, SOFTMAX)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    found = [p for p in migration.report().patches if p.family == "composed_attention"]
    assert sum(p.redirected for p in found) == launched(before, SOFTMAX)
    assert not any(p.fell_back for p in found)
