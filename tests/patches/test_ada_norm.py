"""Adaptive norm classes: rewritten, never less accurate, and left where they were."""

from __future__ import annotations

import copy
import importlib
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches import ada_norm, law, modulation
from tests.patches.norm_cases import DTYPES, unpatched
from tests.patches.test_norms_classes import counts
from tests.patches.test_sdpa import assert_same_outcome

D = 64
RECORDS = {record.name: record for record in ada_norm.RECORDS}


def emb(batch: int, parts: int = 1) -> torch.Tensor:
    return torch.randn(batch, parts * D)


# Record -> arguments of the class, arguments of a call for a batch and a number of tokens. Every
# class that is a class of its own right; the others are inside of models.
CASES = {
    "normalization.AdaLayerNorm": (
        {"embedding_dim": D, "output_dim": 2 * D, "chunk_dim": 1},
        lambda b, s: {"x": torch.randn(b, s, D), "temb": emb(b)},
    ),
    "normalization.AdaLayerNormZero": (
        {"embedding_dim": D},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "normalization.AdaLayerNormZero fp32": (
        {"embedding_dim": D, "norm_type": "fp32_layer_norm", "bias": False},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "normalization.AdaLayerNormZeroSingle": (
        {"embedding_dim": D},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "normalization.SD35AdaLayerNormZeroX": (
        {"embedding_dim": D},
        lambda b, s: {"hidden_states": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "normalization.AdaLayerNormContinuous": (
        {"embedding_dim": D, "conditioning_embedding_dim": D, "elementwise_affine": False},
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "normalization.AdaLayerNormContinuous affine": (
        {"embedding_dim": D, "conditioning_embedding_dim": D},
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "normalization.AdaLayerNormContinuous rms": (
        {"embedding_dim": D, "conditioning_embedding_dim": D, "norm_type": "rms_norm"},
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "normalization.CogView3PlusAdaLayerNormZeroTextImage": (
        {"embedding_dim": D, "dim": D},
        lambda b, s: {
            "x": torch.randn(b, s, D),
            "context": torch.randn(b, 3, D),
            "emb": emb(b),
        },
    ),
    "normalization.CogVideoXLayerNormZero": (
        {"conditioning_dim": D, "embedding_dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "encoder_hidden_states": torch.randn(b, 3, D),
            "temb": emb(b),
        },
    ),
    "normalization.LuminaRMSNormZero": (
        {"embedding_dim": D, "norm_eps": 1e-5, "norm_elementwise_affine": True},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "normalization.LuminaLayerNormContinuous": (
        {
            "embedding_dim": D,
            "conditioning_embedding_dim": D,
            "elementwise_affine": False,
            "out_dim": D,
        },
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "sana.SanaModulatedNorm": (
        {"dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "temb": emb(b),
            "scale_shift_table": torch.randn(2, D),
        },
    ),
    "sana_video.SanaModulatedNorm": (
        {"dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "temb": torch.randn(b, 1, D),
            "scale_shift_table": torch.randn(2, D),
        },
    ),
    "sana_wm.T2IFinalLayer": (
        {"hidden_size": D, "patch_size": 1, "out_channels": 4},
        lambda b, s: {"x": torch.randn(b, s, D), "t": torch.randn(b, 1, 3, D)},
    ),
    "chroma.ChromaAdaLayerNormZeroPruned": (
        {"embedding_dim": D},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": torch.randn(b, 6, D)},
    ),
    "chroma.ChromaAdaLayerNormZeroSinglePruned": (
        {"embedding_dim": D},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": torch.randn(b, 3, D)},
    ),
    "chroma.ChromaAdaLayerNormContinuousPruned": (
        {"embedding_dim": D, "conditioning_embedding_dim": D, "elementwise_affine": False},
        lambda b, s: {"x": torch.randn(b, s, D), "emb": torch.randn(b, 2, D)},
    ),
    "cogview4.CogView4AdaLayerNormZero": (
        {"embedding_dim": D, "dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "encoder_hidden_states": torch.randn(b, 3, D),
            "temb": emb(b),
        },
    ),
    "cogview4.CogView4AdaLayerNormContinuous": (
        {"embedding_dim": D, "conditioning_embedding_dim": D, "elementwise_affine": False},
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "glm_image.GlmImageAdaLayerNormZero": (
        {"embedding_dim": D, "dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "encoder_hidden_states": torch.randn(b, 3, D),
            "temb": emb(b),
        },
    ),
    "glm_image.GlmImageAdaLayerNormContinuous": (
        {"embedding_dim": D, "conditioning_embedding_dim": D, "elementwise_affine": False},
        lambda b, s: {"x": torch.randn(b, s, D), "conditioning_embedding": emb(b)},
    ),
    "cosmos.CosmosAdaLayerNorm": (
        {"in_features": D, "hidden_features": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "embedded_timestep": emb(b),
            "temb": emb(b, 3),
        },
    ),
    "cosmos.CosmosAdaLayerNormZero": (
        {"in_features": D, "hidden_features": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "embedded_timestep": torch.randn(b, s, D),
            "temb": torch.randn(b, s, 3 * D),
        },
    ),
    "easyanimate.EasyAnimateLayerNormZero": (
        {"conditioning_dim": D, "embedding_dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "encoder_hidden_states": torch.randn(b, 3, D),
            "temb": emb(b),
        },
    ),
    "ernie_image.ErnieImageAdaLNContinuous": (
        {"hidden_size": D},
        lambda b, s: {"x": torch.randn(s, b, D), "conditioning": emb(b)},
    ),
    "hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZero": (
        {"embedding_dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "emb": emb(b),
            "token_replace_emb": emb(b),
            "first_frame_num_tokens": 2,
        },
    ),
    "hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle": (
        {"embedding_dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "emb": emb(b),
            "token_replace_emb": emb(b),
            "first_frame_num_tokens": 2,
        },
    ),
    "mochi.MochiRMSNormZero": (
        {"embedding_dim": D, "hidden_dim": 4 * D},
        lambda b, s: {"hidden_states": torch.randn(b, s, D), "emb": emb(b)},
    ),
    "qwenimage21.QwenImage21AdaLayerNormContinuous": (
        {"embedding_dim": D, "conditioning_embedding_dim": D},
        lambda b, s: {
            "hidden_states": torch.randn(b, s, D),
            "conditioning_embedding": torch.randn(b, D),
        },
    ),
}


def make(case: str, dtype: torch.dtype) -> torch.nn.Module:
    options, _ = CASES[case]
    record = RECORDS[case.split()[0]]
    owner = getattr(importlib.import_module(record.module), record.attribute.split(".")[0])
    known = inspect.signature(owner.__init__).parameters
    module = owner(**{key: value for key, value in options.items() if key in known})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval().to(dtype)


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_every_class(batch: int) -> None:
    """Every result has the original's shape and dtype, and is never further from float64."""
    torch.manual_seed(0)
    migration = mindiesd.patch_all(only="ada_norm")
    worse = []
    for case in CASES:
        name = case.split()[0]
        for dtype in DTYPES:
            module = make(case, dtype)
            inputs = cast(CASES[case][1](batch, 33), dtype)
            before = counts(migration, name)
            with torch.no_grad():
                ours = tensors(module(**inputs))
                theirs = tensors(unpatched(module)(module, **inputs))
                exact_module = copy.deepcopy(module).double()
                exact = tensors(unpatched(module)(exact_module, **cast(inputs, torch.float64)))
            after = counts(migration, name)
            assert after != before, f"{case}: not rewritten"
            assert not any("rewritten" in reason for reason in after[1]), (case, after[1])
            for mine, other, right in zip(ours, theirs, exact, strict=True):
                assert (mine.dtype, mine.shape) == (other.dtype, other.shape), (case, dtype)
                right = right.double()
                errors = [(t.double() - right).square().mean().sqrt() for t in (mine, other)]
                if errors[0] > 1.1 * errors[1] + 1e-6 * right.abs().max():
                    worse.append((case, dtype, *errors))
    assert not worse


def test_every_record_is_rewritten() -> None:
    from mindiesd.patches.rewriting.rewrite import rewrite
    from mindiesd.patches.scope import Site

    for record in RECORDS.values():
        owner = importlib.import_module(record.module)
        for part in record.attribute.split("."):
            owner = getattr(owner, part)
        site = Site(record.name)
        site.arm()
        rewrite(owner, ada_norm._BY_NAME[record.name].counts, site)
    missing = set(RECORDS) - {case.split()[0] for case in CASES}
    # Output layers and blocks of models; tested within those.
    assert missing == {
        "embeddings.IPAdapterTimeImageProjectionBlock",
        "bria_fibo2.FinalLayer",
        "flux3.Flux3AdaLayerNorm",
        "helios.HeliosOutputNorm",
        "ideogram4.Ideogram4FinalLayer",
        "longcat_audio_dit.AudioDiTAdaLayerNormZeroFinal",
        "minimax_h3.MiniMaxH3AdaLayerNormOut",
        "z_image.FinalLayer",
    }


DRAWS = 64


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["layer", "fp32", "rms", "torch_rms"]),
    affine=st.booleans(),
    product=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    scales=st.sampled_from(["one", "sample", "token"]),
    hidden=st.sampled_from([8, 24, 130]),
    seed=st.integers(0, 2**31),
)
def test_scaled_norms(kind, affine, product, dtype, batch, scales, hidden, seed) -> None:
    """``norm(x) * (1 + scale)`` and ``norm(x) * scale`` over shapes, norms and dtypes."""
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    from mindiesd.patches.scope import Site

    def original(norm, x, scale):
        return norm(x) * scale if product else norm(x) * (1 + scale)

    torch.manual_seed(seed)
    shape = {"one": (1, 1), "sample": (batch, 1), "token": (batch, 5)}[scales]
    site = Site("normalization.LuminaRMSNormZero")
    site.arm()
    build = ada_norm.build_norm_product if product else ada_norm.build_norm_scale
    norm_scale = build(original, site)
    squares = [0.0, 0.0]
    # In half precision ours rounds the parameters, the original every element. Which is luckier
    # differs from one draw to the next; every channel counts alike, or a few large ones decide.
    for _ in range(DRAWS):
        norm = {
            "layer": lambda: torch.nn.LayerNorm(hidden, elementwise_affine=affine, bias=False),
            "fp32": lambda: FP32LayerNorm(hidden, elementwise_affine=affine, bias=False),
            "rms": lambda: RMSNorm(hidden, 1e-5, elementwise_affine=affine),
            "torch_rms": lambda: torch.nn.RMSNorm(hidden, elementwise_affine=affine),
        }[kind]()
        for parameter in norm.parameters():
            torch.nn.init.uniform_(parameter, 0.2, 2)
        norm.to(dtype)
        x = (2 * torch.randn(batch, 5, hidden) + 1).to(dtype)
        # Not so small that float16 has fewer digits for it.
        scale = (torch.rand(*shape, hidden) + 0.1).to(dtype) * (1 - 2 * torch.randint(2, (hidden,)))
        with torch.no_grad():
            ours = norm_scale(norm, x, scale)
            theirs = original(norm, x, scale)
            exact = original(copy.deepcopy(norm).double(), x.double(), scale.double())
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        for which, result in enumerate((ours, theirs)):
            error = (result.double() - exact) / (exact.square().mean((0, 1)).sqrt() + 1e-9)
            squares[which] += error.square().mean().item() / DRAWS
    redirected, _, fell_back = site._own.snapshot()
    if scale.numel() == hidden:
        assert (redirected, fell_back) == (DRAWS, {})
    else:
        assert (redirected, fell_back) == (0, {ada_norm.PER_SAMPLE: DRAWS})
    errors = [math.sqrt(square) for square in squares]
    assert errors[0] <= 1.1 * errors[1] + 4e-7


def test_calls_that_stay_with_the_original() -> None:
    name = "normalization.AdaLayerNormZero"
    module = make(name, torch.float32)
    migration = mindiesd.patch_all(only="ada_norm")
    inputs = CASES[name][1](1, 4)
    # The parameters need gradients.
    assert_same_outcome(module(**inputs)[0], unpatched(module)(module, **inputs)[0])
    assert counts(migration, name)[1] == {law.GRADIENTS: 1}
    with torch.no_grad():
        module.norm.register_forward_hook(lambda norm, given, out: 2 * out)
        torch.testing.assert_close(
            module(**inputs)[0], unpatched(module)(module, **inputs)[0], rtol=1e-5, atol=1e-5
        )
    scaled = make("normalization.LuminaRMSNormZero", torch.float32)
    scaled.norm.register_forward_hook(lambda norm, given, out: 2 * out)
    name, inputs = "normalization.LuminaRMSNormZero", CASES["normalization.LuminaRMSNormZero"][1]
    with torch.no_grad():
        given = inputs(1, 4)
        assert_same_outcome(scaled(**given)[0], unpatched(scaled)(scaled, **given)[0])
        given = inputs(2, 4)
        assert_same_outcome(scaled(**given)[0], unpatched(scaled)(scaled, **given)[0])
    assert counts(migration, name)[1] == {modulation.HOOKED: 2}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph(backend: str) -> None:
    torch.compiler.reset()
    migration = mindiesd.patch_all(only="ada_norm")
    for case in (
        "normalization.AdaLayerNormZero",
        "normalization.AdaLayerNormContinuous",
        "normalization.LuminaRMSNormZero",
        "normalization.LuminaLayerNormContinuous",
        "cogview4.CogView4AdaLayerNormZero",
    ):
        module, inputs = make(case, torch.float32), CASES[case][1](1, 5)
        with torch.no_grad():
            compiled = tensors(torch.compile(module, backend=backend, fullgraph=True)(**inputs))
            for found, expected in zip(compiled, tensors(module(**inputs)), strict=True):
                torch.testing.assert_close(found, expected)
        assert migration.ledger[case].snapshot()[1] > 0
    torch.compiler.reset()
