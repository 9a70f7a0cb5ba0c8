"""RMS norms of diffusers and transformers: dtypes of the originals, float64, staleness, compile."""

from __future__ import annotations

import copy
import importlib
import inspect
import linecache
import pickle
import pkgutil
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import mindiesd
from mindiesd.patches import law, registry, rms_classes, source
from tests.patches.norm_cases import CENTRED, DTYPES, changes, make, oracle, unpatched
from tests.patches.test_sdpa import assert_same_outcome, outcome

RECORDS = {record.name: record for record in rms_classes.RECORDS}
NAMES = sorted(RECORDS)
ONE_OF_EACH_FORM = (
    "llama_LlamaRMSNorm",
    "t5_T5LayerNorm",
    "gpt_oss_GptOssRMSNorm",
    "gemma2_Gemma2RMSNorm",
    "gemma4_Gemma4RMSNorm",
    "diffusers_MochiRMSNorm",
    "kolors_RMSNorm",
    "diffusers_Cosmos3NemotronRMSNorm",
    "diffusers_Krea2RMSNorm",
    "diffusers_QwenImage21ZeroCenterRMSNorm",
    "diffusers_StableAudio3RMSNorm",
)


def counts(migration: mindiesd.Migration, name: str) -> tuple[int, dict[str, int]]:
    redirected, _, fell_back = migration.ledger[name].snapshot()
    return redirected, fell_back


def assert_accurate(ours, theirs, exact) -> None:
    """Not further from float64 than the original, but for one unit of float32 rounding."""
    slack = 4e-7 * exact.abs().max()
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max() + slack


def test_every_class_in_every_dtype() -> None:
    """The original's shape and dtype for all nine pairs of dtypes, and never less accurate."""
    torch.manual_seed(0)
    modules = {name: make(RECORDS[name], 48, torch.float32) for name in NAMES}
    migration = mindiesd.patch_all(only="rms_norm")
    reasons = {patch.name: patch.reason for patch in migration.report().patches}
    for name, module in modules.items():
        assert not reasons[name], name
        for weight_dtype in DTYPES:
            module.to(weight_dtype)
            for x_dtype in DTYPES:
                x = (3 * torch.randn(2, 5, 48)).to(x_dtype)
                with torch.no_grad():
                    ours, theirs = module(x), unpatched(module)(module, x)
                case = (name, x_dtype, weight_dtype)
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), case
                assert_accurate(ours, theirs, oracle(module, x))
        assert counts(migration, name) == (9, {}), name


def test_every_form_is_used_and_every_record_is_unique() -> None:
    digests = set()
    for record in RECORDS.values():
        module = make(record, 8, torch.float32)
        digests.add(source.read(unpatched(module), record.module, record.attribute).digest)
    assert digests == set(rms_classes.FORMS)
    assert len(RECORDS) == len(rms_classes.CLASSES)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(ONE_OF_EACH_FORM),
    x_dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dim=st.sampled_from([1, 2, 33, 128]),
    magnitude=st.sampled_from([1e-4, 1.0, 200.0]),
    strided=st.sampled_from(["dense", "moved", "sliced"]),
    seed=st.integers(0, 2**31),
)
def test_shapes_and_strides(name, x_dtype, weight_dtype, shape, dim, magnitude, strided, seed):
    torch.manual_seed(seed)
    migration = mindiesd.patch_all(only="rms_norm")
    module = make(RECORDS[name], dim, weight_dtype)
    x = (magnitude * torch.randn(*shape, dim)).to(x_dtype)
    if strided == "moved":
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    elif strided == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    before, _ = counts(migration, name)
    with torch.no_grad():
        ours, theirs = module(x), unpatched(module)(module, x)
    assert counts(migration, name) == (before + 1, {})
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if x.numel():
        assert_accurate(ours, theirs, oracle(module, x))


@pytest.mark.parametrize("name", [n for n in NAMES if RECORDS[n].attribute[:-8] in CENTRED])
def test_a_changed_weight_is_never_overlooked(name: str) -> None:
    torch.manual_seed(0)
    migration = mindiesd.patch_all(only=name)
    module = make(RECORDS[name], 16, torch.float32)
    x = torch.randn(3, 16)
    for number, change in enumerate(changes(module)):
        with torch.no_grad():
            module(x)
        change()
        with torch.no_grad():
            ours = module(x)
        exact = oracle(module, x)
        tolerance = 1e-5 * exact.abs().max()
        assert (ours - exact).abs().max() <= tolerance, (number, change.__name__)
    assert counts(migration, name)[1] == {}


