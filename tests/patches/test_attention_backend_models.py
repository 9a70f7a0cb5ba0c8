"""Real models whose attention is asked for in a peculiar way: same result with and without us."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch

import mindiesd
from mindiesd.patches.attention_backend import processors
from tests.emulator.tiny_models import MODELS, first_tensor
from tests.tiny import flux_inputs, tiny_flux_transformer

AP = import_module("diffusers.models.attention_processor")
DISPATCH = import_module("diffusers.models.attention_dispatch")
NAMES = DISPATCH.AttentionBackendName


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, inputs):
    return first_tensor(model(**copy.deepcopy(inputs)))


def same(run, **options):
    """``run()`` gives the same patched and not; returns the migration."""
    plain = run()
    migration = mindiesd.patch_all(**options)
    torch.testing.assert_close(run(), plain, atol=2e-5, rtol=2e-5)
    mindiesd.unpatch_all()
    assert torch.equal(run(), plain)
    return migration


@pytest.mark.parametrize("name", ["t5", "hunyuan15", "sana_video"])
def test_peculiar_masks(name):
    """Position bias, rows without a key, -10000."""
    model, inputs = MODELS[name].build(), MODELS[name].make_inputs()
    migration = same(lambda: forward(model, inputs))
    assert migration.ledger["sdpa"].snapshot()[0] > 0


@pytest.mark.parametrize("name", ["chroma", "ltx"])
def test_peculiar_masks_under_native_npu(name):
    """The backend for NPUs means the same as ``native``."""
    model, inputs = MODELS[name].build(), MODELS[name].make_inputs()
    expected = forward(model, inputs)
    registry = DISPATCH._AttentionBackendRegistry
    migration = mindiesd.patch_all()
    registry.set_active_backend(NAMES._NATIVE_NPU)
    try:
        out = forward(model, inputs)
    finally:
        registry.set_active_backend(NAMES.NATIVE)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert migration.ledger["diffusers_dispatch"].snapshot()[0] > 0


def test_chroma_mask_of_ones_and_zeros_is_a_bias_and_no_mask():
    model, inputs = MODELS["chroma"].build(), MODELS["chroma"].make_inputs()
    length = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]
    kept = torch.ones(1, length)
    kept[:, 3:9] = 0.0
    results = []
    for mask in (kept, kept.bool(), None):
        given = {**inputs, "attention_mask": mask}
        results.append(forward(model, given))
        mindiesd.patch_all()
        torch.testing.assert_close(forward(model, given), results[-1], atol=2e-5, rtol=2e-5)
        mindiesd.unpatch_all()
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_block_masks_and_flex_are_left_alone():
    from torch.nn.attention.flex_attention import create_block_mask

    query, key, value = (draw(1, 128, 2, 16, seed=seed) for seed in range(3))
    block = create_block_mask(lambda b, h, i, j: i >= j, 1, None, 128, 128, device="cpu")
    attend = DISPATCH.dispatch_attention_fn
    calls = {
        "block": lambda: attend(query, key, value, attn_mask=block, backend=NAMES.FLEX),
        "plain": lambda: attend(query, key, value, backend=NAMES.FLEX),
    }
    for call in calls.values():
        migration = same(call)
        counts = migration.ledger["diffusers_dispatch"].snapshot()
        assert counts == (0, 0, {})
    mindiesd.patch_all()
    with pytest.raises(ValueError, match="attn_mask"):
        attend(query, key, value, attn_mask=block, backend=NAMES.FLASH)


def tiny_unet():
    return MODELS["unet"].build(), MODELS["unet"].make_inputs()


def test_attention_slicing_is_left_alone_without_an_npu():
    model, inputs = tiny_unet()
    model.set_attention_slice("max")
    migration = same(lambda: forward(model, inputs))
    redirected, _, reasons = migration.ledger["diffusers_sliced_processor"].snapshot()
    assert redirected == 0
    assert set(reasons) == {processors.NO_FUSED_KERNEL}


def test_xformers_on_a_unet():
    model, inputs = tiny_unet()
    expected = forward(model, inputs)
    with pytest.raises((ModuleNotFoundError, ValueError)):
        model.enable_xformers_memory_efficient_attention()
    model.set_attention_slice("max")
    migration = mindiesd.patch_all()
    model.enable_xformers_memory_efficient_attention()
    kinds = {type(processor).__name__ for processor in model.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    # Twice each: the models inside the model are asked as well.
    asked = migration.ledger["diffusers_xformers_setter"].snapshot()[0]
    assert asked == 2 * len(model.attn_processors)
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)
    mindiesd.unpatch_all()
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)
    model.disable_xformers_memory_efficient_attention()
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)


def test_xformers_on_a_model_of_the_newer_kind():
    model = tiny_flux_transformer()
    inputs = flux_inputs(model)
    expected = forward(model, inputs)
    for module in (model, model.transformer_blocks[0].attn):
        with pytest.raises((ModuleNotFoundError, ValueError)):
            if module is model:
                model.enable_xformers_memory_efficient_attention()
            else:
                module.set_use_memory_efficient_attention_xformers(True)
    mindiesd.patch_all()
    model.enable_xformers_memory_efficient_attention()
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)


def test_setter_for_npus_that_sets_the_same_backend_on_and_off():
    model = tiny_flux_transformer()
    inputs = flux_inputs(model)
    expected = forward(model, inputs)
    model.set_use_npu_flash_attention(False)
    assert model.transformer_blocks[0].attn.processor._attention_backend is NAMES._NATIVE_NPU
    mindiesd.patch_all()
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)


def test_deprecated_fused_processor_for_npus():
    """It names a backend that diffusers does not have."""
    model = tiny_flux_transformer()
    inputs = flux_inputs(model)
    expected = forward(model, inputs)
    model.set_attn_processor(AP.FusedFluxAttnProcessor2_0_NPU())
    with pytest.raises(ValueError, match="_fused_npu"):
        forward(model, inputs)
    mindiesd.patch_all()
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=2e-5)


def test_xformers_for_one_pipeline_only():
    (model, inputs), (other, _) = tiny_unet(), tiny_unet()
    with mindiesd.patch_pipeline(model):
        model.enable_xformers_memory_efficient_attention()
        forward(model, inputs)
        with pytest.raises((ModuleNotFoundError, ValueError)):
            other.enable_xformers_memory_efficient_attention()


def attention(**options):
    torch.manual_seed(0)
    layer = AP.Attention(query_dim=32, heads=4, dim_head=8, **options).eval()
    for norm in (layer.norm_q, layer.norm_k):
        if norm is not None:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return layer


LAYERS = {
    "self": ({}, {}),
    "cross": ({"cross_attention_dim": 16}, {"encoder_hidden_states": draw(2, 5, 16, seed=2)}),
    "mask": ({}, {"attention_mask": torch.tensor([[0.0] * 4 + [-10000.0] * 3] * 2)[:, None]}),
    "bias": ({}, {"attention_mask": draw(2, 1, 7, seed=3)}),
    "residual": ({"residual_connection": True, "rescale_output_factor": 2.0}, {}),
    "normed": ({"qk_norm": "rms_norm"}, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_npu_processor_is_the_layer_over_sdpa(name, monkeypatch):
    """Its constructor asks for torch_npu, which this environment has not; the rest is real."""
    options, inputs = LAYERS[name]
    layer = attention(**options)
    states = draw(2, 7, 32)
    with torch.no_grad():
        expected = layer(states, **inputs)
        layer.set_processor(object.__new__(AP.AttnProcessorNPU))
        mindiesd.patch_all(only="attention_backend")
        torch.testing.assert_close(layer(states, **inputs), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_xformers_processor_is_the_layer_over_sdpa(name):
    options, inputs = LAYERS[name]
    layer = attention(**options)
    states = draw(2, 7, 32)
    with torch.no_grad():
        expected = layer(states, **inputs)
        layer.set_processor(AP.XFormersAttnProcessor())
        migration = mindiesd.patch_all(only="attention_backend")
        if name == "normed":  # xFormers' processor leaves the norms out: not the same layer
            with pytest.raises(AttributeError):
                layer(states, **inputs)
        else:
            torch.testing.assert_close(layer(states, **inputs), expected)
            assert migration.ledger["diffusers_xformers_processor"].snapshot()[0] == 1


def test_ip_adapter_processor():
    layer = attention(cross_attention_dim=16)
    processor = AP.IPAdapterAttnProcessor2_0(32, 16, num_tokens=(3,), scale=0.7).eval()
    layer.set_processor(processor)
    states, text = draw(2, 16, 32), draw(2, 5, 16, seed=2)
    picture, region = draw(2, 1, 3, 16, seed=3), torch.zeros(1, 1, 4, 4)
    region[..., :2] = 1.0
    for masks in (None, [region]):
        with torch.no_grad():
            migration = same(
                lambda masks=masks: layer(
                    states, encoder_hidden_states=(text, [picture]), ip_adapter_masks=masks
                )
            )
        assert migration.ledger["sdpa"].snapshot()[0] == 2


def test_perturbed_attention_guidance():
    for kind in ("PAGIdentitySelfAttnProcessor2_0", "PAGCFGIdentitySelfAttnProcessor2_0"):
        layer = attention()
        layer.set_processor(getattr(AP, kind)())
        states = draw(6, 9, 32)
        with torch.no_grad():
            migration = same(lambda layer=layer, states=states: layer(states))
        assert migration.ledger["sdpa"].snapshot()[0] > 0


def test_lora_through_peft():
    peft = pytest.importorskip("peft")
    model = tiny_flux_transformer()
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    model.eval()
    same(lambda: forward(model, flux_inputs(model)))


def test_controlnet():
    diffusers = pytest.importorskip("diffusers")
    model, inputs = tiny_unet()
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(
        model, conditioning_channels=3, load_weights_from_unet=True
    ).eval()
    for parameter in control.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0, 0.1)
    sample = inputs["sample"]
    # The conditioning has a picture's size, eight times that of the latents.
    hint = draw(sample.shape[0], 3, sample.shape[2] * 8, sample.shape[3] * 8)

    @torch.no_grad()
    def run():
        down, middle = control(**inputs, controlnet_cond=hint, return_dict=False)
        return model(
            **inputs,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    same(run)


@pytest.mark.parametrize("backend", ["native", "flash_varlen"])
def test_layer_skip_hook_finds_sdpa(backend):
    """It compares the function it is given with ``F.scaled_dot_product_attention``."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    model, inputs = MODELS["qwenimage"].build(), MODELS["qwenimage"].make_inputs()
    whole = forward(model, inputs)
    apply_layer_skip(
        model,
        LayerSkipConfig(
            indices=[0],
            fqn="transformer_blocks",
            skip_attention=False,
            skip_attention_scores=True,
            skip_ff=False,
        ),
    )
    skipped = forward(model, inputs)
    assert not torch.allclose(skipped, whole, atol=1e-3)
    mindiesd.patch_all()
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = NAMES(backend)
    torch.testing.assert_close(forward(model, inputs), skipped, atol=2e-5, rtol=2e-5)


