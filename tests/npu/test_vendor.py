"""The vendor's library: named by an absolute path or not at all, and called inside its rules."""

import shutil
import subprocess

import pytest
import torch

from mindiesd import ParametersInvalid, attention_forward
from mindiesd.emulator import trace
from mindiesd.ops import norm
from mindiesd.ops.backends import npu
from mindiesd.ops.backends.npu import clock, dense, fusion, infer, laser, prompt, vendor
from mindiesd.ops.dispatch import KERNELS, MEASURED
from tests import oracles
from tests.npu.cases import Case, tensor

LA = (
    "la(Tensor query, Tensor key, Tensor value, Tensor? atten_mask=None, Tensor? alibi_mask=None, "
    "Tensor? drop_mask=None, float scale_value=1., int head_num=2, str input_layout='BNSD', "
    "float keep_prob=1., int pre_tokens=2147483647, int next_tokens=1, "
    "bool is_highPrecision=True) -> (Tensor, Tensor)"
)
LAYER_NORM = (
    "layernorm(Tensor input, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05, int impl_mode=0) -> (Tensor, Tensor, Tensor)"
)
seen = []


def la(
    query,
    key,
    value,
    mask=None,
    alibi=None,
    drop=None,
    scale_value=1.0,
    head_num=2,
    input_layout="BNSD",
    keep_prob=1.0,
    pre_tokens=2147483647,
    next_tokens=1,
    is_highPrecision=True,
):
    """What the vendor's Python layer relies on: float32 out, padded shapes, statistics first."""
    seen.append((query.shape, head_num, next_tokens, is_highPrecision))
    assert mask is None and input_layout == "BNSD" and pre_tokens == 2147483647
    assert query.dtype is torch.float16 and query.shape[3] == value.shape[3] == 128
    assert query.shape[2] % 256 == 0 and key.shape[2] % 256 == 0 and query.is_contiguous()
    scores = query.float() @ key.float().transpose(-1, -2) * scale_value
    return scores.logsumexp(-1), scores.softmax(-1) @ value.float()


def layernorm(x, shape, weight=None, bias=None, eps=1e-5, impl_mode=0):
    seen.append(("layernorm", impl_mode))
    out = torch.layer_norm(x, shape, weight, bias, eps)
    return out, out, out


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    folder = tmp_path_factory.mktemp("library")
    source, target = folder / "empty.c", folder / "libempty.so"
    source.write_text("int mindiesd_nothing;\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    # What loading a real one would do.
    operators = torch.library.Library("mindiesd", "FRAGMENT")
    operators.define(LA)
    operators.define(LAYER_NORM)
    operators.impl("la", la, "PrivateUse1")
    operators.impl("layernorm", layernorm, "PrivateUse1")
    yield str(target)
    operators._destroy()


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch):
    monkeypatch.setattr(vendor, "_loaded", None)
    monkeypatch.delenv(vendor.VARIABLE, raising=False)
    seen.clear()


@pytest.fixture
def loaded(library, monkeypatch):
    monkeypatch.setenv(vendor.VARIABLE, library)
    return library


def long(keys=2048, queries=2048, dtype=torch.float16, dim=64):
    query = tensor((1, 2, queries, dim), dtype, "BSND")
    return [query, *(tensor((1, 2, keys, dim), dtype, "BSND") for _ in range(2))]


NAMED = KERNELS["ascend_laser_attention", "BNSD"]


@pytest.mark.parametrize("path", ["relative/lib.so", "/nowhere/lib.so", "/tmp"])
def test_a_wrong_path_says_so(path, monkeypatch):
    monkeypatch.setenv(vendor.VARIABLE, path)
    query = torch.randn(1, 2, 5, 16, device="npu")
    with pytest.raises(ParametersInvalid, match=r"MINDIESD_KERNEL_LIBRARY.*absolute path") as found:
        attention_forward(query, query, query)
    assert path in str(found.value)


