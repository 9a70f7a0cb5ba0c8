"""A script that says "cuda" runs on the emulated NPU, and everything is as before afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mindiesd.patches.cuda_names import of_npu, translated
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *command: str, check: bool = True, **variables: str):
    dropped = ("MINDIESD_", "_MINDIESD_", "ASCEND_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **variables)
    done = subprocess.run(
        [sys.executable, *command],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done


def launch(folder: Path, *command: str, **kwargs):
    return run(folder, "-m", "mindiesd.cli", *command, **kwargs)


# The script, as somebody wrote it for CUDA. DEVICE is not in it: "cpu" runs elsewhere, for the
# picture to compare with.
SCRIPT = """
import sys
import torch
from tests.emulator.test_pipelines import call, make

assert torch.cuda.is_available() and torch.cuda.device_count() == 1
assert torch.cuda.get_device_name(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pipe = make()
pipe = pipe.to("cuda")
pipe.unet.cuda()
pipe.vae.to(device="cuda:0", dtype=torch.float32)
latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).cuda()
generator = torch.Generator("cuda").manual_seed(7)
assert generator.device.type != "cpu" and isinstance(generator, torch.Generator)
noise = torch.randn(2, 3, generator=generator, device="cuda:0")
again = torch.randn(2, 3, generator=torch.Generator(device="cuda").manual_seed(7), device=device)
assert torch.equal(noise, again) and noise.is_cuda
torch.cuda.manual_seed_all(0)
torch.cuda.empty_cache()
with torch.autocast("cuda", dtype=torch.float16):
    assert (noise @ noise.T).dtype == torch.float16
with torch.autocast(device_type="cuda", enabled=False):
    assert (noise @ noise.T).dtype == torch.float32
with torch.device("cuda"):
    assert torch.ones(2).is_cuda
with torch.cuda.device(0):
    torch.cuda.synchronize()
assert torch.cuda.max_memory_allocated() > 0
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    assert torch.zeros_like(noise).sum().item() == 0
assert next(pipe.unet.parameters()).is_cuda
images = call(pipe, "cuda", latents=latents)
torch.save(images.to("cpu"), sys.argv[1])
torch.save({"x": noise}, "cuda_noise.pt")
back = torch.load("cuda_noise.pt", map_location="cuda:0")["x"]
assert torch.equal(back, noise)
assert torch.load("cuda_noise.pt", map_location={"cuda:0": "cuda"})["x"].is_cuda
print("done")
"""


def test_a_script_for_cuda_gives_the_cpus_picture(tmp_path):
    from tests.emulator.test_pipelines import call, make

    from .tiny_models import without_torch_npu

    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(tmp_path, "--emulate", "--report=r.json", "script.py", "out.pt")
    assert done.stdout == "done\n"
    assert "*****" not in done.stderr, "transfer_to_npu's banner"
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with without_torch_npu():
        expected = call(make(), "cpu", latents=latents)
    got = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    data = json.loads((tmp_path / "r.json").read_text())
    assert [note for note in data["notes"] if note.startswith('device: "cuda" means the NPU')]
    assert data["options"]["device"] is True
    assert data["trace"]["total_launches"] > 100
    assert data["summary"]["redirected"] > 0


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["--no-device"], {}),
        pytest.param([], {"MINDIESD_DEVICE": "0"}, marks=pytest.mark.slow),
    ],
)
def test_it_can_be_left_out(tmp_path, options, variables):
    code = (
        "import torch; assert not torch.cuda.is_available()\n"
        "try: torch.ones(2, device='cuda')\n"
        "except (AssertionError, RuntimeError): print('refused')"
    )
    done = launch(tmp_path, "--emulate", *options, "-c", code, **variables)
    assert done.stdout == "refused\n"


# Undoing. The walk is the test's own: every attribute of every module and class that is loaded.

WALK = """
import gc, importlib, sys, types

