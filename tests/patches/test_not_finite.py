"""NaN and infinities come out where they come out of the original, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches.engine import ENGINE

SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0)


def tensors(number: int, shape: tuple[int, ...], dtype: torch.dtype, spots: list[Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(number)]
    for which, where, value in spots:
        flat = made[which % number].view(-1)
        flat[where % flat.numel()] = SPECIAL[value]
    return made


def counted(migration: Any) -> int:
    """Calls that came, whatever became of them."""
    redirected, _, fell_back = next(iter(migration.ledger.values())).snapshot()
    return redirected + sum(fell_back.values())


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from diffusers.models import embeddings

    return embeddings.apply_rotary_emb(x, (cos[0, 0], sin[0, 0]))


def diffusers_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from diffusers.models import normalization

    norm = normalization.RMSNorm(x.shape[-1], 1e-6)
    norm.weight = torch.nn.Parameter(weight[0, 0, 0].clone())
    return norm(x)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.LayerNorm(x.shape[-1]).to(x.dtype)(x)


def geglu(x: torch.Tensor) -> torch.Tensor:
    from diffusers.models import activations

    generator = torch.Generator().manual_seed(1)
    layer = activations.GEGLU(x.shape[-1], 4).to(x.dtype)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(x.dtype)
    return layer(x)


# How many tensors of the shape it takes, and the call.
CALLS: dict[str, tuple[int, str, Callable[..., torch.Tensor]]] = {
    "attention": (3, "sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "attention with a mask": (
        3,
        "sdpa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (q @ k.mT)[:, :1]),
    ),
    "causal attention": (
        3,
        "sdpa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    "rms_norm": (2, "torch_rms_norm", lambda x, w: F.rms_norm(x, (8,), w[0, 0, 0])),
    "diffusers RMSNorm": (2, "diffusers_rms_norm", diffusers_norm),
    "layer norm": (1, "torch_layer_norm", layer_norm),
    "rotary": (3, "diffusers_rope", rotary),
    "gelu": (1, "gelu", lambda x: F.gelu(x)),
    "gelu tanh": (1, "gelu", lambda x: F.gelu(x, approximate="tanh")),
    "geglu": (1, "diffusers_GEGLU", geglu),
}


@pytest.fixture(params=CALLS, scope="module")
def patched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One of the calls, with its patch in force."""
    number, patch, call = CALLS[request.param]
    migration = mindiesd.patch_all(only=patch)
    yield number, ENGINE.state(patch).site, call, migration
    mindiesd.unpatch_all()


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> None:
    """Instead of the fixture for all tests, which undoes patches after each."""


@settings(deadline=None, max_examples=25)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spots=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 47), st.integers(0, 3)), max_size=6),
)
def test_parity(patched: Any, dtype: torch.dtype, spots: list[Any]) -> None:
    number, site, call, migration = patched
    given = tensors(number, (1, 2, 3, 8), dtype, spots)
    with torch.no_grad():
        site.everywhere = False
        expected = call(*given)
        site.everywhere = True
        before = counted(migration)
        got = call(*given)
    assert counted(migration) == before + 1
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got == torch.inf, expected == torch.inf)
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