@pytest.mark.parametrize("name", ONE_OF_EACH_FORM)
def test_calls_that_stay_with_the_original(name: str) -> None:
    module = make(RECORDS[name], 8, torch.float32)
    original = unpatched(module)
    migration = mindiesd.patch_all(only=name)
    x = torch.randn(2, 8)
    leaf = x.clone().requires_grad_()
    calls = [(leaf, law.GRADIENTS), (x.double(), law.DTYPE), ([1.0], law.NOT_A_TENSOR)]
    for value, reason in calls:
        assert_same_outcome(outcome(module, value), outcome(original, module, value))
        assert counts(migration, name)[1].get(reason), reason
    with torch.no_grad():
        for value, reason in ((torch.randn(2, 5), law.WEIGHT_SHAPE), (x[0, 0], law.WEIGHT_SHAPE)):
            assert_same_outcome(outcome(module, value), outcome(original, module, value))
            assert counts(migration, name)[1].get(reason), reason
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_outcome(module(x), original(module, x))
        assert counts(migration, name)[1][law.AUTOCAST] == 1
        module.double()
        assert_same_outcome(outcome(module, x), outcome(original, module, x))
        assert counts(migration, name)[1][law.MIXED_DTYPES] == 1
    assert counts(migration, name)[0] == 0


def test_norms_without_a_weight() -> None:
    from diffusers.models.normalization import MochiRMSNorm
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    mochi = MochiRMSNorm(0, 1e-6, elementwise_affine=False)
    gemma = Gemma4RMSNorm(8, with_scale=False)
    migration = mindiesd.patch_all(only="rms_norm")
    for module in (mochi, gemma):
        for dtype in DTYPES:
            x = (3 * torch.randn(2, 8)).to(dtype)
            ours, theirs = module(x), unpatched(module)(module, x)
            assert ours.dtype is dtype
            assert_accurate(ours, theirs, oracle(module, x))
    assert counts(migration, "diffusers_MochiRMSNorm") == (3, {})
    assert counts(migration, "gemma4_Gemma4RMSNorm") == (3, {})


def test_a_subclass_that_overrides_a_part_keeps_its_own() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    class Doubled(Gemma2RMSNorm):
        def _norm(self, x):
            return 2 * super()._norm(x)

    class Same(Gemma2RMSNorm):
        pass

    migration = mindiesd.patch_all(only="gemma2_Gemma2RMSNorm")
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.allclose(Doubled(8)(x), 2 * Same(8)(x))
    assert counts(migration, "gemma2_Gemma2RMSNorm") == (1, {law.OVERRIDDEN: 1})


def other_forward(self, hidden_states):
    """A norm of the same signature that computes something else."""
    return self.weight * hidden_states


def test_a_file_that_was_changed_since_it_was_loaded(tmp_path, monkeypatch) -> None:
    """With the same names and constants: what is loaded divides, what is in the file multiplies."""
    text = "class Norm:\n    def forward(self, x):\n        return x / self.part(x)\n\n"
    text += "    def part(self, x):\n        return x - 1.0\n"
    path = tmp_path / "written_norm.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    path.write_text(text)
    module = importlib.import_module("written_norm")
    known = source.read(module.Norm.forward, "written_norm", "Norm.forward")
    assert [name for name, _ in known.parts] == ["part"]
    for old, new in (("x / self", "x * self"), ("x - 1.0", "1.0 - x"), ("class", "\nclass")):
        path.write_text(text.replace(old, new))
        linecache.checkcache(str(path))
        with pytest.raises(source.Unrecognised, match="its source cannot be read"):
            source.read(module.Norm.forward, "written_norm", "Norm.forward")
    path.write_text(text)
    linecache.checkcache(str(path))
    assert source.read(module.Norm.forward, "written_norm", "Norm.forward").digest == known.digest
    monkeypatch.delitem(sys.modules, "written_norm")


