"""Named attention backends, NPU branches and slicing on the emulated device."""

from __future__ import annotations

import copy

import pytest
import torch

import mindiesd
from mindiesd.emulator import trace
from tests import oracles

from .tiny_models import MODELS, first_tensor, move, without_torch_npu

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def dispatch_module():
    from diffusers.models import attention_dispatch

    return attention_dispatch


def call(name, *tensors, **kwargs):
    module = dispatch_module()
    backend = name if name == "_fused_npu" else module.AttentionBackendName(name)
    there = move(kwargs, lambda tensor: tensor.to("npu"))
    tensors = [tensor.to("npu") for tensor in tensors]
    return module.dispatch_attention_fn(*tensors, backend=backend, **there)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(query, key, value, **kwargs):
    heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return oracles.attention(*heads_first, **kwargs).transpose(1, 2)


MASKS = {
    "bool": torch.tensor([[True] * 4 + [False] * 2] * 2)[:, None, None],
    "bool per query": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.4,
    "keys of each batch": torch.tensor([[True] * 3 + [False] * 3, [True] * 6]),
    "additive": torch.tensor([[0.0] * 4 + [-10000.0] * 2] * 2)[:, None, None],
    "all zero": torch.zeros(2, 1, 1, 6),
    "bias": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(4)),
    "ones and zeros": torch.tensor([[1.0] * 4 + [0.0] * 2] * 2)[:, None, None],
    "of another batch size": torch.tensor([[True] * 5 + [False]])[:, None, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_mean_what_they_mean_to_sdpa(dtype):
    mindiesd.patch_all()
    query, key, value = (draw(2, 6, 4, 16, dtype=dtype, seed=seed) for seed in range(3))
    for mask in MASKS.values():
        four = mask[:, None, None] if mask.dim() == 2 else mask
        keep, bias = (four, None) if mask.dtype is torch.bool else (None, four)
        exact = oracle(query, key, value, keep=keep, bias=bias)
        there = mask.npu()
        for name in ("_native_npu", "_fused_npu", "xformers"):
            with trace() as counted:
                out = call(name, query, key, value, attn_mask=there)
            oracles.assert_close(out.cpu(), exact)
            assert not set(counted.transfers) - {"host -> device"}, "the host waited"


def test_what_native_npu_computes_without_us():
    """The faults that the redirect corrects are there: if one goes, so may a part of it."""
    query, key, value = (draw(2, 6, 4, 16, dtype=torch.float16, seed=seed) for seed in range(3))

    def fault(exact, **kwargs):
        out = call("_native_npu", query, key, value, **kwargs).cpu()
        return (out.double() - exact).abs().max() > 0.3

    for kind in ("additive", "all zero"):
        assert fault(oracle(query, key, value, bias=MASKS[kind]), attn_mask=MASKS[kind])
    assert fault(oracle(query, key, value, keep=oracles.top_left(6, 6)), is_causal=True)
    with trace() as counted:
        call("_native_npu", query, key, value, attn_mask=MASKS["bool"])
    assert counted.transfers, "the mask was not looked at by the host"


NAMES = ("native", "flash", "flash_varlen", "sage", "xformers", "_native_npu", "_native_cudnn")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_fused_kernel_and_no_copy(dtype):
    """[B, S, N, D] tensors go into the kernel as they are, and the result comes back as one."""
    mindiesd.patch_all()
    query, key, value = (draw(1, 64, 4, 32, dtype=dtype, seed=seed).npu() for seed in range(3))
    for is_causal in (False, True):
        keep = oracles.top_left(64, 64) if is_causal else None
        exact = oracle(query.cpu(), key.cpu(), value.cpu(), keep=keep)
        call("native", query, key, value, is_causal=is_causal)  # the causal triangle is made once
        for name in NAMES:
            with trace() as counted:
                out = call(name, query, key, value, is_causal=is_causal)
            assert list(counted.launches.values()) == [1], (name, counted)
            assert next(iter(counted.launches)).startswith("npu::npu_fusion_attention")
            assert not counted.layout_copies
            assert not counted.squares
            assert not counted.transfers
            assert out.is_contiguous()
            oracles.assert_close(out.cpu(), exact)


def test_windows_of_flash_attention_are_no_matrix():
    mindiesd.patch_all()
    query, key, value = (
        draw(1, 48, 4, 32, dtype=torch.bfloat16, seed=seed).npu() for seed in range(3)
    )
    kwargs = {"attention_kwargs": {"window_size": (5, 3)}}
    call("flash", query, key, value, **kwargs)
    with trace() as counted, torch.no_grad():
        out = call("flash", query, key, value, **kwargs)
    assert counted.total == 1 and not counted.squares
    keep = oracles.window(48, 48, 5, 3)
    oracles.assert_close(out.cpu(), oracle(query.cpu(), key.cpu(), value.cpu(), keep=keep))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("chroma", "_native_npu"),
        ("ltx", "_native_npu"),
        ("ltx", "flash_varlen"),
        ("hunyuan15", "flash_varlen"),
        ("wan", "sage"),
    ],
)
def test_models_with_a_named_backend(name, backend):
    tiny = MODELS[name]
    inputs = tiny.make_inputs()
    if name == "chroma":  # as its pipeline passes it: ones and zeros that SDPA adds
        inputs["attention_mask"] = (torch.arange(64) < 40).float()[None]
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(tiny.build()(**copy.deepcopy(inputs)))
    migration = mindiesd.patch_all()
    model = tiny.build().to("npu")
    registry = dispatch_module()._AttentionBackendRegistry
    before = registry._active_backend
    try:
        model.set_attention_backend(backend)
        there = move(inputs, lambda tensor: tensor.to("npu"))
        rejects = name == "ltx" and backend == "flash_varlen"
        with torch.no_grad():
            if rejects:  # additive masks
                with pytest.raises(ValueError, match="must be of type bool"):
                    model(**there)
                return
            got = first_tensor(model(**there))
    finally:
        registry.set_active_backend(before)
    torch.testing.assert_close(got.cpu(), expected, atol=2e-5, rtol=2e-5)
    assert migration.ledger["diffusers_dispatch"].snapshot()[0] > 0


