"""The device under threads, compilers, autocast, offloading, and scripts written for CUDA."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.LayerNorm(32), nn.Linear(32, 16))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make()

    def forward(self, x, mask=None):
        q = self.inner(x).unflatten(-1, (2, 8)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        y = y + F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return F.rms_norm(y.transpose(1, 2).flatten(2), (16,))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention()


def test_training_matches_the_cpu(attention):
    x = torch.randn(2, 12, 16)
    attention(x).square().sum().backward()
    there = Attention()
    there.load_state_dict(attention.state_dict())
    there.npu()
    there(x.npu()).square().sum().backward()
    for one, other in zip(there.parameters(), attention.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers(fused):
    here = make()
    there = copy.deepcopy(here).npu()
    x = torch.randn(4, 16)
    for model, batch in ((here, x), (there, x.npu())):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for one, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), atol=1e-5, rtol=1e-4)


def test_in_many_threads():
    model = make()
    x = torch.randn(4, 16)
    expected = model(x)
    model.npu()
    results = []

    def work():
        for _ in range(5):
            there = x.npu().requires_grad_()
            y = model(there)
            y.sum().backward()
            torch.randn(3, device="npu")
            results.append((y.detach().cpu(), there.grad is not None))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    for got, has_grad in results:
        assert has_grad
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile(attention, backend, grad):
    torch._dynamo.reset()
    attention.npu()
    x = torch.randn(2, 12, 16, device="npu")
    with torch.set_grad_enabled(grad):
        expected = attention(x)
        got = torch.compile(attention, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    if grad:
        got.sum().backward()
        assert attention.inner[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = make().npu()
    x = torch.randn(2, 3, 4, 16, device="npu")
    with torch.autocast("npu", dtype=dtype):
        assert model[0](x).dtype == dtype
        assert F.scaled_dot_product_attention(x, x, x).dtype == dtype
        assert (x @ x.transpose(-1, -2)).dtype == dtype
        with torch.autocast("npu", enabled=False):
            assert model[0](x).dtype == torch.float32
    assert model[0](x).dtype == torch.float32
    # what the CPU would do under its own autocast is of no concern
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](x).dtype == torch.float32


def test_inference_mode():
    model = make().npu()
    with torch.inference_mode():
        y = model(torch.randn(4, 16, device="npu"))
        y.add_(1).mul_(2)
        z = y[1:].clone()
        assert z.is_inference()
        y.copy_(torch.zeros(4, 16))
        assert y.sum().item() == 0


def test_device_contexts():
    with torch.device("npu"):
        x = torch.randn(3, 4)
        assert x.device.type == "npu"
        layer = nn.Linear(4, 4)
        assert layer(x + 1).device.type == "npu"
        assert x.cpu().device.type == "cpu"
        torch.nn.init.normal_(layer.weight)
    torch.set_default_device("npu")
    try:
        assert (torch.ones(2) + 1).tolist() == [2, 2]
    finally:
        torch.set_default_device(None)


def test_save_and_load(tmp_path):
    x = torch.randn(3, 4, device="npu").half()
    torch.save({"x": x, "view": x.t()}, tmp_path / "x.pt")
    back = torch.load(tmp_path / "x.pt")
    assert back["x"].device.type == "npu"
    assert torch.equal(back["view"], x.t())
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu")["x"], x.cpu())


def test_streams_events_memory_and_no_clock():
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        y = torch.ones(4, device="npu") + 1
    torch.npu.current_stream().wait_stream(stream)
    end.record()
    end.synchronize()
    torch.npu.synchronize()
    assert y.sum().item() == 8
    assert start.query()
    assert math.isnan(start.elapsed_time(end))
    before = torch.npu.memory_allocated()
    block = torch.empty(1 << 20, device="npu")
    assert torch.npu.memory_allocated() >= before + (4 << 20)
    del block
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total
    torch.npu.empty_cache()
    assert torch.npu.get_device_properties(0).total_memory == total
    assert torch.npu.device_count() == 1
    assert torch.npu.is_available()


def test_checkpoint_vmap_and_jit():
    from torch.utils.checkpoint import checkpoint

    model = make().npu()
    x = torch.randn(4, 16, device="npu", requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    x = x.detach()
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


def test_accelerate_offloading():
    accelerate = pytest.importorskip("accelerate")
    model = make()
    x = torch.randn(4, 16)
    expected = model(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("npu", 0))
    torch.testing.assert_close(offloaded(x).cpu(), expected, atol=1e-5, rtol=1e-5)
    hooked, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(model), torch.device("npu"))
    torch.testing.assert_close(hooked(x).cpu(), expected, atol=1e-5, rtol=1e-5)
    assert hooked[0].weight.device.type == "npu"
    hook.offload()
    assert hooked[0].weight.device.type == "cpu"


CUDA_SCRIPT = """
import mindiesd.emulator; mindiesd.emulator.start()
import torch
from torch_npu.contrib import transfer_to_npu
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
model = torch.nn.Linear(4, 4).to("cuda")
x = torch.randn(3, 4).cuda()
g = torch.Generator("cuda").manual_seed(0)
y = torch.randn(3, 4, generator=g, device="cuda:0")
with torch.autocast("cuda", dtype=torch.float16):
    z = model(x + y)
q = z.reshape(1, 3, 2, 2)
torch.nn.functional.scaled_dot_product_attention(q, q, q)
torch.cuda.synchronize()
print(model.weight.device, x.device, y.device, z.dtype, torch.cuda.memory_allocated() > 0)
"""


def test_scripts_written_for_cuda():
    done = subprocess.run(
        [sys.executable, "-c", CUDA_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["npu:0", "npu:0", "npu:0", "torch.float16", "True"]
