"""Whole models give on the device what they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from mindiesd.emulator import trace

from .tiny_models import MODELS, first_tensor, move, without_torch_npu

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# Kernels that one forward of each launches, with diffusers 0.42 and torch 2.13.
LAUNCHES = {
    "ernie": 119,
    "krea2": 227,
    "glm": 109,
    "joyimage": 172,
    "kandinsky5": 218,
    "longcat_audio": 221,
    "stable_audio3": 303,
    "hunyuan15": 279,
    "motif": 194,
    "transformer2d": 28,
    "dit": 66,
    "pixart": 72,
    "prior": 51,
    "allegro": 60,
    "auraflow": 115,
    "bria": 168,
    "chroma": 186,
    "chronoedit": 171,
    "cogvideox": 150,
    "cogvideox15": 109,
    "cogview3": 146,
    "cogview4": 167,
    "easyanimate": 157,
    "flux": 184,
    "flux2": 253,
    "hidream": 305,
    "hunyuan_dit": 153,
    "hunyuan_video": 264,
    "latte": 85,
    "longcat": 180,
    "ltx": 131,
    "lumina_next": 127,
    "lumina2": 208,
    "mochi": 313,
    "omnigen": 119,
    "ovis": 189,
    "prx": 195,
    "qwenimage": 152,
    "sana": 66,
    "sana_video": 158,
    "sd3": 212,
    "sd35": 241,
    "skyreels": 168,
    "stable_audio": 98,
    "temporal": 30,
    "wan": 170,
    "wan_vace": 459,
    "z_image": 163,
    "unet": 278,
    "vae": 122,
    "wan_vae": 919,
    "clip": 42,
    "t5": 110,
}

# F.gelu computes the tanh form on the device, up to 4.73e-4 away from the erf one.
ERF_GELU = {"ernie", "glm", "kandinsky5", "prior", "temporal", "transformer2d", "unet"}


def run(name):
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(model(**inputs))
    model = model.to("npu")
    there = move(inputs, lambda tensor: tensor.to("npu"))
    with torch.no_grad(), trace() as counted:
        got = first_tensor(model(**there))
    return got, expected, counted


@pytest.mark.parametrize("name", MODELS)
def test_as_on_the_cpu(name):
    got, expected, counted = run(name)
    assert got.device.type == "npu"
    assert got.dtype == expected.dtype
    bound = 5e-4 if name in ERF_GELU else 5e-6
    torch.testing.assert_close(got.cpu(), expected, atol=bound, rtol=bound)
    if diffusers.__version__.startswith("0.42.") and torch.__version__.startswith("2.13."):
        assert counted.total == LAUNCHES[name]


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage", "vae"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(name, dtype):
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(model(**inputs))
    model = model.to("npu", dtype)

    def there(tensor):
        return tensor.to("npu", dtype if tensor.is_floating_point() else None)

    with torch.no_grad():
        got = first_tensor(model(**move(inputs, there)))
    assert got.dtype == dtype
    scale = expected.abs().max().item()
    bound = (0.05 if dtype == torch.bfloat16 else 0.01) * scale
    torch.testing.assert_close(got.cpu().float(), expected, atol=bound, rtol=0)
