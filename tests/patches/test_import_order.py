"""Every order of importing, patching, using and undoing, each in a fresh interpreter."""

from __future__ import annotations

import pytest

from tests.processes import run_python

PRELUDE = """
import sys
import mindiesd

def use(expected):
    # Called through the public name, through a name imported earlier, and through a real model.
    import torch
    import torch.nn.functional as F
    from diffusers.models import embeddings, normalization
    from diffusers.models.transformers import transformer_flux

    q = torch.randn(1, 2, 3, 8)
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    norm = normalization.RMSNorm(8, 1e-6)
    with torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
        F.rms_norm(q, [8])
        torch.nn.LayerNorm(8)(q)
        normalization.FP32LayerNorm(8)(q)
        norm(q)
        embeddings.apply_rotary_emb(q, (cos, sin))
        transformer_flux.apply_rotary_emb(q, (cos, sin))
    ours = F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
    assert ours == expected, (ours, expected)

def counts(migration):
    patches = migration.report().patches
    return {patch.name: patch.redirected for patch in patches if patch.redirected}

ONCE = {
    "sdpa": 1, "torch_rms_norm": 1, "torch_layer_norm": 1, "fp32_layer_norm": 1,
    "diffusers_rms_norm": 1, "diffusers_rope": 2,
}
IMPORT = "import torch, transformers, diffusers.models.transformers.transformer_flux"
"""

ORDERS = {
    "import, patch, use, unpatch, use": """
        exec(IMPORT)
        migration = mindiesd.patch_all()
        use(True)
        assert counts(migration) == ONCE, counts(migration)
        mindiesd.unpatch_all()
        use(False)
        assert counts(migration) == ONCE, "calls after the end were counted"
    """,
    "patch, import, use, unpatch, use": """
        migration = mindiesd.patch_all()
        assert "torch" not in sys.modules
        assert {p.status for p in migration.report().patches} <= {"pending", "provided"}
        exec(IMPORT)
        use(True)
        assert counts(migration) == ONCE, counts(migration)
        mindiesd.unpatch_all()
        use(False)
    """,
    "patch, torch, use torch, diffusers, use": """
        migration = mindiesd.patch_all()
        import torch
        states = {p.name: p.status for p in migration.report().patches}
        assert states["sdpa"] == "applied" and states["diffusers_rope"] == "pending", states
        exec(IMPORT)
        use(True)
        assert counts(migration) == ONCE, counts(migration)
    """,
    "patch, unpatch, import, use": """
        mindiesd.patch_all()
        mindiesd.unpatch_all()
        exec(IMPORT)
        use(False)
    """,
    "patch, unpatch, import, patch, use": """
        mindiesd.patch_all()
        mindiesd.unpatch_all()
        exec(IMPORT)
        migration = mindiesd.patch_all()
        use(True)
        assert counts(migration) == ONCE, counts(migration)
    """,
    "import, patch, unpatch, patch, use": """
        exec(IMPORT)
        mindiesd.patch_all()
        mindiesd.unpatch_all()
        migration = mindiesd.patch_all()
        use(True)
        assert counts(migration) == ONCE, counts(migration)
    """,
    "ops first, import, patch, use": """
        import torch
        x = torch.randn(1, 3, 2, 8)
        mindiesd.attention_forward(x, x, x)
        migration = mindiesd.patch_all()
        exec(IMPORT)
        mindiesd.attention_forward(x, x, x)
        use(True)
        assert counts(migration) == ONCE, "an op called a patched name: " + str(counts(migration))
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_order(order: str) -> None:
    run_python(PRELUDE + "\n" + "\n".join(line[8:] for line in ORDERS[order].splitlines()))


def test_import_is_light() -> None:
    run_python(
        """
        import sys
        import mindiesd
        heavy = {"torch", "torch_npu", "diffusers", "transformers", "wrapt", "rich", "click"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert "attention_forward" in dir(mindiesd)
        try:
            mindiesd.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise AssertionError
        """
    )


def test_patch_all_without_torch_in_the_environment() -> None:
    """Hooks only; the report says what is missing, and nothing fails."""
    run_python(
        """
        import sys

        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, NoTorch())
        from importlib import metadata
        real = metadata.version
        def version(name):
            if name in ("torch", "diffusers", "transformers"):
                raise metadata.PackageNotFoundError(name)
            return real(name)
        metadata.version = version

        import mindiesd
        report = mindiesd.patch_all().report()
        assert {p.status for p in report.patches} == {"skipped"}
        assert all("is not installed" in p.reason for p in report.patches)
        assert "torch was never imported" in report.summary()
        try:
            mindiesd.patch_all(only="sdpa")
        except mindiesd.PatchError as error:
            assert "torch is not installed" in str(error)
        else:
            raise AssertionError("only= named a patch that cannot be applied")
        """
    )
