"""sparse=: real video models, their self-attention sparse and everything else as it was."""

import pytest
import torch

import mindiesd
from mindiesd import ParametersInvalid, SparseOptions
from mindiesd.ops.sparse import kernel
from mindiesd.patches.sparse import PLANS
from tests.emulator.tiny_models import MODELS

# Which model, how its inputs are made larger, the latent shape and the text of its self-attention,
# and how many self-attentions one forward makes.
CASES = {
    "wan": ({"hidden_states": (1, 4, 3, 20, 24)}, (3, 10, 12), 0, 2),
    "hunyuan_video": ({"hidden_states": (1, 4, 2, 10, 15)}, (2, 10, 15), 12, 2),
    "cogvideox": ({}, (2, 4, 4), 8, 2),
    "ltx": ({}, (2, 16, 16), 0, None),
}


def made(name):
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    for key, shape in CASES[name][0].items():
        inputs[key] = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return model, inputs


def run(model, inputs):
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture
def calls(monkeypatch):
    """What the real sparse attention is called with."""
    seen = []
    real = kernel.attend_sparsely

    def spy(*arguments, **options):
        seen.append((arguments, options))
        return real(*arguments, **options)

    monkeypatch.setattr(kernel, "attend_sparsely", spy)
    return seen


def patch_of(report, name):
    return next(patch for patch in report.patches if patch.name == name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["rf_v2", "ada_bsa"])
def test_nothing_dropped_is_the_same_picture(name, strategy, calls):
    """So small a share that every block is kept: text, order, masks and layouts are all right."""
    model, inputs = made(name)
    dense = run(model, inputs)
    migration = mindiesd.patch_all(
        sparse=SparseOptions(strategy=strategy, sparsity=1e-3, min_sequence=0)
    )
    out = run(model, inputs)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    _, latent, text, layers = CASES[name]
    layers = len(model.transformer_blocks) if layers is None else layers
    assert len(calls) == layers
    for (query, key, *_), options in calls:
        assert options["latent_q"] == options["latent_k"] == latent
        assert options["text_q"] == options["text_k"] == text
        assert options["text_last"] is (name == "hunyuan_video")
        assert query.shape[2] == key.shape[2] == latent[0] * latent[1] * latent[2] + text
    counted = patch_of(migration.report(), f"sparse_{name}")
    assert counted.redirected == layers
    assert "approximation" in counted.numerics


def test_dropping_changes_the_result_and_is_what_sparse_attention_gives(calls):
    model, inputs = made("wan")
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    out = run(model, inputs)
    assert not torch.allclose(out, dense, rtol=1e-3, atol=1e-3)
    (query, key, value, *_), _ = calls[0]
    direct = mindiesd.sparse_attention(
        query, key, value, sparse_type="rf_v2", sparsity=0.5, latent_shape_q=(3, 10, 12)
    )
    again = kernel.attend_sparsely(*calls[0][0], **calls[0][1])
    assert torch.equal(direct, again)
    report = migration.report()
    assert patch_of(report, "sparse_wan").fell_back == {"not the self-attention of the video": 2}
    assert report.options["sparse"]["sparsity"] == 0.5
    assert '"sparsity": 0.5' in report.to_json()


def test_off_by_default():
    from diffusers import WanTransformer3DModel

    original = vars(WanTransformer3DModel)["forward"]
    model, inputs = made("wan")
    dense = run(model, inputs)
    migration = mindiesd.patch_all(only="sdpa")
    assert vars(WanTransformer3DModel)["forward"] is original
    assert not PLANS
    assert torch.equal(run(model, inputs), dense)
    report = migration.report()
    assert "sparse" not in report.options
    assert not any(patch.family == "sparse" for patch in report.patches)


def test_undone_exactly():
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

    kinds = (WanTransformer3DModel, HunyuanVideoTransformer3DModel)
    originals = [vars(kind)["forward"] for kind in kinds]
    mindiesd.patch_all(sparse="rf_v2:0.5")
    assert all(vars(k)["forward"] is not o for k, o in zip(kinds, originals, strict=True))
    mindiesd.unpatch_all()
    assert all(vars(k)["forward"] is o for k, o in zip(kinds, originals, strict=True))
    assert not PLANS


def test_short_sequences_stay_dense():
    model, inputs = made("wan")
    mindiesd.patch_all()
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse="rf_v2:0.5")
    assert torch.equal(run(model, inputs), dense)
    counted = patch_of(migration.report(), "sparse_wan")
    assert counted.redirected == 0 and counted.fell_back["shorter than min_sequence"] == 2


def test_first_and_last_layers_stay_dense(calls):
    model, inputs = made("wan")
    for first, last, expected in ((1, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 2)):
        calls.clear()
        options = {"first_layers": first, "last_layers": last, "min_sequence": 0}
        migration = mindiesd.patch_all(sparse=options)
        run(model, inputs)
        assert len(calls) == expected
        dense = patch_of(migration.report(), "sparse_wan").fell_back
        assert dense.get("a layer to be kept dense", 0) == 2 - expected


def test_first_and_last_steps_stay_dense(calls):
    """Two forwards a step, as with classifier-free guidance, and two runs."""
    model, inputs = made("wan")
    options = {"first_steps": 1, "last_steps": 1, "steps": 4, "min_sequence": 0}
    migration = mindiesd.patch_all(sparse=options)
    for _ in range(2):
        sparse = []
        for timestep in (999, 700, 400, 100):
            calls.clear()
            for _ in range(2):
                run(model, inputs | {"timestep": torch.tensor([timestep])})
            sparse.append(len(calls))
        assert sparse == [0, 4, 4, 0]
    assert patch_of(migration.report(), "sparse_wan").fell_back["a step to be kept dense"] == 16


