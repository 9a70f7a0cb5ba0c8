"""Context parallelism: two processes share one sequence, and the result is that of one process.

diffusers' ``enable_parallelism`` divides by the number of accelerators, of which a host without one
has none: ``ZeroDivisionError`` before anything is parallel. The test says there is one; all that
follows is diffusers' own, over gloo.
"""

from __future__ import annotations

import socket

import pytest

from tests.processes import run_python

WORK = """
import os
import torch
import torch.distributed as dist

torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)

import mindiesd
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch as dispatch
from tests.tiny import flux_inputs, tiny_flux_transformer

AttentionBackendName = dispatch.AttentionBackendName


def flux():
    model = tiny_flux_transformer()
    return model, flux_inputs(model, text=8)


def backend_of(model, name):
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = AttentionBackendName(name)


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs, return_dict=False)[0]


model, inputs = flux()
alone = forward(model, inputs)
model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
torch.testing.assert_close(forward(model, inputs), alone, atol=2e-5, rtol=2e-5)
migration = mindiesd.patch_all()
for name in ("native", "flash", "sage", "_native_npu"):
    backend_of(model, name)
    torch.testing.assert_close(forward(model, inputs), alone, atol=2e-5, rtol=2e-5)
assert migration.ledger["diffusers_dispatch"].snapshot()[0] == 6
assert migration.ledger["sdpa"].snapshot()[0] == 8

# One attention with masks: each rank has half of the queries, keys and values, and the whole mask.
torch.manual_seed(0)
whole = [torch.randn(2, 8, 2, 16) for _ in range(3)]
parts = [tensor.chunk(2, 1)[rank] for tensor in whole]
additive = torch.tensor([[0.0] * 5 + [-10000.0] * 3, [0.0] * 8])[:, None, None]
attend = dispatch.dispatch_attention_fn
for name, mask in (
    ("_native_npu", additive),
    ("_native_npu", torch.zeros_like(additive)),
    ("_native_npu", additive == 0),
    ("xformers", additive),
    ("flash_varlen", additive == 0),
):
    alone = attend(*whole, attn_mask=mask, backend=AttentionBackendName.NATIVE)
    part = attend(
        *parts,
        attn_mask=mask,
        backend=AttentionBackendName(name),
        parallel_config=model._parallel_config,
    )
    torch.testing.assert_close(part, alone.chunk(2, 1)[rank], atol=2e-5, rtol=2e-5)
mindiesd.unpatch_all()

# A ring needs each part's log-sum-exp, which nothing here returns.
model, inputs = flux()
mindiesd.patch_all()
model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
backend_of(model, "flash")
try:
    forward(model, inputs)
except mindiesd.ParametersInvalid as error:
    assert "ulysses_degree" in str(error), error
else:
    raise AssertionError("a ring was computed")
dist.barrier()
dist.destroy_process_group()
print("right on rank", rank)
"""


@pytest.mark.slow
def test_two_ranks_compute_what_one_does():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = f"""
        import os, subprocess, sys
        work = {WORK!r}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", work],
                env=dict(os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
        for rank, text in enumerate(said):
            assert f"right on rank {{rank}}" in text, "".join(said)
        """
    run_python(launch, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
