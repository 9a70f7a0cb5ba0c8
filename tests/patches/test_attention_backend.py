"""diffusers' named attention backends without their packages: the rules of each, and the doors."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches.attention_backend.contract import CONTRACTS
from tests import oracles
from tests.processes import run_python
from tests.tiny import flux_inputs, tiny_flux_transformer

DISPATCH = import_module("diffusers.models.attention_dispatch")
NAMES = DISPATCH.AttentionBackendName
RECORDS = "attention_backend"

FLASH = ("flash", "flash_hub", "_flash_3", "_flash_3_hub", "flash_4_hub", "aiter_fa2_hub")
VARLEN = ("flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub")
SAGE = ("sage", "sage_hub", "sage_blackwell_hub", "_sage_qk_int8_pv_fp16_triton")
WINDOWS = ("flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "_flash_3_hub")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the packages may run here")


@pytest.fixture
def patched():
    return mindiesd.patch_all(only=RECORDS)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(query, key, value, **kwargs):
    """[B, S, N, D] attention in float64."""
    heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return oracles.attention(*heads_first, **kwargs).transpose(1, 2)


def call(name, *tensors, **kwargs):
    return DISPATCH.dispatch_attention_fn(*tensors, backend=NAMES(name), **kwargs)


def redirected(migration, name="diffusers_dispatch"):
    return migration.ledger[name].snapshot()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_name_computes_attention(patched, dtype):
    query, key, value = (draw(2, 7, 4, 16, dtype=dtype, seed=seed) for seed in range(3))
    theirs = call("native", query, key, value, scale=0.3)
    exact = oracle(query, key, value, scale=0.3)
    known = [name for name in CONTRACTS if name in set(NAMES)]
    assert len(known) == 23
    for name in known:
        before = redirected(patched)
        out = call(name, query, key, value, scale=0.3)
        assert out.dtype is dtype
        oracles.assert_as_accurate(out, theirs, exact)
        taken = redirected(patched) - before
        assert taken == (name != "_native_flash"), name  # PyTorch has that one on the CPU


def test_every_backend_is_known_or_left_alone_on_purpose():
    """A backend that diffusers adds shall not go unnoticed."""
    left_alone = {"native", "flex", "_native_math", "_native_xla"}
    assert {name.value for name in NAMES} <= set(CONTRACTS) | left_alone


lengths = st.integers(1, 9)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([*FLASH, *VARLEN]),
    queries=lengths,
    keys=lengths,
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    window=st.sampled_from([None, (-1, -1), (2, -1), (-1, 1), (3, 0), (0, 2)]),
    gradients=st.booleans(),
)
def test_causal_flags_windows_and_heads_of_flash_attention(
    patched, name, queries, keys, heads, causal, window, gradients
):
    """Aligned at the bottom right; fewer key heads need no flag; rows without a key are zero."""
    query = draw(2, queries, heads[0], 8).requires_grad_(gradients)
    key, value = draw(2, keys, heads[1], 8, seed=1), draw(2, keys, heads[1], 8, seed=2)
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        keep &= oracles.bottom_right(queries, keys)
    if window is not None and name in WINDOWS:
        keep &= oracles.window(queries, keys, *window)
    given_window = None if window is None else {"window_size": window}
    out = call(name, query, key, value, is_causal=causal, attention_kwargs=given_window)
    assert out.requires_grad == gradients
    oracles.assert_close(out, oracle(query.detach(), key, value, keep=keep))


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([*VARLEN, "sage_varlen"]),
    kept=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2),
    dims=st.integers(1, 4),
    causal=st.booleans(),
    left=st.sampled_from([-1, 2]),
)
def test_padding_masks_of_the_variable_length_backends(patched, name, kept, dims, causal, left):
    """Each sequence is as long as its kept keys, and causal flags count within it."""
    causal = causal and name != "sage_varlen"
    queries, keys = 4, 6
    query, key, value = draw(2, queries, 2, 8), draw(2, keys, 2, 8), draw(2, keys, 2, 8, seed=2)
    padding = torch.tensor(kept if dims > 1 else kept[:1])
    mask = {
        1: padding[0],
        2: padding,
        3: padding[:, None].expand(-1, queries, -1),
        4: padding[:, None, None],
    }[dims]
    window = (left, -1) if name in WINDOWS else None
    out = call(
        name,
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        attention_kwargs=None if window is None else {"window_size": window},
    )
    rows = padding.expand(2, -1).tolist()
    for row, present in enumerate(rows):
        columns = [j for j in range(keys) if present[j]]
        keep = torch.ones(queries, len(columns), dtype=torch.bool)
        if causal:
            keep &= oracles.bottom_right(queries, len(columns))
        if window is not None:
            keep &= oracles.window(queries, len(columns), *window)
        one = slice(row, row + 1)
        exact = oracle(query[one], key[one][:, columns], value[one][:, columns], keep=keep)
        oracles.assert_close(out[one], exact)


def test_masks_that_a_backend_rejects_still_raise_the_same():
    query = draw(1, 4, 2, 16)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    messages = []
    for _ in range(2):
        said = []
        for name in (*FLASH, *SAGE, "_native_flash"):
            with pytest.raises(ValueError, match="attn_mask") as raised:
                call(name, query, query, query, attn_mask=mask)
            said.append(str(raised.value))
        messages.append(said)
        migration = mindiesd.patch_all(only=RECORDS)
    assert messages[0] == messages[1]
    assert redirected(migration) == 0


def test_additive_masks_of_the_variable_length_backends_still_raise(patched):
    query = draw(1, 4, 2, 16)
    with pytest.raises(ValueError, match="must be of type bool"):
        call("flash_varlen", query, query, query, attn_mask=torch.zeros(1, 1, 1, 4))
    assert sum(patched.report().patches[0].fell_back.values()) == 1


def test_softcap_and_what_cannot_be_returned(patched):
    query, key, value = (draw(1, 6, 2, 8, seed=seed) * 3 for seed in range(3))
    extras = {"softcap": 1.5, "window_size": (2, 0)}
    out = call("_flash_3_hub", query, key, value, attention_kwargs=extras)
    exact = oracle(query, key, value, keep=oracles.window(6, 6, 2, 0), softcap=1.5)
    oracles.assert_close(out, exact)
    for name, word in (("flash", "return_lse"), ("_flash_3_hub", "return_attn_probs")):
        with pytest.raises(mindiesd.ParametersInvalid, match="log-sum-exp"):
            call(name, query, key, value, attention_kwargs={word: True})
    with pytest.raises(mindiesd.ParametersInvalid, match="gradients"):
        call("_flash_3_hub", query.requires_grad_(), key, value, attention_kwargs={"softcap": 1.0})


def test_sage_is_causal_for_equal_lengths_only(patched):
    query, key = draw(1, 5, 2, 16), draw(1, 7, 2, 16)
    oracles.assert_close(
        call("sage", query, query, query, is_causal=True),
        oracle(query, query, query, keep=oracles.top_left(5, 5)),
    )
    with pytest.raises(mindiesd.ParametersInvalid, match="is_causal"):
        call("sage", query, key, key, is_causal=True)


MASKS = {
    "none": None,
    "bool": torch.tensor([[True] * 4 + [False] * 2] * 2)[:, None, None],
    "bool per query": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.4,
    "keys of each batch": torch.tensor([[True] * 3 + [False] * 3, [True] * 6]),
    "additive": torch.tensor([[0.0] * 4 + [-10000.0] * 2] * 2)[:, None, None],
    "all zero": torch.zeros(2, 1, 1, 6),
    "-inf": torch.tensor([[0.0] * 4 + [-math.inf] * 2] * 2)[:, None, None],
    "bias": torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(4)),
    "ones and zeros": torch.tensor([[1.0] * 4 + [0.0] * 2] * 2)[:, None, None],
}


@pytest.mark.parametrize("name", ["_native_npu", "_fused_npu", "xformers", "_native_cudnn"])
def test_masks_mean_what_they_mean_to_sdpa(patched, name):
    query, key, value = (draw(2, 6, 4, 16, seed=seed) for seed in range(3))
    for mask in MASKS.values():
        out = DISPATCH.dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=name if name == "_fused_npu" else NAMES(name)
        )
        four = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
        is_bool = mask is not None and mask.dtype is torch.bool
        exact = oracle(
            query, key, value, keep=four if is_bool else None, bias=None if is_bool else four
        )
        oracles.assert_close(out, exact, extra=oracles.slack(mask))


def test_native_npu_keeps_every_argument(patched):
    query, key, value = draw(1, 6, 4, 16), draw(1, 6, 2, 16), draw(1, 6, 2, 16, seed=2)
    for enable_gqa in (False, True):
        out = call("_native_npu", query, key, value, is_causal=True, enable_gqa=enable_gqa)
        oracles.assert_close(out, oracle(query, key, value, keep=oracles.top_left(6, 6)))
    integers = torch.tensor([[1, 1, 0, 1, 1, 0]])[:, None, None]
    out = call("_native_npu", query, key, value, attn_mask=integers)
    oracles.assert_close(out, oracle(query, key, value, keep=integers.bool()))
    torch.manual_seed(0)
    dropped = call("_native_npu", query, query, query, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, call("native", query, query, query, dropout_p=0.5))


def test_xformers_with_both_a_mask_and_a_causal_flag(patched):
    """The original forgets the mask."""
    query = draw(2, 6, 4, 16)
    out = call("xformers", query, query, query, attn_mask=MASKS["bool"], is_causal=True)
    keep = MASKS["bool"] & oracles.top_left(6, 6)
    oracles.assert_close(out, oracle(query, query, query, keep=keep))


@torch.no_grad()
def run(model):
    return model(**flux_inputs(model), return_dict=False)[0]


class Registry:
    """The active backend as a test found it."""

    def __enter__(self):
        self.held = DISPATCH._AttentionBackendRegistry
        self.before = self.held._active_backend
        return self.held

    def __exit__(self, *_):
        self.held.set_active_backend(self.before)


@pytest.mark.parametrize("name", ["flash", "xformers", "sage_hub"])
def test_set_attention_backend_on_a_model(name):
    model = tiny_flux_transformer()
    expected = run(model)
    with Registry():
        with pytest.raises(RuntimeError, match=name):
            model.set_attention_backend(name)
        migration = mindiesd.patch_all()
        model.set_attention_backend(name)
        out = run(model)
        assert redirected(migration) == 2
        assert redirected(migration, "diffusers_backend_requirements") == 1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    mindiesd.unpatch_all()
    model.reset_attention_backend()
    assert torch.equal(run(model), expected)


def test_attention_backend_context_manager():
    model = tiny_flux_transformer()
    expected = run(model)
    migration = mindiesd.patch_all(only=RECORDS)
    with DISPATCH.attention_backend("flash"):
        assert torch.equal(run(model), expected)
    assert redirected(migration) == 2
    assert DISPATCH._AttentionBackendRegistry._active_backend is NAMES.NATIVE
    mindiesd.unpatch_all()
    with pytest.raises(RuntimeError, match="flash-attn"), DISPATCH.attention_backend("flash"):
        pass


def test_environment_variable():
    run_python(
        """
        import mindiesd
        migration = mindiesd.patch_all()
        import torch
        from diffusers.models import attention_dispatch as dispatch
        from tests.tiny import flux_inputs, tiny_flux_transformer
        model = tiny_flux_transformer()
        with torch.no_grad():
            named = model(**flux_inputs(model)).sample
            with dispatch.attention_backend("native"):
                native = model(**flux_inputs(model)).sample
        assert torch.equal(named, native)
        import transformers.modeling_utils as transformers
        # In a list: names of this module would be rebound with the rest.
        found = [transformers.ALL_ATTENTION_FUNCTIONS["sdpa"]]
        from transformers.integrations import sdpa_attention
        assert found[0] is sdpa_attention.sdpa_attention_forward
        report = {p.name: p for p in migration.report().patches}
        assert report["diffusers_dispatch"].redirected == 2
        for patch in report.values():
            if patch.family == "attention_backend":
                assert patch.status == "applied", patch
        mindiesd.unpatch_all()
        assert transformers.ALL_ATTENTION_FUNCTIONS["sdpa"] is not found[0]
        """,
        DIFFUSERS_ATTN_BACKEND="flash",
        DIFFUSERS_ATTN_CHECKS="1",
    )


def test_undo_leaves_every_object_as_it_was():
    from diffusers import ModelMixin
    from diffusers.models import attention, attention_processor
    from transformers import modeling_utils

    def held():
        registry = DISPATCH._AttentionBackendRegistry
        return [
            DISPATCH.dispatch_attention_fn,
            import_module("diffusers.models.transformers.transformer_flux").dispatch_attention_fn,
            DISPATCH._check_attention_backend_requirements,
            DISPATCH._maybe_download_kernel_for_backend,
            vars(ModelMixin)["set_attention_backend"],
            *registry._backends.values(),
            *map(frozenset, registry._supported_arg_names.values()),
            vars(attention_processor.AttnProcessorNPU)["__call__"],
            vars(attention_processor.XFormersAttnProcessor)["__call__"],
            vars(attention_processor.SlicedAttnProcessor)["__call__"],
            vars(attention_processor.Attention)["set_use_memory_efficient_attention_xformers"],
            vars(attention.AttentionModuleMixin)["set_use_memory_efficient_attention_xformers"],
            modeling_utils.sdpa_attention_forward,
            modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"],
        ]

    before = held()
    migration = mindiesd.patch_all(only=RECORDS, strict=True)
    assert all(patch.status == "applied" for patch in migration.report().patches)
    assert sum(old is not new for old, new in zip(before, held(), strict=True)) >= 11
    assert modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is not before[-1]
    mindiesd.unpatch_all()
    for old, new in zip(before, held(), strict=True):
        assert old is new or (isinstance(old, frozenset) and old == new)


def test_attention_function_that_somebody_else_registered_stays_theirs():
    from transformers import modeling_utils

    interface = modeling_utils.ALL_ATTENTION_FUNCTIONS
    original = interface["sdpa"]

    def theirs(*args, **kwargs):
        raise AssertionError

    migration = mindiesd.patch_all(only="transformers_sdpa")
    interface.register("sdpa", theirs)
    try:
        mindiesd.unpatch_all()
        assert interface["sdpa"] is theirs
        assert any("_global_mapping['sdpa']" in note for note in migration.report().notes)
    finally:
        interface.register("sdpa", original)


def test_in_scope_of_one_model_only():
    """The other model keeps the original's behaviour, also when a backend is named meanwhile."""
    model, other = tiny_flux_transformer(), tiny_flux_transformer()
    expected = run(model)
    with Registry() as registry, mindiesd.patch_pipeline(model) as migration:
        model.set_attention_backend("flash")
        assert registry._active_backend is NAMES.NATIVE
        assert torch.allclose(run(model), expected, atol=1e-5)
        assert redirected(migration) == 2
        with pytest.raises(RuntimeError, match="flash-attn"):
            other.set_attention_backend("flash")
        assert torch.equal(run(other), expected)
        for attention in other.modules():
            if hasattr(attention, "processor"):
                attention.processor._attention_backend = NAMES.FLASH
        with pytest.raises(TypeError, match="NoneType"):
            run(other)
        assert redirected(migration) == 2
    with pytest.raises(TypeError, match="NoneType"):
        run(model)


