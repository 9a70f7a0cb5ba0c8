"""The redirected SDPA behaves as the original everywhere somebody could look."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import mindiesd
from mindiesd.patches import law
from tests.processes import run_python


def ORIGINAL(*args, **kwargs):
    # Looked up each time: a module-level name bound to the builtin would itself be rebound.
    return torch._C._nn.scaled_dot_product_attention(*args, **kwargs)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def migration() -> mindiesd.Migration:
    return mindiesd.patch_all(only="sdpa")


def counts(migration: mindiesd.Migration) -> tuple[int, dict[str, int]]:
    redirected, _, fell_back = migration.ledger["sdpa"].snapshot()
    return redirected, fell_back


def outcome(function, *args, **kwargs):
    """What a caller sees: the result, or the type and text of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return type(error), str(error)


def assert_same_outcome(ours, theirs) -> None:
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.device == theirs.device
    assert ours.shape == theirs.shape
    assert ours.requires_grad == theirs.requires_grad
    assert torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))
    assert torch.equal(ours.isnan(), theirs.isnan())


SDPA_INFO = next(
    info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention"
)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_pytorch_own_samples(migration, dtype: torch.dtype, requires_grad: bool) -> None:
    samples = list(SDPA_INFO.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(samples) > 20
    for sample in samples:
        kwargs = dict(sample.kwargs)
        torch.manual_seed(0)
        theirs = outcome(ORIGINAL, sample.input, *sample.args, **kwargs)
        torch.manual_seed(0)
        ours = outcome(F.scaled_dot_product_attention, sample.input, *sample.args, **kwargs)
        assert_same_outcome(ours, theirs)
    redirected, fell_back = counts(migration)
    if requires_grad or dtype is torch.float64:
        assert redirected == 0 and fell_back
    else:
        assert redirected > 0
    assert redirected + sum(fell_back.values()) == len(samples)


def test_pytorch_own_error_inputs(migration) -> None:
    """Every way of calling it wrongly fails exactly as before."""
    q = torch.randn(2, 4, 3, 8)
    wrong = [
        ((q, q), {}),
        ((None, q, q), {}),
        (([1.0], q, q), {}),
        ((q, q, q[..., :4].double()), {}),
        ((q, q[:, :, :, :4], q), {}),
        ((q, q[:, :2], q[:, :2]), {}),
        ((q, q[:, :3], q[:, :3]), {"enable_gqa": True}),
        ((q, q.half(), q), {}),
        ((q.int(), q.int(), q.int()), {}),
        ((q, q, q), {"attn_mask": torch.ones(3, 3, dtype=torch.int32)}),
        ((q, q, q), {"attn_mask": torch.zeros(3, 3, dtype=torch.float64)}),
        ((q, q, q), {"attn_mask": torch.zeros(5, 3)}),
        ((q, q, q), {"attn_mask": torch.zeros(3)}),
        ((q, q, q), {"attn_mask": torch.zeros(3, 3), "is_causal": True}),
        ((q, q, q), {"attn_mask": [[0.0]]}),
        ((q, q, q), {"dropout_p": 1.5}),
        ((q, q, q), {"dropout_p": "a"}),
        ((q, q, q), {"scale": "a"}),
        ((q, q, q), {"is_causal": 1}),
        ((q, q, q), {"mask": None}),
        ((q.to("meta"), q, q), {}),
        ((q[0, 0, 0], q[0, 0, 0], q[0, 0, 0]), {}),
        ((q[:1], q, q), {}),
    ]
    for args, kwargs in wrong:
        theirs = outcome(ORIGINAL, *args, **kwargs)
        ours = outcome(F.scaled_dot_product_attention, *args, **kwargs)
        if isinstance(theirs, tuple) and theirs[0] is TypeError:
            # The argument parser's text depends on how many arguments were spelled out.
            assert isinstance(ours, tuple) and ours[0] is TypeError
        else:
            assert_same_outcome(ours, theirs)


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(st.sampled_from(DTYPES))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dim, value_dim = draw(st.sampled_from([1, 4, 8, 10])), draw(st.sampled_from([4, 8]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(n: int, s: int, d: int) -> torch.Tensor:
        if draw(st.booleans()):  # the transposed view of [B, S, N, D] memory
            return torch.randn(batch, s, n, d, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, n, s, d, generator=generator).to(dtype)

    q, k, v = (
        tensor(heads, queries, dim),
        tensor(kv_heads, keys, dim),
        tensor(kv_heads, keys, value_dim),
    )
    kwargs = {"enable_gqa": kv_heads != heads}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "inf", "finfo"]))
    if kind == "causal":
        kwargs["is_causal"] = True
    elif kind != "none":
        sizes = (batch, heads, queries, keys)
        shape = [draw(st.sampled_from([1, size])) for size in sizes][draw(st.integers(0, 2)) :]
        kept = torch.rand(shape, generator=generator) > 0.4
        if kind == "bool":
            kwargs["attn_mask"] = kept
        else:
            value = {"float": -1e4, "inf": -torch.inf, "finfo": torch.finfo(dtype).min}[kind]
            bias = torch.randn(shape, generator=generator).masked_fill(~kept, value)
            kwargs["attn_mask"] = bias.to(draw(st.sampled_from([dtype, torch.float32])))
    if draw(st.booleans()):
        kwargs["scale"] = draw(st.sampled_from([0.0, 0.3, 1.0, -0.5]))
    return q, k, v, kwargs


