"""Selecting, skipping, reloading, half-imported modules, threads."""

from __future__ import annotations

import pkgutil

import pytest

import mindiesd
from mindiesd import ParametersInvalid
from mindiesd.patches.registry import FAMILIES, names, records, select
from tests.processes import run_python


def test_records_are_complete_and_unique() -> None:
    found = [record.name for record in records()]
    assert len(found) == len(set(found))
    assert {record.family for record in records()} == set(FAMILIES)
    for record in records():
        assert record.why and record.when and record.numerics and record.requires
        # Public functions, or ops that backends implement; or a description.
        for name in record.becomes.split(", "):
            assert " " in name or callable(pkgutil.resolve_name(name)), name


def test_select_by_name_family_text_and_list() -> None:
    assert [p.name for p in select("sdpa")] == ["sdpa"]
    assert {p.name for p in select("rms_norm,rope")} == {
        p.name for p in records() if p.family in ("rms_norm", "rope")
    }
    assert "sdpa" not in {p.name for p in select(skip=["sdpa"])}
    assert select(only="layer_norm", skip="fp32_layer_norm") == select("torch_layer_norm")


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"only": "spda"}, "only"),
        ({"skip": ["sdpa", "nothing"]}, "skip"),
        ({"only": 5}, "only"),
        ({"skip": ["sdpa", 3]}, "skip"),
        ({"numerics": "exact"}, "numerics"),
        ({"verify": -1}, "verify"),
        ({"strict": "yes"}, "strict"),
    ],
)
def test_bad_options_name_the_argument(options: dict, argument: str) -> None:
    with pytest.raises(ParametersInvalid) as caught:
        mindiesd.patch_all(**options)
    assert caught.value.argument == argument
    assert "allowed" in str(caught.value)


def test_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(ParametersInvalid) as caught:
        mindiesd.patch_all(only="spda")
    for name in names():
        assert name in str(caught.value)


def test_idempotent_and_last_call_decides() -> None:
    import torch.nn.functional as F

    first = mindiesd.patch_all(only="sdpa")
    function = F.scaled_dot_product_attention
    assert mindiesd.patch_all(only="sdpa") is first
    assert F.scaled_dot_product_attention is function
    second = mindiesd.patch_all(only="torch_rms_norm")
    assert second is not first
    assert F.scaled_dot_product_attention is not function
    assert [p.status for p in second.report().patches] == ["applied"]
    mindiesd.unpatch_all()
    mindiesd.unpatch_all()


def test_version_out_of_range_is_skipped_with_its_reason() -> None:
    run_python(
        """
        from importlib import metadata
        real = metadata.version
        metadata.version = lambda name: "0.12.0" if name == "diffusers" else real(name)
        import torch, mindiesd
        from diffusers.models import embeddings, normalization
        original = embeddings.apply_rotary_emb
        report = mindiesd.patch_all().report()
        skipped = {p.name: p.reason for p in report.patches if p.status == "skipped"}
        assert {"diffusers_rms_norm", "fp32_layer_norm", "diffusers_rope"} <= set(skipped), skipped
        assert "sdpa" not in skipped and "llama_rope" not in skipped
        assert "diffusers 0.12.0 is not a tested version" in skipped["diffusers_rope"]
        assert embeddings.apply_rotary_emb is original
        for options in ({"strict": True}, {"only": "diffusers_rope"}):
            try:
                mindiesd.patch_all(**options)
            except mindiesd.PatchError as error:
                assert "0.12.0" in str(error)
            else:
                raise AssertionError(options)
            import torch.nn.functional as F
            assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        """
    )


def test_a_family_of_which_something_exists_is_no_error() -> None:
    run_python(
        """
        from importlib import metadata
        real = metadata.version
        metadata.version = lambda name: "0.12.0" if name == "diffusers" else real(name)
        import torch, mindiesd
        from transformers.models.llama import modeling_llama
        report = mindiesd.patch_all(only="rope").report()
        states = {p.name: p.status for p in report.patches}
        assert states["diffusers_rope"] == "skipped" and states["llama_rope"] == "applied", states
        try:
            mindiesd.patch_all(only="llama_rope,qwenimage_rope")
        except mindiesd.PatchError as error:
            assert "qwenimage_rope" in str(error) and "llama_rope" not in str(error)
        else:
            raise AssertionError("a record that was named cannot be applied")
        """
    )


def test_changed_signature_is_skipped_with_its_reason() -> None:
    run_python(
        """
        import torch, mindiesd
        import torch.nn.functional as F
        def rms_norm(input, normalized_shape, weight=None, eps=None, bias=None):
            raise NotImplementedError
        F.rms_norm = rms_norm
        (patch,) = [p for p in mindiesd.patch_all().report().patches if p.name == "torch_rms_norm"]
        assert patch.status == "skipped" and "bias" in patch.reason, patch
        assert F.rms_norm is rms_norm
        """
    )


def test_target_already_replaced_by_python_is_skipped() -> None:
    run_python(
        """
        import torch, mindiesd
        import torch.nn.functional as F
        def mine(q, k, v): ...
        F.scaled_dot_product_attention = mine
        (patch,) = mindiesd.patch_all(skip=["norms"] if 0 else None).report().patches[:1]
        assert patch.status == "skipped" and "already replaced" in patch.reason, patch
        """
    )