def walk():
    spaces, containers = {}, {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name in ("__main__", "__mp_main__"):
            continue
        if name.startswith("mindiesd") or name.startswith("torch_npu.contrib.transfer"):
            continue
        spaces[id(module)] = (name, module, dict(vars(module)))
        for value in list(vars(module).values()):
            if type in type(value).__mro__ and not str(value.__module__).startswith("mindiesd"):
                where = str(value.__module__) + "." + value.__qualname__
                spaces[id(value)] = (where, value, dict(vars(value)))
    return spaces, dict(sys.modules)

NOISE = {"__warningregistry__", "__annotations__"}

def differences(before):
    spaces, modules = before
    missing = object()
    for where, owner, old in spaces.values():
        now = vars(owner)
        for name in {*old, *now} - NOISE:
            if old.get(name, missing) is not now.get(name, missing):
                # a module that was imported meanwhile
                if name in old or not isinstance(now.get(name), types.ModuleType):
                    yield where + "." + name
    for name, module in modules.items():
        if sys.modules.get(name) is not module and not name.startswith("mindiesd"):
            yield "sys.modules " + name
"""

LOAD = """
import torch, torch_npu
import torch.distributed.fsdp, torch.distributed.pipelining, torch.distributed.checkpoint
import torch._inductor.compile_fx, torch._inductor.autotune_process, torch.utils.cpp_extension
import torch._inductor.fx_passes.joint_graph, torch._inductor.fx_passes.post_grad
import torch_npu.contrib, torch_npu.utils
import transformers, accelerate, diffusers
import transformers.utils.import_utils, accelerate.utils.modeling, diffusers.utils.torch_utils
"""


@pytest.mark.slow
def test_everything_is_put_back(tmp_path):
    code = (
        "import mindiesd.emulator as e; e.start()\n"
        + LOAD
        + WALK
        + textwrap.dedent("""
        import warnings
        from torch.nn.parameter import UninitializedTensorMixin as mixin
        import mindiesd
        import mindiesd.patches.device, mindiesd.patches.cuda_names
        # The other patches have a test of this kind of their own.
        mindiesd.patch_all(only="fp32_layer_norm"); mindiesd.unpatch_all()
        torch.zeros(2, device="npu")
        before = walk()
        backend = torch.distributed.Backend
        def containers():
            return (list(mixin._allowed_methods), dict(backend.default_device_backend_map),
                    list(warnings.filters), list(torch_npu.npu._queued_calls))
        kept = containers()
        for _ in range(2):
            migration = mindiesd.patch_all(only="fp32_layer_norm", device=True)
            changed = list(differences(before))
            assert len(changed) > 150, len(changed)
            assert torch.cuda.is_available() and torch.ones(2, device="cuda").is_cuda
            late = sys.modules["late"] = types.ModuleType("late")
            late.ones, late.Generator = torch.ones, torch.Generator
            assert accelerate.utils.modeling.get_max_memory is not None
            mindiesd.unpatch_all()
            left = [where for where in differences(before)]
            assert not left, left
            now = containers()
            assert now == kept
            assert all(a is b for a, b in zip(now[0], kept[0], strict=True))
            assert sys.modules["late"].ones is torch.ones
            assert sys.modules["late"].Generator is torch.Generator
            assert not any("not restored" in note for note in migration.report().notes)
        assert not torch.cuda.is_available()
        assert len(torch.UntypedStorage(4)) == 4
        assert torch.jit.script(torch.nn.Linear(2, 2))(torch.ones(1, 2)).shape == (1, 2)
        assert torch.ones(2).to(torch.float16).dtype == torch.float16
        from torch_npu.contrib import transfer_to_npu  # the script's own still works
        assert torch.ones(2, device="cuda").is_cuda
        print("same")
        """)
    )
    (tmp_path / "undo.py").write_text(code)
    done = run(tmp_path, "undo.py")
    assert done.stdout == "same\n"


CONTAINED = """
import mindiesd.emulator as e; e.start()
import sys, threading, warnings, torch, mindiesd
filters = list(warnings.filters)
mindiesd.patch_all(device=True)
assert warnings.filters == filters
for name in ("transformers", "accelerate", "peft", "trl"):
    assert name not in sys.modules, name

# Under torch.compile, in one graph.
def f(x):
    y = x.to(torch.float16) + torch.zeros(2, device=x.device) + torch.ones_like(x)
    return y.to("cuda") + x.new_zeros(2) + torch.arange(2, device="cuda")
x = torch.randn(2, device="cuda")
for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, backend=backend, fullgraph=True)(x), f(x))

# A path is no device.
import os
os.makedirs("cuda"); torch.save(x.cpu(), "cuda/cuda.pt")
assert torch.equal(torch.load("cuda/cuda.pt"), x.cpu())

# A library that looks for CUDA itself finds none; other threads do, and so it is after errors.
import transformers.utils.import_utils as libs
assert libs.is_torch_cuda_available() is False
assert torch.cuda.is_available() is True
from mindiesd.patches.device import _hidden
inside, done = threading.Event(), threading.Event()
def look():
    inside.set(); done.wait(); assert not torch.cuda.is_available(); raise KeyError
def thread():
    try: _hidden(look)()
    except KeyError: seen.append(torch.cuda.is_available())
