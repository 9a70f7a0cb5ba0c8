"""cache-dit, which imports the documented layers API from mindiesd.layers.

Run by test_libraries.py in a process of its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from tests.others.test_libraries import counts, run, unpatched_afterwards  # noqa: F401 - a fixture
from tests.tiny import tiny_flux_transformer


@pytest.fixture
def cache_dit() -> Any:
    import cache_dit as found
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    active = registry._active_backend
    yield found
    # Setting a model's backend makes it every model's.
    registry._active_backend = active


def test_cache_dit_computes_attention_by_our_layers(cache_dit: Any) -> None:
    from cache_dit.attention.backends.register import _AttnBackend, _AttnBackendRegistry

    laser = _AttnBackendRegistry._backends[_AttnBackend._MINDIESD_LASER]
    q, k, v = torch.randn(3, 2, 24, 4, 16)
    expected = F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in (q, k, v)]).transpose(
        1, 2
    )
    torch.testing.assert_close(laser(q, k, v), expected)
    mask = torch.rand(2, 1, 24, 24) > 0.3
    expected = F.scaled_dot_product_attention(
        *[t.transpose(1, 2) for t in (q, k, v)], mask, scale=0.1
    ).transpose(1, 2)
    torch.testing.assert_close(laser(q, k, v, attn_mask=mask, scale=0.1), expected)
    model = tiny_flux_transformer()
    plain = run(model)
    cache_dit.set_attn_backend(model, attention_backend="_mindiesd_laser")
    torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=1e-3)
    migration = mindiesd.patch_all()
    torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=1e-3)
    assert counts(migration)["diffusers_rope"] == 4


def test_cache_dit_falls_back_where_we_have_no_such_module(cache_dit: Any) -> None:
    from cache_dit.compile.utils import mindiesd_compile, mindiesd_compile_available

    assert mindiesd_compile_available() is False
    assert mindiesd_compile(torch.nn.Linear(2, 2), "linear", "Linear") is None


def test_cache_dits_caching(cache_dit: Any) -> None:
    def steps(model: Any) -> list[torch.Tensor]:
        cache_dit.enable_cache(
            cache_dit.BlockAdapter(
                transformer=model,
                blocks=[model.transformer_blocks, model.single_transformer_blocks],
                forward_pattern=[cache_dit.Pattern_1, cache_dit.Pattern_1],
            ),
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, num_inference_steps=6,
                residual_diff_threshold=0.5,
            ),
        )  # fmt: skip
        try:
            return [run(model, seed=1 + step // 3) for step in range(6)]
        finally:
            cache_dit.disable_cache(model)

    model = tiny_flux_transformer(num_layers=2, num_single_layers=2)
    plain = run(model)
    expected = steps(copy.deepcopy(model))
    migration = mindiesd.patch_all()
    for got, wanted in zip(steps(copy.deepcopy(model)), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    assert counts(migration)["sdpa"] > 0
    mindiesd.unpatch_all()
    assert torch.equal(run(model), plain)