@pytest.mark.parametrize("backend", ["native", "_native_npu"])
def test_tensors_on_the_host_while_torch_npu_is_installed(backend):
    """``_native_npu`` alone fails there: its operator has no kernel for the CPU."""
    module = dispatch_module()
    query = draw(1, 6, 4, 16)
    mindiesd.patch_all(only="attention_backend")
    out = module.dispatch_attention_fn(
        query, query, query, backend=module.AttentionBackendName(backend)
    )
    oracles.assert_close(out, oracle(query, query, query))


LAYERS = {
    "self": ({}, {}),
    "cross": ({"cross_attention_dim": 16}, {"encoder_hidden_states": draw(2, 5, 16, seed=2)}),
    "mask": ({}, {"attention_mask": torch.tensor([[0.0] * 4 + [-10000.0] * 3] * 2)[:, None]}),
    "bias": ({}, {"attention_mask": draw(2, 1, 7, seed=3)}),
    "normed": ({"qk_norm": "rms_norm"}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_npu_processor(name, dtype):
    from diffusers.models.attention_processor import Attention

    options, inputs = LAYERS[name]
    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=4, dim_head=8, **options).eval()
    states = draw(2, 7, 32)
    with torch.no_grad(), without_torch_npu():
        expected = layer(states, **inputs)
    layer.set_use_npu_flash_attention(True)
    layer = layer.to("npu", dtype)
    mindiesd.patch_all()
    with torch.no_grad():
        there = move(inputs, lambda tensor: tensor.to("npu", dtype))
        out = layer(states.to("npu", dtype), **there)
    bound = 5e-6 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(out.cpu().float(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_become_one_kernel(dtype):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=4, dim_head=8).eval()
    states = draw(2, 70, 32, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(states.double())
    layer = layer.to("npu", dtype)
    there = states.npu()
    layer.set_attention_slice(1)
    with torch.no_grad(), trace() as sliced:
        before = layer(there)
    migration = mindiesd.patch_all()
    with torch.no_grad():
        with trace() as fused:
            after = layer(there)
        assert fused.squares.total() == 0
        assert sliced.squares.total() > 0
        assert fused.launches["npu::npu_fusion_attention"] == 1
        assert fused.total < sliced.total / 3
        oracles.assert_as_accurate(after.cpu(), before.cpu(), exact)
        assert migration.ledger["diffusers_sliced_processor"].snapshot()[0] == 1
        layer(there, attention_mask=torch.zeros(2, 1, 70, dtype=dtype).npu())
    mindiesd.unpatch_all()
    with torch.no_grad():
        assert torch.equal(layer(there), before)
        only = mindiesd.patch_all(only="diffusers_sliced_processor")
        assert torch.equal(layer(there), before), "sliced on request, with nothing to fuse it"
    assert only.ledger["diffusers_sliced_processor"].snapshot()[0] == 0


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return transformers.LlamaModel(config).eval()


def graded_mask(length, dtype=torch.float32):
    """Causal, and with a bias whose every value counts."""
    causal = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
    bias = draw(length, length, dtype=dtype, seed=5).tril()
    return (causal + bias)[None, None]


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_additive_masks_of_text_encoders(device):
    """transformers turns them into bool ones wherever torch_npu is installed."""
    model = llama(attn_implementation="eager")
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(tokens, attention_mask=graded_mask(7)).last_hidden_state
    model = llama(attn_implementation="sdpa").to(device)
    inputs = {
        "input_ids": tokens.to(device),
        "attention_mask": graded_mask(7).to(device),
    }
    with torch.no_grad():
        wrong = model(**inputs).last_hidden_state.cpu()
        assert (wrong - expected).abs().max() > 0.05, "transformers has mended it"
        migration = mindiesd.patch_all(only=["attention_backend", "sdpa"])
        got = model(**inputs).last_hidden_state.cpu()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert migration.ledger["transformers_sdpa"].snapshot()[0] == 2
    mindiesd.unpatch_all()
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state.cpu(), wrong)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_other_text_encoders_are_passed_through(name):
    tiny = MODELS[name]
    inputs = tiny.make_inputs()
    with torch.no_grad(), without_torch_npu():
        expected = first_tensor(tiny.build()(**copy.deepcopy(inputs)))
    mindiesd.patch_all(only=["attention_backend", "sdpa"])
    model = tiny.build().to("npu")
    with torch.no_grad():
        got = first_tensor(model(**move(inputs, lambda tensor: tensor.to("npu"))))
    torch.testing.assert_close(got.cpu(), expected, atol=5e-6, rtol=5e-6)


def windowed(implementation, kind="mistral"):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 3,
        "attn_implementation": implementation,
    }
    if kind == "mistral":
        return transformers.MistralModel(transformers.MistralConfig(**sizes)).eval()
    config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=2.0)
    return transformers.Gemma2Model(config).eval()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_and_softcaps_of_flash_attention_2(kind, padded):
    """transformers' functions for NPUs ignore windows, and refuse softcaps."""
    inputs = {"input_ids": torch.arange(18).view(2, 9)}
    real = torch.ones(2, 9, dtype=torch.long)
    if padded:
        real[0, :4] = 0
        inputs["attention_mask"] = real
    with torch.no_grad():
        exact = windowed("eager", kind)(**inputs).last_hidden_state
    inputs = move(inputs, lambda tensor: tensor.to("npu"))
    model = windowed("flash_attention_2", kind).to("npu", torch.float16)

    @torch.no_grad()
    def error():
        out = model(**inputs).last_hidden_state.cpu()
        return (out - exact)[real.bool()].abs().max()

    if kind == "mistral":
        before = error()
        assert before > 0.5, "transformers has mended it"
    else:
        with pytest.raises(ValueError, match="softcap"):
            error()
    migration = mindiesd.patch_all(only="transformers_flash")
    assert error() < 0.02
    assert migration.ledger["transformers_flash"].snapshot()[0] == 2
    mindiesd.unpatch_all()
    if kind == "mistral":
        assert error() == before


def test_windows_for_one_model_only():
    inputs = {"input_ids": torch.arange(9)[None].npu()}
    model, other = (windowed("flash_attention_2").to("npu", torch.float16) for _ in range(2))
    with torch.no_grad():
        wrong = other(**inputs).last_hidden_state
        with mindiesd.patch_pipeline(model, only="transformers_flash"):
            assert (model(**inputs).last_hidden_state - wrong).abs().max() > 0.5
            assert torch.equal(other(**inputs).last_hidden_state, wrong)
        assert torch.equal(model(**inputs).last_hidden_state, wrong)


def test_training_with_a_window_raises():
    mindiesd.patch_all(only="transformers_flash")
    model = windowed("flash_attention_2").to("npu", torch.float16)
    with pytest.raises(mindiesd.ParametersInvalid, match="gradients"):
        model(input_ids=torch.arange(9)[None].npu())