def test_a_changed_source_is_skipped_with_its_reason(monkeypatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", other_forward)
    migration = mindiesd.patch_all(only="rms_norm")
    (found,) = [p for p in migration.report().patches if p.name == "llama_LlamaRMSNorm"]
    assert found.status == "skipped" and "none of the known forms" in found.reason
    assert modeling_llama.LlamaRMSNorm.forward is other_forward
    with pytest.raises(mindiesd.PatchError, match=r"llama_LlamaRMSNorm: its source is none"):
        mindiesd.patch_all(only="llama_LlamaRMSNorm")
    exec_only: dict = {}
    exec("def forward(self, hidden_states):\n    return hidden_states", exec_only)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", exec_only["forward"])
    with pytest.raises(mindiesd.PatchError, match="its source cannot be read"):
        mindiesd.patch_all(only="llama_LlamaRMSNorm")


def test_digests_see_code_and_nothing_else() -> None:
    class Plain:
        def forward(self, x):
            return self.part(x) + 1

        def part(self, x):
            return x * 2

    class Dressed:
        @torch.no_grad  # not called through: its source is this
        def unrelated(self): ...

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Says something."""
            # So does this.
            return (
                self.part(x)
                + 1
            )  # fmt: skip

        def part(
            self,
            x,
        ):
            return x * 2

    class OtherPart(Plain):
        def forward(self, x):
            return self.part(x) + 1

        def part(self, x):
            return x * 3

    found = []
    for owner in (Plain, Dressed, OtherPart):
        module = sys.modules[__name__]
        vars(module)["_owner"] = owner
        found.append(source.read(owner.forward, __name__, "_owner.forward"))
    assert found[0].digest == found[1].digest != found[2].digest
    assert [name for name, _ in found[0].parts] == ["part"]


@pytest.mark.parametrize("name", ONE_OF_EACH_FORM)
def test_looks_like_the_original_and_is_undone(name: str) -> None:
    module = make(RECORDS[name], 8, torch.float32)
    owner, original = type(module), unpatched(module)
    mindiesd.patch_all(only=name)
    function = owner.forward
    assert function is not original and inspect.isfunction(function)
    assert inspect.signature(function) == inspect.signature(original)
    own = inspect.signature(function, follow_wrapped=False)
    assert list(own.parameters) == list(inspect.signature(original).parameters)
    data = pickle.dumps(function)
    mindiesd.unpatch_all()
    assert pickle.loads(data) is original is owner.forward


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph(backend: str) -> None:
    torch.compiler.reset()
    modules = {name: make(RECORDS[name], 8, torch.bfloat16) for name in ONE_OF_EACH_FORM}
    x = torch.randn(2, 3, 8)
    migration = mindiesd.patch_all(only="rms_norm")
    for name, module in modules.items():
        with torch.no_grad():
            expected = module(x)
            found = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        assert migration.ledger[name].snapshot()[1] == 1
    torch.compiler.reset()


def text_models():
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "pad_token_id": 0,
    }
    head = {"head_dim": 8}
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5["feed_forward_proj"] = "gated-gelu"
    return {
        "t5": (transformers.T5EncoderModel, transformers.T5Config(**t5), 5),
        "qwen3": (transformers.Qwen3Model, transformers.Qwen3Config(**small, **head), 9),
        "phi3": (transformers.Phi3Model, transformers.Phi3Config(**small), 5),
        "gemma2": (transformers.Gemma2Model, transformers.Gemma2Config(**small, **head), 9),
        "gemma3": (
            transformers.Gemma3TextModel,
            transformers.Gemma3TextConfig(**small, **head),
            13,
        ),
        "glm": (transformers.GlmModel, transformers.GlmConfig(**small, **head), 5),
    }


@pytest.mark.parametrize("name", sorted(text_models()))
def test_text_encoders(name: str) -> None:
    """Whole encoders against the same weights in float64: every norm redirected, none worse."""
    build, config, norms = text_models()[name]
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.arange(1, 21)[None] % 99

    @torch.no_grad()
    def run(one: torch.nn.Module) -> torch.Tensor:
        return one(input_ids=ids).last_hidden_state

    models, plain, exact = {}, {}, {}
    for dtype in DTYPES:
        models[dtype] = copy.deepcopy(model).to(dtype)
        plain[dtype] = run(models[dtype])
        exact[dtype] = run(copy.deepcopy(models[dtype]).double())
    migration = mindiesd.patch_all(only=["rms_norm", "activation"])
    for number, dtype in enumerate(DTYPES, 1):
        patched = run(models[dtype])
        assert patched.dtype == plain[dtype].dtype
        found = [p.redirected for p in migration.report().patches if p.family == "rms_norm"]
        assert sum(found) == number * norms

        def error(result: torch.Tensor, dtype=dtype) -> float:
            return (result.double() - exact[dtype]).square().mean().sqrt().item()

        slack = 1e-6 * exact[dtype].abs().max().item()
        assert error(patched) <= 1.1 * error(plain[dtype]) + slack, dtype


def test_left_alone_says_why() -> None:
    found = registry.left()
    families = {"rms_norm", "activation", "ada_norm", "composed_attention"}
    assert families <= set(found)
    everything = [one for targets in found.values() for one in targets]
    targets = [one.target for one in everything]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & {record.target for record in registry.records()}
    assert all(one.reason for one in everything)
    exact = ("sdpa", "rms_norm", "layer_norm", "channel_norm", "activation", "ada_norm", "rope")
    for one in (one for family in exact for one in found[family]):
        if one.target.endswith(".apply_multimodal_rotary_pos_emb"):
            continue  # before transformers 5
        assert pkgutil.resolve_name(one.target), one.target