@pytest.mark.parametrize("kept", [12, 5])
def test_padded_text_is_cut_off(kept, calls):
    model, inputs = made("hunyuan_video")
    inputs["encoder_attention_mask"] = (torch.arange(12) < kept).float()[None]
    dense = run(model, inputs)
    mindiesd.patch_all(sparse={"sparsity": 1e-3, "min_sequence": 0})
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 and all(options["text_k"] == kept for _, options in calls)


def test_text_padded_differently_in_the_batch_stays_dense(calls):
    model, inputs = made("hunyuan_video")
    inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
    inputs["encoder_attention_mask"] = (torch.arange(12) < torch.tensor([[12], [5]])).float()
    mindiesd.patch_all()
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    assert torch.equal(run(model, inputs), dense)
    assert not calls
    reasons = patch_of(migration.report(), "sparse_hunyuan_video").fell_back
    assert reasons["a mask that is not the same padding for the whole batch"] == 2


def test_as_much_text_as_video_is_not_guessed(calls):
    model, inputs = made("wan")
    inputs["encoder_hidden_states"] = torch.randn(1, 360, 16)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    run(model, inputs)
    assert not calls
    reasons = patch_of(migration.report(), "sparse_wan").fell_back
    assert reasons == {"as many text tokens as video tokens": 4}


def test_a_latent_shape_that_cannot_be_known(calls):
    model, inputs = made("ltx")
    del inputs["num_frames"], inputs["height"], inputs["width"]
    inputs["video_coords"] = torch.rand(2, 3, 512)
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    torch.testing.assert_close(run(model, inputs), dense)
    reasons = patch_of(migration.report(), "sparse_ltx").fell_back
    assert not calls and set(reasons) == {"the latent shape is not known"}


def test_gradients_go_to_the_original(calls):
    model, inputs = made("wan")
    mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    model(**inputs, return_dict=False)[0].sum().backward()
    assert not calls
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_only_the_models_of_one_pipeline(calls):
    model, inputs = made("wan")
    other, _ = made("wan")
    dense = run(other, inputs)
    with mindiesd.patch_pipeline(model, sparse={"sparsity": 0.5, "min_sequence": 0}) as migration:
        assert torch.equal(run(other, inputs), dense)
        assert not calls
        run(model, inputs)
        assert len(calls) == 2
        assert patch_of(migration.report(), "sparse_wan").redirected == 2
    calls.clear()
    assert torch.equal(run(model, inputs), dense)
    assert not calls and not PLANS


def test_compiled_models_stay_dense_and_say_so(calls):
    model, inputs = made("wan")
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), dense, rtol=1e-4, atol=1e-5)
    assert not calls
    assert any("torch.compile stay dense" in note for note in migration.report().notes)
    torch._dynamo.reset()


def test_regionally_compiled_blocks_stay_dense_and_say_so(calls):
    model, inputs = made("wan")
    dense = run(model, inputs)
    migration = mindiesd.patch_all(sparse={"sparsity": 0.5, "min_sequence": 0})
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model, inputs), dense, rtol=1e-4, atol=1e-5)
    assert not calls
    assert any("torch.compile stay dense" in note for note in migration.report().notes)
    torch._dynamo.reset()


def test_the_forward_keeps_its_signature():
    import inspect

    from diffusers import WanTransformer3DModel

    before = inspect.signature(WanTransformer3DModel.forward)
    mindiesd.patch_all(sparse="rf_v2")
    assert inspect.signature(WanTransformer3DModel.forward) == before
    model, _ = made("wan")
    with pytest.raises(TypeError):
        model(nonsense=1)


WRONG = [
    ("sparse.strategy", "rf_v9"),
    ("sparse.strategy", {"strategy": None}),
    ("sparse", "rf_v2:much"),
    ("sparse", 0.5),
    ("sparse", {"share": 0.5}),
    ("sparse.sparsity", {"sparsity": 0}),
    ("sparse.sparsity", {"sparsity": 1.5}),
    ("sparse.sparsity", {"sparsity": True}),
    ("sparse.cdf_threshold", {"cdf_threshold": -1}),
    ("sparse.protect_first_frame", {"protect_first_frame": 1}),
    ("sparse.first_steps", {"first_steps": -1}),
    ("sparse.min_sequence", {"min_sequence": 1.0}),
    ("sparse.steps", {"steps": 0}),
    ("sparse.steps", {"last_steps": 2}),
]


@pytest.mark.parametrize(("argument", "value"), WRONG)
def test_wrong_options(argument, value):
    with pytest.raises(ParametersInvalid) as caught:
        mindiesd.patch_all(sparse=value)
    assert caught.value.argument == argument


def test_what_it_needs_must_be_selected():
    for options in ({"skip": "sdpa"}, {"only": "rope"}, {"skip": "sparse"}):
        with pytest.raises(ParametersInvalid, match="sparse"):
            mindiesd.patch_all(sparse="rf_v2", **options)
    with pytest.raises(ParametersInvalid, match="only"):
        mindiesd.patch_all(only="sparse")
    migration = mindiesd.patch_all(only="sdpa", sparse="rf_v2")
    assert {patch.family for patch in migration.options.patches} == {"sdpa", "sparse"}


def test_the_same_options_again_change_nothing():
    first = mindiesd.patch_all(sparse="rf_v2:0.5")
    assert mindiesd.patch_all(sparse=SparseOptions(sparsity=0.5)) is first
    assert mindiesd.patch_all() is not first
    assert not PLANS
