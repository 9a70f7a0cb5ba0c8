"""No call beyond a documented limit reaches a kernel.

The emulated kernels raise where the documentation rules a call out, so running at and beyond every
limit proves it; sizes that no test machine holds are decided from the description alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindiesd.ops import attention
from mindiesd.ops.backends import npu
from mindiesd.ops.backends.npu import dense, forms, fusion, infer, laser, prompt, soc
from mindiesd.ops.backends.npu.call import Call
from mindiesd.ops.masks import AttentionMask, Band
from tests.npu.cases import Case, tensor

CALL = Call(
    series=soc.A2,
    device=0,
    dtype=torch.float16,
    batch=2,
    heads=8,
    kv_heads=8,
    queries=64,
    keys=64,
    dim=64,
    value_dim=64,
    scale=0.125,
    head_first=True,
    layout="BNSD",
    dense=True,
    keep="",
    bias="",
    bias_dtype=None,
    bias_rows=False,
    band=None,
    frozen=False,
)
BIAS = {"bias": "shared", "bias_dtype": torch.float16, "bias_rows": True}


@pytest.mark.parametrize("module", [fusion, infer, prompt])
def test_the_plain_call_is_legal(module):
    assert module.refusal(CALL) is None


@pytest.mark.parametrize(
    ("module", "inside", "outside"),
    [
        (fusion, {"dim": 512, "value_dim": 512}, {"dim": 513, "value_dim": 513}),
        (fusion, {"value_dim": 512}, {"value_dim": 513}),
        (fusion, {"dim": 1, "value_dim": 1}, {"dim": 0}),
        (fusion, {"heads": 256, "kv_heads": 256}, {"heads": 257, "kv_heads": 257}),
        (fusion, {"queries": 1 << 20}, {"queries": (1 << 20) + 1}),
        (fusion, {"keys": 1 << 20}, {"keys": (1 << 20) + 1}),
        (fusion, {"batch": 2 << 20}, {"batch": (2 << 20) + 1}),
        (fusion, {"dtype": torch.float32}, {"dtype": torch.float64}),
        (fusion, {"dtype": torch.bfloat16}, {"dtype": torch.int8}),
        (fusion, BIAS, {**BIAS, "bias_dtype": torch.float64}),
        (fusion, {"scale": 1e38}, {"scale": 1e39}),
        (fusion, {"series": soc.A950}, {"series": soc.I310P}),
        (fusion, {"series": soc.A3}, {"series": soc.UNKNOWN}),
        (infer, {"dim": 512, "value_dim": 512}, {"dim": 513}),
        (infer, {"heads": 256, "kv_heads": 4}, {"heads": 257, "kv_heads": 257}),
        (infer, {"heads": 64, "kv_heads": 1}, {"heads": 65, "kv_heads": 1}),
        (infer, {"dtype": torch.bfloat16}, {"dtype": torch.float32}),
        (infer, {"keep": "batch"}, {"keep": "heads"}),
        (infer, {"keep": "heads", "heads": 1, "kv_heads": 1}, {"keep": "heads"}),
        (infer, BIAS, {**BIAS, "bias": "heads"}),
        (infer, BIAS, {**BIAS, "bias_dtype": torch.float32}),
        (infer, {"queries": 1}, {"queries": 1, "keep": "batch"}),
        (infer, {"queries": 2, "band": Band(None, 0)}, {"queries": 1, "band": Band(None, 0)}),
        (infer, {"series": soc.A3}, {"series": soc.A950}),
        (infer, {}, {"series": soc.I310P}),
        (prompt, {"dim": 512}, {"dim": 513}),
        (
            prompt,
            {"dim": 40, "value_dim": 40, "batch": 128},
            {"dim": 40, "value_dim": 40, "batch": 129},
        ),
        (prompt, {"batch": 65536}, {"batch": 65537}),
        (prompt, {"heads": 256, "kv_heads": 4}, {"heads": 257, "kv_heads": 257}),
        (prompt, {"heads": 64, "kv_heads": 1}, {"heads": 65, "kv_heads": 1}),
        (prompt, {"dtype": torch.bfloat16}, {"dtype": torch.float32}),
        (prompt, {"keep": "batch"}, {"keep": "heads"}),
        (prompt, {}, BIAS),
        (prompt, {"series": soc.A3}, {"series": soc.A950}),
        (prompt, {"series": soc.I310P}, {"series": soc.I310P, "dtype": torch.bfloat16}),
        (prompt, {"series": soc.I310P, "batch": 128}, {"series": soc.I310P, "batch": 129}),
        (prompt, {"series": soc.I310P, "keys": 65535}, {"series": soc.I310P, "keys": 65536}),
        (prompt, {"series": soc.I310P, "kv_heads": 1}, {"series": soc.I310P, **BIAS}),
    ],
)
def test_limits(module, inside, outside):
    assert module.refusal(CALL._replace(**inside)) is None
    assert isinstance(module.refusal(CALL._replace(**outside)), str)


def test_limits_of_laser_attention(monkeypatch):
    monkeypatch.setattr(laser.vendor, "operator", lambda name: object())
    legal = CALL._replace(queries=4096, keys=4096)
    assert laser.refusal(legal) is None
    for outside in (
        {"dtype": torch.bfloat16},
        {"keep": "shared"},
        BIAS,
        {"band": Band(None, 0)},
        {"dim": 129},
        {"value_dim": 129},
        {"kv_heads": 4},
        {"keys": 4097},
        {"series": soc.A950},
        {"frozen": True},
    ):
        assert laser.refusal(legal._replace(**outside)), outside
    monkeypatch.setattr(laser.vendor, "operator", lambda name: None)
    assert "MINDIESD_KERNEL_LIBRARY" in laser.refusal(legal)


def test_wide_rows_go_heads_first_to_pfa():
    wide = CALL._replace(heads=128, kv_heads=128, dim=512, value_dim=512)
    assert prompt.layout_of(wide, "BSND") == "BNSD"
    assert prompt.layout_of(CALL, "BSND") == "BSND"


@pytest.mark.parametrize(
    ("number", "series"),
    [
        (103, ""),
        (200, "310P"),
        (205, "310P"),
        (220, "A2"),
        (225, "A2"),
        (240, ""),
        (250, "A3"),
        (256, "A3"),
        (260, "950"),
    ],
)
def test_series(number, series):
    assert soc.of_number(number) == series


@pytest.mark.parametrize("series", [soc.A2, soc.A3, soc.A950, soc.I310P, soc.UNKNOWN])
def test_first_choices(series):
    call = CALL._replace(series=series)
    first = {"A2": fusion.NAME, "A3": fusion.NAME, "950": fusion.NAME, "310P": prompt.NAME}
    assert dense.plan(call, None).kernel == first.get(series, "composed")
    biased = call._replace(**BIAS)
    second = {"A2": "npu_fusion_attention_v2", "A3": "npu_fusion_attention_v2", "950": fusion.NAME}
    assert dense.plan(biased, None).kernel == second.get(series, "composed")
    traced = call._replace(frozen=True)
    third = {"A2": "npu_fusion_attention_v3", "A3": "npu_fusion_attention_v3"}
    assert dense.plan(traced, None).kernel == third.get(series, first.get(series, "composed"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "composed"),
    [
        ((1, 2, 4, 512), False),
        ((1, 2, 4, 513), True),
        ((1, 256, 2, 8), False),
        ((1, 257, 2, 8), True),
        ((129, 1, 2, 8), False),
        ((1, 2, 4, 3), False),
        ((1, 130, 2, 511), False),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_at_and_beyond_the_limits(dtype, shape, composed, masked):
    query, key, value = (tensor(shape, dtype, "BSND") for _ in range(3))
    mask = torch.rand(shape[2], shape[2], device="npu") > 0.4 if masked else None
    case = Case(query, key, value, mask)
    found = npu.explain(query, key, value, case.parts())
    assert (found.kernel == "composed") is composed
    case.check(case.attend())
    for module in (infer, prompt):
        call = dense.describe(query, key, value, case.parts(), None, True)
        if module.refusal(call) is None:
            out = module.launch(
                call, prompt.layout_of(call, "BSND"), query, key, value, case.parts()
            )
            case.check(out)


@pytest.mark.parametrize("shape", [(4, 5, 5), (1, 5, 5), (4, 1, 5), (5, 1), (1, 1), (2, 1, 5, 1)])
def test_masks_that_no_kernel_takes_as_they_are(shape):
    query, key, value = (tensor((2, 4, 5, 8), torch.float16, "BNSD") for _ in range(3))
    for mask in (torch.rand(shape) > 0.4, torch.randn(shape), torch.randn(shape).half()):
        case = Case(query, key, value, mask.npu())
        case.check(case.attend())
        call = dense.describe(query, key, value, case.parts(), None, True)
        for module in (infer, prompt):
            if module.refusal(call) is None:
                case.check(module.launch(call, "BNSD", query, key, value, case.parts()))


def test_keep_and_bias_in_one_mask():
    from mindiesd.ops.backends import backend_for
    from tests import oracles

    query, key, value = (tensor((2, 4, 5, 8), torch.float32, "BNSD") for _ in range(3))
    keep, bias = torch.rand(2, 1, 1, 5) > 0.4, torch.randn(1, 4, 5, 5)
    mask = AttentionMask(keep.npu(), bias.npu(), Band(None, 1))
    out = backend_for("npu").attention(query, key, value, mask, None, True, None)
    inside = keep & Band(None, 1).matrix(5, 5, torch.device("cpu"))
    expected = oracles.attention(query.cpu(), key.cpu(), value.cpu(), inside, bias)
    oracles.assert_close(out.cpu(), expected)


def test_full_masks_have_documented_shapes():
    device = torch.device("npu", 0)
    for keep, expected in (
        ((5, 7), (1, 1, 5, 7)),
        ((2, 1, 1, 7), (2, 1, 5, 7)),
        ((1, 1, 1, 1), (1, 1, 5, 7)),
        ((4, 1, 7), (2, 4, 5, 7)),
        ((1, 4, 5, 7), (2, 4, 5, 7)),
    ):
        query, key = torch.empty(2, 4, 5, 8, device=device), torch.empty(2, 4, 7, 8, device=device)
        mask = AttentionMask(torch.ones(keep, dtype=torch.bool, device=device))
        call = dense.describe(query, key, key, mask, None, True)
        made = forms.full(mask, call, device)
        assert made.shape == expected and made.is_contiguous() and made.dtype is torch.bool
        bias = AttentionMask(None, torch.zeros(keep, device=device))
        call = dense.describe(query, key, key, bias, None, True)
        made, out = forms.biased(bias, call, torch.float32, one_row=True)
        assert made.shape in {(2, 4, 5, 7), (1, 4, 5, 7), (2, 4, 1, 7)} and made.is_contiguous()
        assert out.shape == expected and out.is_contiguous() and out.dtype is torch.bool


PROGRAM = """
from mindiesd import emulator
emulator.start()
import torch
from hypothesis import given, settings
from mindiesd.ops.backends import npu
from mindiesd.ops.backends.npu import soc
from mindiesd.ops import norm
from mindiesd.ops.rope import rotate
from tests import oracles
from tests.npu.cases import HALF, cases

