"""Whole models give on the device what they give on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindiesd.emulator import trace

from .tiny_models import (
    MODELS,
    UNCONFIGURED,
    first_tensor,
    images,
    images_more,
    move,
    videos,
    without_torch_npu,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# Kernels that one forward of each launches, with diffusers 0.42 and torch 2.13.
LAUNCHES = {
    "controlnet_z_image": 219,
    "wan_i2v": 198,
    "dit": 66,
    "pixart": 72,
    "auraflow": 115,
    "bria": 168,
    "chroma": 186,
    "flux": 184,
    "flux2": 253,
    "longcat": 180,
    "ovis": 189,
    "motif": 194,
    "qwenimage": 152,
    "z_image": 163,
    "krea2": 227,
    "ernie": 119,
    "glm": 109,
    "joyimage": 172,
    "kandinsky5": 218,
    "prior": 51,
    "cogview3": 146,
    "cogview4": 167,
    "hidream": 305,
    "hunyuan_dit": 153,
    "lumina_next": 127,
    "lumina2": 208,
    "omnigen": 119,
    "prx": 195,
    "sana": 66,
    "sd3": 212,
    "sd35": 241,
    "transformer2d": 28,
    "bria_fibo": 162,
    "bria_fibo2": 213,
    "dreamlite_transformer": 29,
    "flux3": 261,
    "hunyuan_image": 215,
    "ideogram4": 128,
    "joyimage_plus": 104,
    "nucleus": 159,
    "qwenimage21": 126,
    "rfd4": 404,
    "allegro": 60,
    "chronoedit": 171,
    "cogvideox": 150,
    "cogvideox15": 109,
    "easyanimate": 157,
    "hunyuan_video": 264,
    "hunyuan15": 279,
    "latte": 85,
    "ltx": 131,
    "mochi": 313,
    "sana_video": 158,
    "skyreels": 168,
    "temporal": 30,
    "wan": 170,
    "wan_vace": 459,
    "anyflow": 119,
    "anyflow_far": 287,
    "consisid": 229,
    "cosmos": 208,
    "cosmos3": 168,
    "framepack": 367,
    "helios": 267,
    "hunyuan_video_i2v": 217,
    "hunyuan_video_token_replace": 263,
    "kandinsky6": 533,
    "kandinsky6_sr": 160,
    "ltx2": 728,
    "minimax_h3": 215,
    "sana_wm": 230,
    "sana_wm_refiner": 199,
    "wan_animate": 273,
    "wan_animate2": 192,
    "stable_audio": 98,
    "stable_audio3": 303,
    "longcat_audio": 221,
    "ace_step": 169,
    "minimax_music3": 80,
    "minimax_music3_depth": 38,
    "minimax_music3_condition": 6,
    "t5_film": 157,
    "unet": 278,
    "unet1d": 390,
    "unet2d": 168,
    "unet3d": 491,
    "unet_sdxl": 341,
    "unet_dreamlite": 299,
    "i2vgen": 537,
    "kandinsky3": 1671,
    "unet_motion": 455,
    "svd": 620,
    "cascade": 193,
    "uvit": 147,
    "controlnet": 143,
    "controlnet_union": 193,
    "controlnet_sparse": 176,
    "controlnet_xs": 559,
    "controlnet_flux": 183,
    "controlnet_sd3": 73,
    "controlnet_hunyuan_dit": 94,
    "controlnet_qwenimage": 90,
    "controlnet_sana": 66,
    "t2i_adapter": 12,
    "anima_conditioner": 189,
    "kandinsky6_upscaler": 99,
    "vae": 122,
    "vae_asym": 148,
    "vae_dc": 87,
    "vae_flux2": 122,
    "vae_hunyuan_image": 132,
    "vae_kvae": 184,
    "vae_rae": 60,
    "vae_tiny": 52,
    "vae_consistency": 388,
    "vqmodel": 133,
    "vae_temporal": 178,
    "rfd4_autoencoder": 107,
    "wan_vae": 919,
    "vae_kandinsky6_sr": 578,
    "vae_allegro": 537,
    "vae_cogvideox": 300,
    "vae_cosmos": 548,
    "vae_hunyuan_video": 240,
    "vae_hunyuan_image_refiner": 333,
    "vae_hunyuan15": 501,
    "vae_kvae_video": 336,
    "vae_ltx": 248,
    "vae_ltx2": 280,
    "vae_ltx2_diffusion": 1240,
    "vae_magvit": 862,
    "vae_minimax_h3": 214,
    "vae_mochi": 252,
    "vae_qwenimage": 413,
    "vae_qwenimage21": 362,
    "vae_vidtok": 439,
    "vae_cosmos3_audio": 246,
    "vae_kvae_audio": 374,
    "vae_ltx2_audio": 144,
    "vae_minimax_h3_audio": 380,
    "vae_longcat_audio": 450,
    "vae_mmaudio": 220,
    "vae_oobleck": 414,
    "vae_same": 215,
    "vocoder_minimax_music3": 177,
    "vocoder_mmaudio": 222,
    "clip": 42,
    "t5": 110,
    "clip_vision": 37,
    "siglip_vision": 45,
    "bert": 50,
    "umt5": 150,
    "llama": 112,
    "qwen2": 112,
    "qwen3": 136,
    "mistral": 117,
    "gemma": 118,
    "gemma2": 179,
    "gemma3_text": 191,
    "glm_text": 118,
    "smollm3": 112,
    "qwen25_vl": 244,
    "qwen3_vl": 307,
    "gemma3": 175,
    "dinov2": 34,
}

# F.gelu computes the tanh form on the device, up to 4.73e-4 away from the erf one.
ERF_GELU = {
    "wan_i2v",
    "anima_conditioner",
    "cascade",
    "consisid",
    "controlnet_xs",
    "cosmos",
    "dinov2",
    "dreamlite_transformer",
    "ernie",
    "i2vgen",
    "kandinsky3",
    "kandinsky5",
    "kandinsky6",
    "kandinsky6_sr",
    "prior",
    "qwen25_vl",
    "qwen3_vl",
    "sana_wm",
    "svd",
    "temporal",
    "transformer2d",
    "unet",
    "unet3d",
    "unet_dreamlite",
    "unet_motion",
    "unet_sdxl",
    "uvit",
    "vae_allegro",
    "vae_hunyuan_video",
    "vae_rae",
    "wan_animate",
    "wan_animate2",
}
# Several of them, one after the other.
SEVERAL_GELUS = {"unet1d": 2e-3}

# Counting them all takes a minute: the rest runs with the slow tests.
QUICK = {
    *images.MODELS,
    *images_more.MODELS,
    *videos.MODELS,
    "unet",
    "vae",
    "wan_vae",
    "clip",
    "t5",
}


def run(name):
    tiny = MODELS[name]
    model = tiny.build()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(model(**tiny.make_inputs()))
    model = model.to("npu")
    # Made anew: some hold a cache or a generator.
    there = move(tiny.make_inputs(), lambda tensor: tensor.to("npu"))
    with torch.no_grad(), trace() as counted:
        got = first_tensor(model(**there))
    return got, expected, counted


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_as_on_the_cpu(name):
    got, expected, counted = run(name)
    assert got.device.type == "npu"
    assert got.dtype == expected.dtype
    bound = SEVERAL_GELUS.get(name, 5e-4 if name in ERF_GELU else 5e-6)
    torch.testing.assert_close(got.cpu(), expected, atol=bound, rtol=bound)
    if diffusers.__version__.startswith("0.42.") and torch.__version__.startswith("2.13."):
        assert counted.total == LAUNCHES[name]


def test_every_model_class_has_a_configuration_or_a_reason(monkeypatch):
    scripts = str(Path(__file__).resolve().parents[2] / "scripts")
    monkeypatch.syspath_prepend(scripts)
    from _coverage import unknown

    assert [name for name in unknown() if name not in UNCONFIGURED] == []


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
