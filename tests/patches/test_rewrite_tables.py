"""What is remembered from step to step: the same bits, and never stale."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches import memory
from tests.emulator.tiny_models import MODELS, first_tensor

CPU = torch.device("cpu")


@pytest.fixture
def kept() -> memory.Memory:
    return memory.Memory()


@pytest.fixture(autouse=True)
def forgotten():
    memory.MEMORY.clear()
    yield
    memory.MEMORY.clear()


class Doubled:
    """A function of a tensor that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2

    def recalled(self, kept: memory.Memory, x: torch.Tensor, key: object = 0) -> torch.Tensor:
        return kept.recall(key, (x,), CPU, lambda: self(x))


def test_the_same_tensor_is_asked_for_once(kept) -> None:
    twice, x = Doubled(), torch.arange(3.0)
    first = twice.recalled(kept, x)
    assert twice.recalled(kept, x) is first
    assert torch.equal(first, torch.tensor([0.0, 2.0, 4.0]))
    assert twice.calls == 1
    twice.recalled(kept, x, key=1)
    twice.recalled(kept, x.clone())
    assert twice.calls == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x[1:].mul_(3),
        lambda x: x.set_(torch.arange(5.0)),
        lambda x: x.resize_(2),
    ],
)
def test_a_change_is_noticed(kept, change) -> None:
    twice, x = Doubled(), torch.arange(3.0)
    twice.recalled(kept, x)
    change(x)
    assert torch.equal(twice.recalled(kept, x), x * 2)
    assert twice.calls == 2


def test_a_written_result_is_made_anew(kept) -> None:
    twice, x = Doubled(), torch.arange(3.0)
    twice.recalled(kept, x).zero_()
    assert torch.equal(twice.recalled(kept, x), x * 2)


def test_views_count_by_what_they_look_into(kept) -> None:
    twice, x = Doubled(), torch.arange(6.0).view(1, 6)
    assert twice.recalled(kept, x[0]) is twice.recalled(kept, x[0])
    assert not torch.equal(twice.recalled(kept, x[0, :3]), twice.recalled(kept, x[0, 3:]))
    x.add_(1)
    assert torch.equal(twice.recalled(kept, x[0]), x[0] * 2)
    assert twice.calls == 4


def test_nothing_is_kept_alive(kept) -> None:
    twice, x = Doubled(), torch.arange(3.0)
    result = weakref.ref(twice.recalled(kept, x))
    source = weakref.ref(x)
    assert len(kept) == 1 and result() is not None
    del x
    gc.collect()
    assert source() is None and result() is None and len(kept) == 0


def test_a_result_that_shares_memory_is_not_kept(kept) -> None:
    x = torch.arange(6.0)
    kept.recall(0, (x,), CPU, lambda: x[1:])
    kept.recall(0, (x,), CPU, lambda: [x * 2])
    assert len(kept) == 0


def test_bounds(kept, monkeypatch) -> None:
    for number in range(memory.RESULTS + 10):
        kept.recall(number, (), CPU, lambda: torch.zeros(1))
    assert len(kept) == memory.RESULTS
    monkeypatch.setattr(memory, "TOTAL", 4 * 100)
    kept.recall("new", (), CPU, lambda: torch.zeros(60))
    assert len(kept) == 41
    monkeypatch.setattr(memory, "LARGEST", 4 * 10)
    kept.recall("large", (), CPU, lambda: torch.zeros(11))
    assert len(kept) == 41


def test_inference_and_gradients_and_modes(kept) -> None:
    twice = Doubled()
    with torch.inference_mode():
        x = torch.arange(3.0)
        for _ in range(2):
            twice.recalled(kept, x)
    assert (twice.calls, len(kept)) == (2, 0)
    learned = torch.ones(3, requires_grad=True)
    assert twice.recalled(kept, learned).requires_grad
    assert len(kept) == 0
    plain = torch.arange(3.0)
    with torch.inference_mode():
        # Normal tensors stay normal, so what is kept can be used outside.
        assert not twice.recalled(kept, plain).is_inference()


