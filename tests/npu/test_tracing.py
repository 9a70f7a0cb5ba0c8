"""Under torch.compile and FakeTensor: one graph, nothing read from the device, nothing cached."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mindiesd
from mindiesd.ops import ada_norm, attention, norm
from mindiesd.ops.backends.npu import dense, derived
from mindiesd.ops.masks import Band
from mindiesd.ops.rope import rotate

HALF = torch.float16


def made(*shape, dtype=HALF):
    return torch.randn(*shape).to(dtype).npu()


def attention_case(mask=None, **options):
    inputs = [made(2, 6, 4, 16).transpose(1, 2) for _ in range(3)]
    if mask is None:
        return (lambda q, k, v: attention.attend(q, k, v, **options)), inputs
    return (lambda q, k, v, m: attention.attend(q, k, v, m, **options)), [*inputs, mask]


def public(**extras):
    inputs = [made(2, 6, 4, 16) for _ in range(3)]
    return (lambda q, k, v: mindiesd.attention_forward(q, k, v, **extras)), inputs


def varlen(listed):
    q, cu = made(6, 4, 16), torch.tensor([0, 2, 6], dtype=torch.int32).npu()
    if listed:
        return (lambda q: mindiesd.attention_forward_varlen(q, q, q, [0, 2, 6], [0, 2, 6])), [q]
    return (lambda q, cu: mindiesd.attention_forward_varlen(q, q, q, cu, cu, causal=True)), [q, cu]


def modulated(batch):
    x, scale, shift = made(batch, 6, 16), *made(2, batch, 1, 16)
    return (lambda x, a, b: ada_norm.layer_norm_scale_shift(x, None, None, 1e-6, a, b)), [
        x,
        scale,
        shift,
    ]


CASES = {
    "plain": attention_case,
    "causal": lambda: attention_case(is_causal=True),
    "band": lambda: attention_case(band=Band(-2, 1)),
    "bool": lambda: attention_case(torch.rand(2, 1, 1, 6).npu() > 0.3),
    "bool and causal": lambda: attention_case(torch.rand(6, 6).npu() > 0.3, is_causal=True),
    "half bias": lambda: attention_case(made(1, 4, 6, 6)),
    "float bias": lambda: attention_case(
        torch.where(torch.rand(2, 1, 6, 6) > 0.3, 0.5, -torch.inf).npu()
    ),
    "scale": lambda: attention_case(scale=0.3),
    "public": public,
    "public static": lambda: public(opt_mode="static", window_size=(1, 1)),
    "manual": lambda: public(opt_mode="manual", op_type="prompt_flash_attn", layout="BSH"),
    "unfused": lambda: public(fused=False),
    "varlen": lambda: varlen(False),
    "varlen of lists": lambda: varlen(True),
    "rms": lambda: ((lambda x, w: norm.rms_norm(x, w, 1e-6)), [made(2, 6, 16), made(16)]),
    "rms of ones": lambda: ((lambda x: norm.rms_norm(x, None, 1e-6)), [made(2, 6, 16)]),
    "layer norm": lambda: (nn.LayerNorm(16).npu().requires_grad_(False), [made(2, 6, 16).float()]),
    "modulated": lambda: modulated(1),
    "modulated batch": lambda: modulated(2),
    "rotate": lambda: (
        (lambda x, c, s: rotate(x, c, s, False)),
        [made(2, 6, 4, 16), *made(2, 1, 6, 1, 16, dtype=torch.float32)],
    ),
    "interleaved": lambda: (
        (lambda x, c, s: rotate(x, c, s, True)),
        [made(2, 6, 4, 16), *made(2, 1, 6, 1, 16)],
    ),
    "gelu": lambda: (mindiesd.get_activation_layer("gelu"), [made(2, 6, 16)]),
}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph(name, backend):
    with torch.no_grad():
        function, inputs = CASES[name]()
        expected = function(*inputs)
        for table in (derived.TABLE, derived._constants, dense._plans, dense._fastest):
            table.clear()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for _ in range(2):
            out = compiled(*inputs)
    torch.testing.assert_close(out.cpu(), expected.cpu(), atol=3e-3, rtol=3e-3)
    assert out.dtype is expected.dtype
    if name != "varlen":
        # The custom operator of varlen runs eagerly inside the graph, and may remember lengths.
        assert not len(derived.TABLE)
    if not name.startswith("varlen"):
        assert not derived._constants and not dense._plans and not len(dense._fastest)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("layer norm", "varlen")])
def test_fake_tensors(name):
    function, inputs = CASES[name]()
    mode = FakeTensorMode()
    fake = [mode.from_tensor(tensor) for tensor in inputs]
    with torch.no_grad():
        expected = function(*inputs)
        for table in (derived.TABLE, derived._constants, dense._plans):
            table.clear()
        with mode:
            out = function(*fake)
    assert out.shape == expected.shape and out.dtype is expected.dtype
    assert out.device == expected.device
    assert not len(derived.TABLE) and not derived._constants and not dense._plans


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_lengths(dynamic):
    def call(query, mask):
        return attention.attend(query, query, query, mask)

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 9):
        query, mask = made(1, 2, length, 16), torch.rand(length, length).npu() > 0.3
        torch.testing.assert_close(
            compiled(query, mask).cpu(), call(query, mask).cpu(), atol=3e-3, rtol=3e-3
        )


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    program = """
from mindiesd import emulator
emulator.start()
import torch
from mindiesd.ops import attention
query = torch.randn(1, 2, 5, 16).npu()
out = torch.compile(attention.attend, backend="eager", fullgraph=True)(query, query, query)
assert torch.allclose(out.cpu(), attention.attend(query, query, query).cpu(), atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_captured_calls_cache_nothing(monkeypatch):
    monkeypatch.setattr("mindiesd.ops.backends.npu.call._capturing", lambda: True)
    mask = torch.rand(2, 1, 1, 6).npu() > 0.3
    function, inputs = attention_case(mask)
    function(*inputs)
    attention.attend(*inputs[:3], is_causal=True)
    assert not len(derived.TABLE) and not derived._constants