def test_reload_keeps_the_patch_and_undo_restores_the_new_original() -> None:
    run_python(
        """
        import importlib, sys
        import torch
        import diffusers.models.embeddings as embeddings
        import mindiesd
        # In lists: a module-level name that holds the function would itself be rebound.
        before = [embeddings.apply_rotary_emb]
        migration = mindiesd.patch_all()
        importlib.reload(embeddings)
        assert type(embeddings.__loader__).__module__.startswith(("_frozen_importlib", "importlib"))
        patched = [embeddings.apply_rotary_emb]
        original = [patched[0].__wrapped__]
        assert patched[0] is not before[0] and original[0] is not before[0]
        x = torch.randn(1, 2, 3, 8)
        embeddings.apply_rotary_emb(x, (torch.randn(3, 8), torch.randn(3, 8)))
        by_name = {p.name: p for p in migration.report().patches}
        assert by_name["diffusers_rope"].redirected == 1
        mindiesd.unpatch_all()
        assert embeddings.apply_rotary_emb is original[0]
        importlib.reload(embeddings)
        assert not hasattr(embeddings.apply_rotary_emb, "__wrapped__"), "patched after the end"
        """
    )


def test_module_imported_again_after_it_was_dropped() -> None:
    run_python(
        """
        import importlib, sys
        import torch, diffusers.models.embeddings
        import mindiesd
        mindiesd.patch_all()
        del sys.modules["diffusers.models.embeddings"]
        again = importlib.import_module("diffusers.models.embeddings")
        assert again.apply_rotary_emb.__wrapped__.__module__ == "diffusers.models.embeddings"
        """
    )


def test_hook_failure_never_reaches_the_import() -> None:
    run_python(
        """
        import logging, sys
        logging.getLogger("mindiesd").setLevel(logging.CRITICAL)
        import mindiesd
        import mindiesd.patches.layer_norm as layer_norm
        def build(original, site):
            raise RuntimeError("our own bug")
        layer_norm.build_fp32 = build
        migration = mindiesd.patch_all()
        import diffusers.models.normalization as normalization
        import torch
        (patch,) = [p for p in migration.report().patches if p.name == "fp32_layer_norm"]
        assert patch.status == "skipped" and "our own bug" in patch.reason, patch
        assert not hasattr(normalization.FP32LayerNorm.forward, "__wrapped__")
        normalization.FP32LayerNorm(8)(torch.randn(2, 8))
        """
    )


def test_patch_all_inside_a_half_imported_module(tmp_path) -> None:
    """What a plug-in loaded by ``import diffusers`` itself would see."""
    run_python(
        """
        import importlib.machinery, sys
        import torch
        import mindiesd

        NAME = "diffusers.models.embeddings"

        class Meddle:
            def find_spec(self, name, path=None, target=None):
                if name == "diffusers.models.activations" and NAME in sys.modules:
                    sys.meta_path.remove(self)
                    assert sys.modules[NAME].__spec__._initializing
                    self.migration = mindiesd.patch_all()
                    return None

        import diffusers.models
        for name in [n for n in sys.modules if n.startswith("diffusers.models.")]:
            del sys.modules[name]
        meddle = Meddle()
        sys.meta_path.insert(0, meddle)
        import diffusers.models.embeddings as embeddings
        import diffusers.models.transformers.transformer_flux as flux
        status = {p.name: p.status for p in meddle.migration.report().patches}
        assert status["diffusers_rope"] == "applied", status
        assert embeddings.apply_rotary_emb.__wrapped__ is not None
        assert flux.apply_rotary_emb is embeddings.apply_rotary_emb
        """
    )


def test_threads_patch_and_unpatch() -> None:
    run_python(
        """
        import threading
        import torch
        import torch.nn.functional as F
        import mindiesd

        q = torch.randn(1, 2, 3, 8)
        expected = F.scaled_dot_product_attention(q, q, q)
        wrong, start = [], threading.Barrier(6)

        def toggle():
            start.wait()
            for _ in range(5):
                mindiesd.patch_all(only="sdpa")
                mindiesd.unpatch_all()

        def call():
            start.wait()
            for _ in range(2000):
                if not torch.equal(F.scaled_dot_product_attention(q, q, q), expected):
                    wrong.append(1)

        threads = [threading.Thread(target=f) for f in (toggle, toggle, toggle, call, call, call)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not wrong
        mindiesd.unpatch_all()
        assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        """
    )


def test_counts_are_exact_under_threads() -> None:
    run_python(
        """
        import threading, sys
        import torch
        import torch.nn.functional as F
        import mindiesd
        sys.setswitchinterval(1e-6)
        migration = mindiesd.patch_all(only="sdpa")
        q, q3 = torch.randn(1, 2, 3, 8), torch.randn(2, 3, 8)
        def work():
            for _ in range(1500):
                F.scaled_dot_product_attention(q, q, q)
                F.scaled_dot_product_attention(q3, q3, q3)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        (patch,) = migration.report().patches
        assert patch.redirected == 6000 and sum(patch.fell_back.values()) == 6000, patch
        (patch,) = migration.report().patches
        assert patch.redirected == 6000, "reading a count must not change it"
        """
    )
