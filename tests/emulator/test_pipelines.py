"""Whole pipelines: schedulers, text encoder, UNet and VAE together, in the usual memory modes."""

from __future__ import annotations

import threading

import pytest
import torch

from mindiesd.emulator import trace

from .tiny_models import MODELS, without_torch_npu

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(scheduler="DDIMScheduler"):
    torch.manual_seed(0)
    config = {**MODELS["clip"].config, "max_position_embeddings": 77}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    unet = {**MODELS["unet"].config, "cross_attention_dim": 32}
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**unet).eval(),
        vae=MODELS["vae"].build(),
        text_encoder=text,
        tokenizer=None,
        scheduler=getattr(diffusers, scheduler)(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, device, **kwargs):
    prompt = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)).to(device)
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=-prompt,
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="pt",
        **kwargs,
    ).images


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_as_on_the_cpu(scheduler):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with without_torch_npu():
        expected = call(make(scheduler), "cpu", latents=latents)
    got = call(make(scheduler).to("npu"), "npu", latents=latents.npu())
    # the UNet has GEGLU, which diffusers computes with tanh where there is torch_npu
    torch.testing.assert_close(got.cpu(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(mode):
    pytest.importorskip("accelerate")
    expected = call(make().to("npu"), "npu", generator=torch.Generator("cpu").manual_seed(3))
    pipe = make()
    getattr(pipe, mode)(device="npu")
    got = call(pipe, "npu", generator=torch.Generator("cpu").manual_seed(3))
    torch.testing.assert_close(got.cpu(), expected.cpu(), atol=1e-5, rtol=0)


def test_generators_of_the_device():
    pipe = make().to("npu")
    one, two, three = (
        call(pipe, "npu", generator=torch.Generator("npu").manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def latents(seed=2):
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).npu()


def test_in_every_thread():
    """Pipelines of their own in threads of their own, at once, give what they give alone."""
    pipes = [make(name).to("npu") for name in ("DDIMScheduler", "EulerDiscreteScheduler") * 2]
    alone = [call(pipe, "npu", latents=latents(seed)) for seed, pipe in enumerate(pipes)]
    together = [None] * len(pipes)
    start = threading.Barrier(len(pipes))

    def work(index):
        start.wait()
        together[index] = call(pipes[index], "npu", latents=latents(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(pipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    pipe = make().to("npu")
    expected = call(pipe, "npu", latents=latents())
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    got = call(pipe, "npu", latents=latents())
    torch._dynamo.reset()
    # Compiled attention goes to another version of the fused kernel.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    pipe = make().to("npu")
    expected = call(pipe, "npu", latents=latents())
    with torch.autocast("npu", dtype=dtype), trace() as counted:
        got = call(pipe, "npu", latents=latents())
    short = str(dtype).removeprefix("torch.")
    assert counted.casts[f"float32 -> {short}"] > 10
    assert torch.isfinite(got).all()
    error = (got.float() - expected).abs().max().item()
    assert 0 < error < 64 * torch.finfo(dtype).eps