assert soc.series() == {series!r}, soc.series()
seen = set()

@settings(max_examples=60, deadline=None)
@given(cases(dtypes=({dtypes})))
def run(case):
    query, key, value = case.heads_first()
    seen.add(npu.explain(query, key, value, case.parts(), case.scale).kernel)
    case.check(case.attend())

run()
print(sorted(seen))
for dtype in ({dtypes}):
    x = torch.randn(2, 3, 5, 128).to(dtype).npu()
    for weight in (None, torch.randn(128).npu(), torch.randn(128).to(dtype).npu()):
        out = norm.rms_norm(x, weight, 1e-6)
        own = None if weight is None else weight.cpu()
        oracles.assert_close(out.cpu(), oracles.rms_norm(x.cpu(), own, 1e-6))
    for interleaved in (False, True):
        cos, sin = torch.rand(2, 5, 128).to(dtype).npu()
        out = rotate(x, cos, sin, interleaved)
        oracles.assert_close(out.cpu(), oracles.rope(x.cpu(), cos.cpu(), sin.cpu(), interleaved))
"""


@pytest.mark.parametrize(
    ("name", "series", "dtypes", "kernels"),
    [
        (
            "Ascend310P3",
            "310P",
            "torch.float16, torch.float32",
            "composed npu_prompt_flash_attention",
        ),
        (
            "Ascend910_9391",
            "A3",
            "torch.bfloat16, torch.float32",
            "npu_fusion_attention npu_fusion_attention_v2",
        ),
        ("Ascend950DT_9571", "950", "torch.float16, torch.float32", "npu_fusion_attention"),
    ],
)
def test_the_other_series(name, series, dtypes, kernels):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "MINDIESD_EMULATOR_SOC": name, "PYTHONPATH": str(root)}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(series=series, dtypes=dtypes)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000]
    assert done.stdout.splitlines()[0] == str(kernels.split())


def test_tensors_on_a_series_without_a_table(monkeypatch):
    monkeypatch.setattr(soc, "series", lambda: soc.UNKNOWN)
    query, key, value = (tensor((2, 4, 5, 8), torch.float16, "BNSD") for _ in range(3))
    found = npu.explain(query, key, value)
    assert (found.kernel, found.reason) == ("composed", "no table for this series of Ascend")
    case = Case(query, key, value, torch.rand(5, 5, device="npu") > 0.4)
    case.check(case.attend())
    assert attention.attend(query, key, value).device == query.device