@settings(max_examples=200, deadline=None)
@given(call=calls())
def test_any_call_gives_the_original_bits(call) -> None:
    q, k, v, kwargs = call
    migration = mindiesd.patch_all(only="sdpa")
    before, fell_back = counts(migration)
    assert_same_outcome(
        outcome(F.scaled_dot_product_attention, q, k, v, **kwargs),
        outcome(ORIGINAL, q, k, v, **kwargs),
    )
    after, fell_back_after = counts(migration)
    assert after == before + 1, (fell_back, fell_back_after)


def test_gradients_and_dropout_go_to_the_original(migration) -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert q.grad is not None
    F.scaled_dot_product_attention(q.detach(), q.detach(), q.detach(), dropout_p=0.5)
    mask = torch.zeros(3, 3, requires_grad=True)
    F.scaled_dot_product_attention(q.detach(), q.detach(), q.detach(), mask).sum().backward()
    assert mask.grad is not None
    assert counts(migration) == (0, {law.GRADIENTS: 2, law.DROPOUT: 1})
    with torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    with torch.inference_mode():
        F.scaled_dot_product_attention(q, q, q)
    assert counts(migration)[0] == 2


def test_looks_like_the_original(migration) -> None:
    function = F.scaled_dot_product_attention
    assert inspect.isfunction(function)
    assert function.__name__ == function.__qualname__ == "scaled_dot_product_attention"
    assert function.__module__ == "torch.nn.functional"
    assert function.__doc__ == torch._C._nn.scaled_dot_product_attention.__doc__
    documented = [
        ("query", inspect.Parameter.empty),
        ("key", inspect.Parameter.empty),
        ("value", inspect.Parameter.empty),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    signature = inspect.signature(function)
    assert [(p.name, p.default) for p in signature.parameters.values()] == documented
    line = function.__doc__.split("->")[0].replace("\n", " ")
    assert [p.name for p in signature.parameters.values()] == [
        part.split("=")[0].strip() for part in line.partition("(")[2].rstrip(" )").split(",")
    ]
    assert copy.deepcopy(function) is function


def test_pickles_by_the_place_that_was_patched(migration) -> None:
    data = pickle.dumps(F.scaled_dot_product_attention)
    assert pickle.loads(data) is F.scaled_dot_product_attention
    mindiesd.unpatch_all()
    assert pickle.loads(data) is torch._C._nn.scaled_dot_product_attention


def test_modes_and_subclasses_see_the_public_function(migration) -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append((len(args), sorted(kwargs)))
            return func(*args, **(kwargs or {}))

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append("subclass")
            return super().__torch_function__(func, types, args, kwargs or {})

    q = torch.randn(1, 2, 3, 8)
    with Mode():
        result = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(result, ORIGINAL(q, q, q))
    assert seen == [(3, ["attn_mask", "dropout_p", "enable_gqa", "is_causal", "scale"])]
    sub = q.as_subclass(Sub)
    assert type(F.scaled_dot_product_attention(sub, sub, sub)) is Sub
    assert seen[-1] == "subclass"
    with torch.device("cpu"):  # a mode that is always on once a default device is set
        F.scaled_dot_product_attention(q, q, q)
    assert counts(migration)[0] == 3


def test_diffusers_layer_skip_still_works(migration) -> None:
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    q, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    with AttentionScoreSkipFunctionMode():
        assert F.scaled_dot_product_attention(q, q, v) is v
        assert F.scaled_dot_product_attention(query=q, key=q, value=v) is v


def test_causal_bias_and_nested_tensors(migration) -> None:
    """Two classes of PyTorch that compare the function: one with the public name, one with C's."""
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    for bias, offset in ((causal_upper_left(3, 5), 0), (causal_lower_right(3, 5), 2)):
        ours = F.scaled_dot_product_attention(q, k, k, bias)
        keep = torch.ones(3, 5, dtype=torch.bool).tril(offset)
        torch.testing.assert_close(ours, ORIGINAL(q, k, k, keep))
    parts = [torch.randn(n, 2, 8) for n in (2, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    ours = F.scaled_dot_product_attention(nested, nested, nested)
    for result, part in zip(ours.transpose(1, 2).unbind(), parts, strict=True):
        part = part.transpose(0, 1)[None]
        torch.testing.assert_close(result.transpose(0, 1)[None], ORIGINAL(part, part, part))
    strided = torch.nested.nested_tensor([p.transpose(0, 1) for p in parts])
    assert_same_outcome(
        F.scaled_dot_product_attention(strided, strided, strided).to_padded_tensor(0.0),
        ORIGINAL(strided, strided, strided).to_padded_tensor(0.0),
    )


def test_autocast_meta_fake_and_functorch(migration) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q = torch.randn(2, 2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = F.scaled_dot_product_attention(q, q, q), ORIGINAL(q, q, q)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outcome(F.scaled_dot_product_attention, q, q.bfloat16(), q)
        assert_same_outcome(mixed, outcome(ORIGINAL, q, q.bfloat16(), q))
    meta = q.to("meta")
    assert F.scaled_dot_product_attention(meta, meta, meta).shape == q.shape
    with FakeTensorMode():
        fake = torch.empty(2, 2, 3, 8)
        assert F.scaled_dot_product_attention(fake, fake, fake).shape == q.shape
    stacked = torch.randn(4, 2, 2, 3, 8)
    torch.testing.assert_close(
        torch.vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(stacked),
        torch.vmap(lambda x: ORIGINAL(x, x, x))(stacked),
    )
    gradient = torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum())(q)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: ORIGINAL(x, x, x).sum())(q))


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_jit_script_jit_trace_and_fx(migration) -> None:
    q = torch.randn(1, 2, 3, 8)
    expected = ORIGINAL(q, q, q, is_causal=True)
    scripted = torch.jit.script(Attention())
    assert "scaled_dot_product_attention" in str(scripted.graph)
    assert torch.equal(scripted(q), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(Attention(), q)
    assert torch.equal(traced(q), expected)
    longer = torch.randn(2, 2, 7, 8)
    assert torch.equal(traced(longer), ORIGINAL(longer, longer, longer, is_causal=True))
    graph = torch.fx.symbolic_trace(Attention())
    assert torch.equal(graph(q), expected)


@pytest.mark.slow
def test_multihead_attention_and_transformers_reach_it() -> None:
    run_python(
        """
        import torch, mindiesd
        from transformers import CLIPTextConfig, CLIPTextModel
        migration = mindiesd.patch_all(only="sdpa")
        mha = torch.nn.MultiheadAttention(8, 2).eval()
        x = torch.randn(3, 1, 8)
        with torch.no_grad():
            mha(x, x, x, attn_mask=torch.zeros(3, 3), need_weights=False)
            first = migration.report().redirected
            config = CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=16,
                                    num_hidden_layers=2, num_attention_heads=2)
            CLIPTextModel(config)(torch.zeros(1, 5, dtype=torch.long))
        assert migration.report().redirected == first + 2
        """
    )


def test_attribute_of_a_class_defined_while_patched(migration) -> None:
    """A builtin in a class body does not bind; the function that stands in for it does."""

    class Attention:
        attend = F.scaled_dot_product_attention

        def __init__(self) -> None:
            self.q, self.k, self.v = torch.randn(3, 1, 2, 3, 8).unbind()

        def calls(self) -> list[torch.Tensor]:
            q, k, v, mask = self.q, self.k, self.v, torch.randn(3, 3)
            return [
                (self.attend(q, k, v), ORIGINAL(q, k, v)),
                (self.attend(q, k, v, mask), ORIGINAL(q, k, v, mask)),
                (self.attend(q, k, v, None, 0.0, True), ORIGINAL(q, k, v, is_causal=True)),
                (self.attend(q, k, v, None, 0.0), ORIGINAL(q, k, v)),
                (self.attend(q, k, v, is_causal=True), ORIGINAL(q, k, v, is_causal=True)),
                (self.attend(q, k, v, mask, scale=0.3), ORIGINAL(q, k, v, mask, scale=0.3)),
                (self.attend(q, k, v, dropout_p=0.0, scale=2.0), ORIGINAL(q, k, v, scale=2.0)),
                (Attention.attend(q, k, v, mask), ORIGINAL(q, k, v, mask)),
            ]

    for ours, theirs in Attention().calls():
        assert torch.equal(ours, theirs)
    assert counts(migration)[0] == 8
    mindiesd.unpatch_all()
    for ours, theirs in Attention().calls():
        assert torch.equal(ours, theirs)