def test_threads(kept) -> None:
    twice, x = Doubled(), torch.arange(100.0)
    found = []

    def work() -> None:
        found.extend(twice.recalled(kept, x) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert twice.calls == 1
    assert len({id(result) for result in found}) == 1


# The timestep embedding.


def test_timestep_embedding_is_bitwise_equal() -> None:
    from diffusers.models import embeddings

    migration = mindiesd.patch_all(only="embeddings.get_timestep_embedding")
    ours = embeddings.get_timestep_embedding
    even = []

    @settings(deadline=None, max_examples=60)
    @given(
        width=st.integers(2, 40),
        flip=st.booleans(),
        shift=st.sampled_from([0, 1, 0.5]),
        scale=st.sampled_from([1, 1.0, 1000.0, 0.3]),
        period=st.sampled_from([10000, 100, 1.5]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64]),
        batch=st.integers(1, 3),
    )
    def compare(width, flip, shift, scale, period, dtype, batch) -> None:
        arguments = (torch.linspace(0, 999, batch).to(dtype), width, flip, shift, scale, period)
        expected = ours.__wrapped__(*arguments)
        even.append(width % 2 == 0)
        got = ours(*arguments)
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    compare()
    assert migration.report().redirected == sum(even) > 0


# Rotary tables, and embeddings of positions.


def assert_same(*calls) -> None:
    """Each call gives the same bits unpatched and, twice, patched."""
    plain = [call() for call in calls]
    migration = mindiesd.patch_all(only="tables")
    for call, expected in zip(calls * 2, plain * 2, strict=True):
        got = call()
        ours, theirs = (one if isinstance(one, tuple) else (one,) for one in (got, expected))
        for mine, original in zip(ours, theirs, strict=True):
            assert mine.dtype is original.dtype
            assert torch.equal(mine, original)
    assert migration.report().redirected >= len(calls) * 2
    mindiesd.unpatch_all()