seen = []
other = threading.Thread(target=thread); other.start(); inside.wait()
assert torch.cuda.is_available() is True
done.set(); other.join()
assert seen == [True]
print("contained")
"""


@pytest.mark.slow
def test_side_effects_are_contained(tmp_path):
    (tmp_path / "script.py").write_text(CONTAINED)
    assert run(tmp_path, "script.py").stdout == "contained\n"


@pytest.mark.slow
def test_before_torch_and_by_somebody_else(tmp_path):
    code = """
    import mindiesd
    migration = mindiesd.patch_all(device=True)
    assert "once torch is imported" in migration.report().notes[-1]
    import mindiesd.emulator as e; e.start()
    import torch
    # torch was imported by start(), before torch_npu: its hook came while there was no NPU yet
    print(migration.report().notes[-1])
    mindiesd.unpatch_all()
    from torch_npu.contrib import transfer_to_npu
    print(mindiesd.patch_all(device=True).report().notes[-1])
    mindiesd.unpatch_all()
    assert torch.ones(2, device="cuda").is_cuda, "not ours to undo"
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    first, second = run(tmp_path, "script.py").stdout.splitlines()
    assert first.startswith('device: "cuda"')
    assert "in force already" in second


def test_where_cuda_is_there_nothing_happens(monkeypatch):
    import mindiesd

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros, to = torch.zeros, torch.Tensor.to
    migration = mindiesd.patch_all(only="fp32_layer_norm", device=True)
    assert torch.zeros is zeros and torch.Tensor.to is to
    assert migration.report().notes[-1] == 'device: "cuda" was left alone: CUDA is available'
    mindiesd.unpatch_all()


def test_patch_all_leaves_it_alone_unless_asked():
    import mindiesd

    zeros = torch.zeros
    migration = mindiesd.patch_all(only="fp32_layer_norm")
    assert torch.zeros is zeros and not torch.cuda.is_available()
    assert not any("device" in note for note in migration.report().notes)
    mindiesd.unpatch_all()
    with pytest.raises(mindiesd.ParametersInvalid, match="device"):
        mindiesd.patch_all(device="npu")


def test_names():
    assert of_npu("cuda") == "npu" and of_npu("cuda:3") == "npu:3"
    for text in ("cpu", "cudax", "my cuda", "/data/cuda:0", "", "npu"):
        assert of_npu(text) == text
    assert of_npu(torch.device("cuda", 1)) == torch.device("npu", 1)
    assert of_npu(torch.device("cuda")) == torch.device("npu")
    assert of_npu({"cuda:0": "cuda:1", "a": 3}) == {"npu:0": "npu:1", "a": 3}
    assert of_npu(["cuda:0", 1]) == ["npu:0", 1]


def test_translated_calls():
    seen = []

    def target(*args, **kwargs):
        """What it does."""
        seen.append((args, kwargs))

    call = translated(target, False)
    call("cuda", 2, [1, 2], device="cuda:1", dtype=torch.half)
    call(2, "cpu", device=1, device_ids=["cuda:0"])
    translated(target, True)(0, True)
    assert seen == [
        (("npu", 2, [1, 2]), {"device": "npu:1", "dtype": torch.half}),
        ((2, "cpu"), {"device": "npu:1", "device_ids": ["npu:0"]}),
        (("npu:0", True), {}),
    ]
    assert (call.__name__, call.__doc__, call.__wrapped__) == ("target", "What it does.", target)


def test_tensors_that_call_themselves_cuda_are_computed_by_the_npus_kernels() -> None:
    """``transfer_to_npu`` makes ``is_cuda`` true of every tensor on the NPU."""
    run_python(
        """
        from mindiesd.emulator import start, trace
        start()
        import torch, mindiesd
        import torch.nn.functional as F
        mindiesd.patch_all(device=True)
        x = torch.randn(1, 2, 16, 32, device="cuda", dtype=torch.bfloat16)
        assert x.is_cuda and x.device.type == "npu"
        from mindiesd.ops.backends import backend_of
        assert backend_of(x).__name__.endswith(".npu"), backend_of(x)
        bias = torch.randn(1, 2, 16, 16, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad(), trace() as counted:
            F.rms_norm(x, (32,))
            F.scaled_dot_product_attention(x, x, x, attn_mask=bias)
        assert counted.launches["npu::npu_rms_norm"] == 1, counted.launches
        assert any("attention" in name for name in counted.launches), counted.launches
        assert not any("softmax" in name for name in counted.launches), counted.launches
        """
    )