@pytest.mark.parametrize(("backend", "name"), [("eager", "flash"), ("aot_eager", "_native_npu")])
def test_compiled_in_one_graph(patched, backend, name):
    model = tiny_flux_transformer()
    expected = run(model)
    with Registry() as registry, torch.no_grad():
        registry.set_active_backend(NAMES(name))
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        out = compiled(**flux_inputs(model), return_dict=False)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    redirected, traced, _ = patched.ledger["diffusers_dispatch"].snapshot()
    assert (redirected, traced) == (0, 2)


@pytest.mark.parametrize("mask", [None, MASKS["bool"], MASKS["additive"]])
def test_compiled_with_masks_and_windows(patched, mask):
    query, key, value = (draw(2, 6, 4, 16, seed=seed) for seed in range(3))
    cases = {"_native_npu": {"is_causal": mask is None}}
    if mask is None or mask.dtype is torch.bool:
        window = {"window_size": (2, 1)}
        cases["flash_varlen"] = {"is_causal": True, "attention_kwargs": window}
    for name, kwargs in cases.items():

        def attend(query, key, value, name=name, kwargs=kwargs):
            return call(name, query, key, value, attn_mask=mask, **kwargs)

        torch.compiler.reset()
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))


def test_only_one_of_the_records(patched):
    mindiesd.unpatch_all()
    migration = mindiesd.patch_all(only="diffusers_dispatch", strict=True)
    assert [patch.name for patch in migration.report().patches] == ["diffusers_dispatch"]
    query = draw(1, 4, 2, 16)
    oracles.assert_close(call("flash", query, query, query), oracle(query, query, query))
    with pytest.raises(RuntimeError, match="flash-attn"):
        tiny_flux_transformer().set_attention_backend("flash")


def test_training_with_a_named_backend():
    """Gradients are SDPA's: flash-attention has a backward, so has this."""
    tensors = [draw(1, 5, 2, 8, seed=seed).requires_grad_() for seed in range(3)]
    (expected,) = torch.autograd.grad(call("native", *tensors).square().sum(), tensors[:1])
    mindiesd.patch_all()
    (got,) = torch.autograd.grad(call("flash", *tensors).square().sum(), tensors[:1])
    torch.testing.assert_close(got, expected)
