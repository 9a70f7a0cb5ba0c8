"""Activations and gated units against their originals and float64, and what stays untouched."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import activations
from diffusers.models.transformers import t5_film_transformer
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from diffusers.models.transformers.transformer_omnigen import OmniGenFeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db
from transformers import activations as text

import mindiesd
from mindiesd.patches import activation, law
from tests.patches.norm_cases import DTYPES, unpatched
from tests.patches.test_norms_classes import assert_accurate, counts
from tests.patches.test_sdpa import assert_same_outcome, outcome

BUILTIN = {"gelu": F.gelu}
# Class, record, and its formula in float64.
ELEMENTWISE = {
    text.NewGELUActivation: (
        "transformers_NewGELU",
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    t5_film_transformer.NewGELUActivation: (
        "t5_film_NewGELU",
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    text.FastGELUActivation: ("transformers_FastGELU", lambda x: F.gelu(x, approximate="tanh")),
    text.AccurateGELUActivation: (
        "transformers_AccurateGELU",
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    text.GELUActivation: ("transformers_GELU", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    text.QuickGELUActivation: ("transformers_QuickGELU", lambda x: x * torch.sigmoid(1.702 * x)),
}

# Made before anything is patched: they hold the builtin.
MADE = {kind: kind() for kind in ELEMENTWISE}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_pytorch_own_gelu_samples(dtype: torch.dtype, requires_grad: bool) -> None:
    (info,) = [info for info in op_db if info.name == "nn.functional.gelu"]
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    samples += [error.sample_input for error in info.error_inputs("cpu")]
    migration = mindiesd.patch_all(only="gelu")
    assert F.gelu is not BUILTIN["gelu"]
    for sample in samples:
        call = (sample.input, *sample.args)
        assert_same_outcome(
            outcome(F.gelu, *call, **sample.kwargs),
            outcome(BUILTIN["gelu"], *call, **sample.kwargs),
        )
    assert (counts(migration, "gelu")[0] > 0) == (dtype is not torch.float64 and not requires_grad)


def test_every_way_of_calling_gelu() -> None:
    migration = mindiesd.patch_all(only="gelu")
    x = torch.randn(3, 4)
    calls = [
        ((), {"input": x}),
        ((x,), {"approximate": "tanh"}),
        ((x, "tanh"), {}),
        ((x,), {"approximate": "fast"}),
        ((x,), {"approximate": None}),
        ((x, x, x), {}),
        (("x",), {}),
    ]
    for args, kwargs in calls:
        assert_same_outcome(
            outcome(F.gelu, *args, **kwargs), outcome(BUILTIN["gelu"], *args, **kwargs)
        )
    # What Python itself says of a wrong call differs in a word.
    for args, kwargs in [((), {}), ((x,), {"inplace": True})]:
        for function in (F.gelu, BUILTIN["gelu"]):
            with pytest.raises(TypeError):
                function(*args, **kwargs)
    assert counts(migration, "gelu")[0] == 2


def test_gelu_in_a_class_body_in_script_and_in_nested_tensors() -> None:
    before = torch.nn.GELU()
    mindiesd.patch_all(only="gelu")

    class Holder:
        act = F.gelu

        def forward(self, x):
            return self.act(x)

    x = torch.randn(3, 4)
    expected = BUILTIN["gelu"](x)
    assert torch.equal(Holder().forward(x), expected)
    assert torch.equal(before(x), expected)
    assert torch.equal(torch.jit.script(torch.nn.GELU())(x), expected)
    assert torch.equal(torch.jit.trace(before, x)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(before)(x), expected)
    assert torch.equal(torch.vmap(F.gelu)(x), expected)
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    assert torch.equal(F.gelu(nested).values(), torch.cat([expected, expected[:2]]))
    data = pickle.dumps(F.gelu)
    mindiesd.unpatch_all()
    assert F.gelu is BUILTIN["gelu"] is pickle.loads(data)
    assert not hasattr(torch.nn.GELU().forward, "__wrapped__")


def test_modes_see_the_public_gelu() -> None:
    from torch.overrides import TorchFunctionMode

    mindiesd.patch_all(only="gelu")
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.nn.GELU()(torch.randn(3))
    assert F.gelu in seen


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(ELEMENTWISE, key=lambda kind: kind.__name__)),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    sliced=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_elementwise(kind, dtype, shape, magnitude, sliced, seed) -> None:
    torch.manual_seed(seed)
    name, formula = ELEMENTWISE[kind]
    module = MADE[kind]
    migration = mindiesd.patch_all(only=[record for record, _ in ELEMENTWISE.values()])
    before, skipped = counts(migration, name)
    x = (magnitude * torch.randn(*shape, 8)).to(dtype)
    if sliced:
        x = x[..., ::2]
    ours, theirs = module(x), unpatched(module)(module, x)
    redirected, fell_back = counts(migration, name)
    if kind is text.QuickGELUActivation:
        assert redirected == 0
        assert fell_back == {activation.NO_KERNEL: skipped.get(activation.NO_KERNEL, 0) + 1}
    else:
        assert (redirected, fell_back) == (before + 1, {})
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if x.numel():
        assert_accurate(ours, theirs, formula(x.double()))


def test_gelu_of_transformers_with_another_function() -> None:
    python = text.GELUActivation(use_gelu_python=True)
    migration = mindiesd.patch_all(only="transformers_GELU")
    x = torch.randn(2, 8)
    assert torch.equal(python(x), unpatched(python)(python, x))
    assert counts(migration, "transformers_GELU") == (0, {activation.OTHER_ACTIVATION: 1})


def gated(kind: str, width: int = 8) -> tuple[torch.nn.Module, str]:
    from transformers import GlmConfig, Phi3Config
    from transformers.models.glm.modeling_glm import GlmMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    small = {"hidden_size": width, "intermediate_size": 12, "pad_token_id": 0}
    made = {
        "geglu": lambda: (activations.GEGLU(width, 12), "diffusers_GEGLU"),
        "approximate": lambda: (
            activations.ApproximateGELU(width, 12),
            "diffusers_ApproximateGELU",
        ),
        "flux2": lambda: (Flux2SwiGLU(), "diffusers_Flux2SwiGLU"),
        "omnigen": lambda: (OmniGenFeedForward(width, 12), "diffusers_OmniGenFeedForward"),
        "glm": lambda: (GlmMLP(GlmConfig(**small)), "glm_GlmMLP"),
        "phi3": lambda: (Phi3MLP(Phi3Config(**small)), "phi3_Phi3MLP"),
    }
    return made[kind]()


GATED = ("geglu", "approximate", "flux2", "omnigen", "glm", "phi3")


@pytest.mark.parametrize("kind", GATED)
def test_gated_units(kind: str) -> None:
    """On a device without the kernels, the same operators: the same bits."""
    module, name = gated(kind)
    module.eval()
    migration = mindiesd.patch_all(only=name)
    for dtype in DTYPES:
        module.to(dtype)
        for shape in ((8,), (2, 8), (2, 3, 8), (0, 8)):
            x = torch.randn(shape).to(dtype)
            with torch.no_grad():
                ours, theirs = module(x), unpatched(module)(module, x)
            assert_same_outcome(ours, theirs)
    redirected, fell_back = counts(migration, name)
    if kind == "approximate":
        assert (redirected, fell_back) == (0, {activation.NO_KERNEL: 12})
    else:
        assert (redirected, fell_back) == (12, {})


@pytest.mark.parametrize("kind", GATED)
def test_gated_units_that_stay_with_the_original(kind: str) -> None:
    module, name = gated(kind)
    migration = mindiesd.patch_all(only=name)
    x = torch.randn(2, 8, requires_grad=True)
    module(x).sum().backward()
    own = x.grad.clone()
    x.grad = None
    unpatched(module)(module, x).sum().backward()
    assert torch.equal(own, x.grad)
    double = module.double()(x.detach().double())
    assert double.dtype is torch.float64
    module.float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_outcome(module(x), unpatched(module)(module, x))
    reasons = counts(migration, name)[1]
    assert reasons == {law.GRADIENTS: 1, law.DTYPE: 1, law.AUTOCAST: 1}
    if kind in ("geglu", "approximate", "omnigen", "glm", "phi3"):
        # The input needs no gradient, but the weights do.
        module(x.detach())
        assert counts(migration, name)[1][law.GRADIENTS] == 2


@pytest.mark.parametrize("kind", ["flux2", "omnigen", "glm"])
def test_a_gate_that_is_watched_or_replaced_is_called(kind: str) -> None:
    module, name = gated(kind)
    attribute = "gate_fn" if kind == "flux2" else "activation_fn"
    calls = []
    getattr(module, attribute).register_forward_hook(lambda *given: calls.append(1))
    migration = mindiesd.patch_all(only=name)
    with torch.no_grad():
        module(torch.randn(2, 8))
        assert calls == [1]
        setattr(module, attribute, torch.nn.Tanh())
        x = torch.randn(2, 8)
        assert torch.equal(module(x), unpatched(module)(module, x))
    assert counts(migration, name) == (0, {activation.OTHER_ACTIVATION: 2})


def test_geglu_keeps_its_deprecated_argument_and_its_subclasses() -> None:
    class Other(activations.GEGLU):
        def gelu(self, gate):
            return F.relu(gate)

    module, other = activations.GEGLU(4, 4), Other(4, 4)
    migration = mindiesd.patch_all(only="diffusers_GEGLU")
    x = torch.randn(2, 4)
    with torch.no_grad():
        with pytest.warns(FutureWarning, match="scale"):
            module(x, 1.0)
        with pytest.warns(FutureWarning, match="scale"):
            module(x, scale=1.0)
        assert torch.equal(module(x, scale=None), module(x))
        assert torch.equal(other(x), unpatched(other)(other, x))
    assert counts(migration, "diffusers_GEGLU") == (
        2,
        {law.UNUSUAL_ARGUMENT: 2, law.OVERRIDDEN: 1},
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph(backend: str) -> None:
    torch.compiler.reset()
    modules = [(*gated(kind),) for kind in GATED] + [(text.NewGELUActivation(), "x")]
    mindiesd.patch_all(only="activation")
    x = torch.randn(2, 8)
    for module, _ in modules:
        with torch.no_grad():
            torch.testing.assert_close(
                torch.compile(module, backend=backend, fullgraph=True)(x), module(x)
            )
    torch.compiler.reset()


@pytest.mark.parametrize("kind", GATED)
def test_looks_like_the_original_and_is_undone(kind: str) -> None:
    module, name = gated(kind)
    owner, original = type(module), unpatched(module)
    mindiesd.patch_all(only=name)
    function = owner.forward
    assert function is not original
    assert inspect.signature(function) == inspect.signature(original)
    mindiesd.unpatch_all()
    assert owner.forward is original
