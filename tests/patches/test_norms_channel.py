"""The norms of video autoencoders: dtypes, strides and float64, alone and in a whole decoder."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches import channel_norm, law
from tests.patches.norm_cases import DTYPES, unpatched
from tests.patches.test_norms_classes import assert_accurate, counts
from tests.patches.test_sdpa import assert_same_outcome, outcome

RECORDS = {record.name: record for record in channel_norm.RECORDS}
# Those that take an image or a video, channels first or last, and a bias.
CHOOSING = sorted(name for name in RECORDS if "Kandinsky" not in name)


def make(name: str, dim: int, dtype: torch.dtype, **options) -> torch.nn.Module:
    record = RECORDS[name]
    owner = getattr(importlib.import_module(record.module), record.attribute.split(".")[0])
    module = owner(dim, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.to(dtype)


def oracle(module: torch.nn.Module, x: torch.Tensor, dim: int) -> torch.Tensor:
    x = x.double()
    y = x / x.square().sum(dim, keepdim=True).sqrt().clamp_min(1e-12)
    y = y * x.shape[dim] ** 0.5 * module.gamma.double()
    bias = getattr(module, "bias", 0.0)
    return y + (bias.double() if isinstance(bias, torch.Tensor) else bias)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(CHOOSING),
    x_dtype=st.sampled_from(DTYPES),
    gamma_dtype=st.sampled_from(DTYPES),
    images=st.booleans(),
    channel_first=st.booleans(),
    bias=st.booleans(),
    dim=st.sampled_from([1, 3, 32]),
    magnitude=st.sampled_from([0.0, 1e-4, 1.0, 300.0]),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_channel_norms(
    name, x_dtype, gamma_dtype, images, channel_first, bias, dim, magnitude, last, seed
) -> None:
    torch.manual_seed(seed)
    migration = mindiesd.patch_all(only="channel_norm")
    module = make(name, dim, gamma_dtype, images=images, channel_first=channel_first, bias=bias)
    places = (4, 5) if images else (3, 4, 5)
    shape = (2, dim, *places) if channel_first else (2, *places, dim)
    x = (magnitude * torch.randn(shape)).to(x_dtype)
    if last and channel_first:
        order = torch.channels_last if images else torch.channels_last_3d
        x = x.contiguous(memory_format=order)
    before, _ = counts(migration, name)
    with torch.no_grad():
        ours, theirs = module(x), unpatched(module)(module, x)
    assert counts(migration, name)[0] == before + 1
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.stride() == theirs.stride() or dim == 1
    assert_accurate(ours, theirs, oracle(module, x, 1 if channel_first else -1))


@pytest.mark.parametrize("name", sorted(set(RECORDS) - set(CHOOSING)))
def test_kandinsky(name: str) -> None:
    migration = mindiesd.patch_all(only="channel_norm")
    for dtype in DTYPES:
        module = make(name, 8, dtype)
        x = torch.randn(2, 8, 3, 4, 5).to(dtype)
        with torch.no_grad():
            ours, theirs = module(x), unpatched(module)(module, x)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert_accurate(ours, theirs, oracle(module, x, 1))
    assert counts(migration, name) == (2, {channel_norm.NOTHING_SAVED: 1})


def test_calls_that_stay_with_the_original() -> None:
    name = "diffusers_WanRMS_norm"
    module = make(name, 4, torch.float32)
    migration = mindiesd.patch_all(only="channel_norm")
    x = torch.randn(2, 4, 3, 3)
    for value, reason in (
        (x, law.GRADIENTS),
        (x.double(), law.DTYPE),
        (torch.randn(4), law.WEIGHT_SHAPE),
        ("x", law.NOT_A_TENSOR),
    ):
        theirs = outcome(unpatched(module), module, value)
        assert_same_outcome(outcome(module, value), theirs)
        assert counts(migration, name)[1].get(reason), reason
    assert counts(migration, name)[0] == 0


def tiny_wan() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_decoder(dtype: torch.dtype) -> None:
    model = tiny_wan().to(dtype)
    latents = torch.randn(1, 4, 1, 4, 4).to(dtype)

    @torch.no_grad()
    def decode(one: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
        return one.decode(given, return_dict=False)[0]

    plain = decode(model, latents)
    exact = decode(tiny_wan().to(dtype).double(), latents.double())
    migration = mindiesd.patch_all(only="channel_norm")
    patched = decode(model, latents)
    assert patched.dtype == plain.dtype
    redirected, fell_back = counts(migration, "diffusers_WanRMS_norm")
    assert redirected > 10 and not fell_back
    ours, theirs = (r.double() - exact for r in (patched, plain))
    slack = 1e-6 * exact.abs().max()
    assert ours.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt() + slack