def test_what_is_no_library_says_so(tmp_path, monkeypatch):
    other = tmp_path / "text.so"
    other.write_text("no library")
    monkeypatch.setenv(vendor.VARIABLE, str(other))
    query = torch.randn(1, 2, 5, 16, device="npu")
    with pytest.raises(ParametersInvalid, match=r"text\.so"):
        attention_forward(query, query, query)


def test_laser_by_name(loaded):
    inputs = long(queries=2050)
    found = npu.explain(*inputs, kernel=NAMED)
    assert (found.kernel, found.reason) == (laser.NAME, "asked for by name")
    out = npu.attention(*inputs, None, None, True, NAMED)
    assert out.dtype is torch.float16 and out.shape == inputs[0].shape
    expected = oracles.attention(*(t.cpu() for t in inputs))
    oracles.assert_close(out.cpu(), expected)
    assert seen == [((1, 2, 2304, 128), 2, 1, True)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.bfloat16}, "dtype is not float16"),
        ({"keys": 2049}, "key length is not a multiple of 256"),
        ({"dim": 130}, "head dimension is not 1 to 128"),
    ],
)
def test_laser_beyond_its_rules(loaded, options, reason):
    with pytest.raises(ParametersInvalid, match=reason):
        npu.attention(*long(**options), None, None, True, NAMED)


def test_laser_never_gets_a_mask(loaded):
    inputs = [t.transpose(1, 2) for t in long()]
    with pytest.raises(ParametersInvalid, match="any mask"):
        attention_forward(
            *inputs, is_causal=True, opt_mode="manual", op_type="ascend_laser_attention"
        )


def test_laser_is_timed_for_long_self_attention_only(loaded, monkeypatch):
    names = []
    monkeypatch.setattr(clock, "ticks", lambda device: True)
    monkeypatch.setattr(clock, "milliseconds", lambda device, run: 1.0)
    of = dense._fastest.of

    def spy(key, candidates, time):
        names.append([run.name for run in candidates])
        return of(key, candidates, time)

    monkeypatch.setattr(dense._fastest, "of", spy)
    for module in (fusion, infer, prompt, laser):
        monkeypatch.setattr(module, "launch", lambda call, layout, q, k, v, mask: q)
    npu.attention(*long(), None, None, True, MEASURED)
    npu.attention(*long(4096, 4096), None, None, True, MEASURED)
    assert names == [
        [fusion.NAME, infer.NAME, prompt.NAME],
        [fusion.NAME, infer.NAME, prompt.NAME, laser.NAME],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layer_norm_by_the_library(loaded, dtype):
    x, weight, bias = (torch.randn(*s).to(dtype).npu() for s in ((2, 3, 16), (16,), (16,)))
    out = norm.layer_norm(x, (16,), weight, bias, 1e-5)
    assert seen == [("layernorm", 0)]
    oracles.assert_close(out.cpu(), oracles.layer_norm(x.cpu(), weight.cpu(), bias.cpu(), 1e-5))
    norm.layer_norm(x, (16,), weight.float(), bias.half(), 1e-5)
    norm.layer_norm(x, (16,), None, None, 1e-5)
    assert len(seen) == 1


def test_a_layer_norm_that_needs_gradients_is_not_the_librarys(loaded):
    given = [torch.randn(s).npu() for s in ((2, 3, 16), (16,), (16,))]
    for at in range(3):
        tensors = [t.clone().requires_grad_(i == at) for i, t in enumerate(given)]
        out = norm.layer_norm(tensors[0], (16,), *tensors[1:], 1e-5)
        (gradient,) = torch.autograd.grad(out.square().sum(), tensors[at])
        assert gradient.shape == given[at].shape
        assert not seen
        with torch.no_grad():
            norm.layer_norm(tensors[0], (16,), *tensors[1:], 1e-5)
        assert seen == [("layernorm", 0)]
        seen.clear()


def test_without_the_variable_nothing_is_looked_for(library):
    with trace() as counted:
        Case(*long(9, 9)).attend()
    assert counted.launches == {"npu::npu_fusion_attention": 1} and not seen
    assert vendor.load() is None