def steps(model, inputs):
    """Four denoising steps in a row, as the caching hooks count them."""
    outs = []
    for step, timestep in enumerate((900.0, 700.0, 500.0, 300.0)):
        model.current_timestep = timestep
        given = {**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.1 * step)}
        given["timestep"] = torch.full_like(inputs["timestep"], timestep / 1000)
        outs.append(forward(model, given))
    return torch.stack(outs)


@pytest.mark.parametrize("cache", ["pyramid", "faster"])
def test_caching_hooks(cache):
    from diffusers import hooks

    model = tiny_flux_transformer(num_layers=2, num_single_layers=2)
    inputs = flux_inputs(model, batch=2)
    if cache == "pyramid":
        hooks.apply_pyramid_attention_broadcast(
            model,
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 800),
                current_timestep_callback=lambda: model.current_timestep,
            ),
        )
    else:
        hooks.apply_faster_cache(
            model,
            hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 681),
                tensor_format="BCHW",
                is_guidance_distilled=True,
                current_timestep_callback=lambda: model.current_timestep,
            ),
        )

    def run():
        # Stateful hooks start over with each picture.
        model._reset_stateful_cache() if hasattr(model, "_reset_stateful_cache") else None
        return steps(model, inputs)

    plain = run()
    migration = mindiesd.patch_all()
    torch.testing.assert_close(run(), plain, atol=2e-5, rtol=2e-5)
    calls = migration.ledger["sdpa"].snapshot()[0]
    assert 0 < calls < 16, "every attention was computed: the cache did nothing"


def test_eager_attention_with_a_softcap_is_left_alone():
    """Gemma 2 has no SDPA: no fused kernel knows its softcap."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attn_logit_softcapping=2.0,
        )
    ).eval()
    inputs = {"input_ids": torch.arange(7)[None], "output_attentions": True}

    @torch.no_grad()
    def run():
        out = model(**inputs)
        assert len(out.attentions) == 2
        return out.last_hidden_state

    migration = same(run)
    assert migration.ledger["sdpa"].snapshot()[0] == 0


def test_fast_paths_of_torch_are_not_reached():
    """In eval they call one C++ kernel for the whole layer; in training they call SDPA."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 32, batch_first=True).eval()
    states = draw(2, 5, 32)
    with torch.no_grad():
        migration = same(lambda: layer(states), only="sdpa")
    assert migration.ledger["sdpa"].snapshot() == (0, 0, {})