def embedding(name: str, *given, **named):
    """A function of diffusers, looked up when it is called."""
    from diffusers.models import embeddings

    return getattr(embeddings, name)(*given, **named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotary_tables_are_bitwise_equal(dtype) -> None:
    positions = torch.tensor([0.0, 1.0, 3.0, 100.5, 4096.0])
    forms = ({"use_real": True}, {"use_real": True, "repeat_interleave_real": False}, {})
    thetas = (10000, 10000.0, 256)
    assert_same(
        *(
            partial(
                embedding,
                "get_1d_rotary_pos_embed",
                dim,
                where,
                theta=theta,
                linear_factor=factor,
                freqs_dtype=dtype,
                **form,
            )
            for form in forms
            for theta in thetas
            for dim, factor in ((8, 1.0), (8, 1.5), (4, 1.5))
            for where in (positions, 7)
        )
    )


def test_embeddings_of_positions_are_bitwise_equal() -> None:
    device = torch.device("cpu")
    sizes = ((32, (3, 5), 2), (32, (5, 3), 2), (32, 4, 3))
    assert_same(
        *(partial(embedding, "get_3d_sincos_pos_embed", *size, device=device) for size in sizes)
    )
    # Where no device is named, it depends on more than the numbers.
    migration = mindiesd.patch_all(only="embeddings.get_3d_sincos_pos_embed")
    embedding("get_3d_sincos_pos_embed", 32, 4, 3)
    assert migration.report().fell_back and not migration.report().redirected


def test_tables_of_a_shape_and_numbers() -> None:
    from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    cosmos, ltx = CosmosRotaryPosEmbed(24), LTXVideoRotaryPosEmbed(24)
    calls: list = []
    for frames in (2, 3):
        x, tokens = torch.randn(1, 4, frames, 8, 6), torch.randn(2, frames * 12, 24)
        calls += [partial(cosmos, x, fps=fps) for fps in (None, 8, 8.0, 24)]
        calls += [partial(cosmos, hidden_states=x, fps=24)]
        scales = (None, (0.5, 32, 32), (0.25, 32, 32))
        calls += [partial(ltx, tokens, frames, 4, 3, scale) for scale in scales]
    assert_same(*calls)
    migration = mindiesd.patch_all(only="ltx.LTXVideoRotaryPosEmbed")
    factor = torch.tensor(0.5)
    kept = ltx(tokens, 3, 4, 3, (factor, 32, 32))
    factor.mul_(3)
    assert not torch.equal(ltx(tokens, 3, 4, 3, (factor, 32, 32))[0], kept[0])
    assert not migration.report().redirected and migration.report().fell_back


# Scales that are parts of one projection.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_is_added_to_all_scales_at_once(dtype) -> None:
    from mindiesd.patches import modulation

    whole = torch.randn(2, 6 * 8).to(dtype)
    parts = whole.chunk(6, dim=1)
    first = modulation.one_more(parts[1].unsqueeze(1))
    assert torch.equal(first, 1 + parts[1].unsqueeze(1))
    second = modulation.one_more(parts[4][:, None])
    assert torch.equal(second, 1 + parts[4][:, None])
    assert second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    whole[0, 8] = 100.0
    assert torch.equal(modulation.one_more(parts[1]), 1 + parts[1])
    parts[4].add_(1)
    assert torch.equal(modulation.one_more(parts[4]), 1 + parts[4])


def test_scales_of_their_own_are_left() -> None:
    from mindiesd.patches import modulation

    assert modulation.one_more(torch.randn(2, 8)) is None
    assert modulation.one_more(torch.randn(2, 16).chunk(2, dim=1)[0]) is None
    turned = torch.empty_strided((2, 48), (1, 2)).normal_()
    assert modulation.one_more(turned.chunk(6, dim=1)[0]) is None
    assert modulation.one_more(torch.randn(6, 1 << 20).chunk(6)[0]) is None
    learned = torch.randn(2, 48, requires_grad=True)
    with torch.no_grad():
        assert modulation.one_more(learned.chunk(6, dim=1)[0]) is None
    with torch.inference_mode():
        assert modulation.one_more(torch.randn(2, 48).chunk(6, dim=1)[0]) is None


def test_the_most_recent_is_per_thread_and_kept_by_the_table() -> None:
    twice_of = Doubled()
    recent, x = memory.Recent("test", twice_of), torch.arange(3.0)
    first = recent(x)
    assert recent(x) is first and twice_of.calls == 1
    x.add_(1)
    assert torch.equal(recent(x), x * 2) and twice_of.calls == 2
    recent(x).zero_()
    assert torch.equal(recent(x), x * 2) and twice_of.calls == 3
    found = []
    thread = threading.Thread(target=lambda: found.append(recent(x)))
    thread.start()
    thread.join()
    assert found[0] is recent(x) and twice_of.calls == 3
    memory.MEMORY.clear()
    del first
    found.clear()
    gc.collect()
    recent(x)
    assert twice_of.calls == 4


# Models.


@pytest.mark.parametrize("name", ["flux", "flux2", "bria", "hunyuan_video"])
@torch.no_grad()
def test_a_model_sees_every_change_of_its_ids(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    ids = [key for key in inputs if key.endswith("ids")]

    def run() -> torch.Tensor:
        return first_tensor(model(**inputs)).clone()

    def pictures() -> list[torch.Tensor]:
        found = [run(), run()]
        for key in ids:
            before = inputs[key].clone()
            inputs[key].add_(torch.arange(inputs[key].numel()).view_as(inputs[key]))
            found.append(run())
            inputs[key] = before.clone()
            found.append(run())
        if name == "hunyuan_video":
            latents = inputs["hidden_states"]
            inputs["hidden_states"] = latents[..., :8]
            found.append(run())
            inputs["hidden_states"] = latents
        return found

    expected = pictures()
    migration = mindiesd.patch_all(only="tables")
    got = pictures()
    assert migration.report().redirected
    assert len({tuple(picture.flatten()[:8].tolist()) for picture in got}) > 1
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(memory.MEMORY)
    mindiesd.unpatch_all()
    assert not len(memory.MEMORY)


@torch.no_grad()
def test_settings_of_the_module_count() -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.arange(12.0).view(4, 3)
    modules = [FluxPosEmbed(theta, [4, 4, 8]) for theta in (10000, 500)]
    expected = [module(ids) for module in modules]
    mindiesd.patch_all(only="tables")
    for _ in range(2):
        for module, tables in zip(modules, expected, strict=True):
            for ours, theirs in zip(module(ids), tables, strict=True):
                assert torch.equal(ours, theirs)
    modules[0].theta = 500
    assert torch.equal(modules[0](ids)[0], expected[1][0])


def test_inference_mode_is_told() -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    migration = mindiesd.patch_all(only="flux.FluxPosEmbed")
    with torch.inference_mode():
        FluxPosEmbed(10000, [4, 4, 8])(torch.arange(12.0).view(4, 3))
    assert migration.report().fell_back
    assert not len(memory.MEMORY)
