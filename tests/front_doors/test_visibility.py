"""Who sees the provided packages: the code that is run. Who does not: installed libraries."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys

import pytest
import torch

import mindiesd
from mindiesd.patches.front_doors.finder import FINDER
from mindiesd.patches.registry import select
from tests.processes import run_python

# What the libraries know of the machine, asked in their own namespaces and by their own functions.
PROBES = """
import importlib, json, sys
def probes():
    import diffusers.utils.import_utils as du
    import diffusers.models.attention_dispatch as dispatch
    import transformers.utils.import_utils as tu
    import accelerate.utils.imports as au
    import peft.import_utils as pu
    names = ("flash_attn", "flash_attn_interface", "flash_attn_3", "xformers", "sageattention")
    found = {}
    def ask(key, text, space):
        try:
            found[key] = repr(eval(text, vars(space)))
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
    for space in (du, tu, au, pu, dispatch):
        for name in names:
            key = f"{space.__name__} {name}"
            ask(key, f"__import__('importlib.util').util.find_spec({name!r})", space)
            version = f"__import__('importlib.metadata').metadata.version({name!r})"
            ask(key + " metadata", version, space)
            ask(key + " import", f"__import__({name!r})", space)
            ask(key + " import_module", f"__import__('importlib').import_module({name!r})", space)
    for space in (du, tu):
        for name in names:
            ask(f"{space.__name__} _is {name}", f"_is_package_available({name!r})", space)
        for name in sorted(vars(space)):
            if name.startswith("is_") and any(w in name for w in ("flash", "xformers", "sage")):
                ask(f"{space.__name__} {name}", f"{name}()", space)
    for name in names:
        ask(f"tu version {name}", f"_is_package_available({name!r}, return_version=True)", tu)
    for name in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_SAGE_ATTN",
                 "_CAN_USE_XFORMERS_ATTN", "flash_attn_func", "xops", "sageattn"):
        ask(name, name, dispatch)
    return found
"""
LIBRARIES = (
    "import diffusers, diffusers.models.attention_dispatch, transformers, accelerate, peft\n"
)
PATCH = "import mindiesd; mindiesd.patch_all()\n"
USE = """
import flash_attn, xformers.ops, sageattention
from flash_attn import flash_attn_func
from flash_attn.bert_padding import unpad_input
from xformers.ops.fmha.attn_bias import BlockDiagonalMask
assert flash_attn.flash_attn_func is flash_attn_func and flash_attn.__version__ == "2.8.3"
"""
SHOW = "\nprint(json.dumps(probes()))"
ORDERS = {
    "patched first, asked, then used": PATCH + PROBES + "probes()\n" + USE + SHOW,
    "patched, used, then the libraries": PATCH + USE + LIBRARIES + PROBES + SHOW,
    "libraries, patched, used": LIBRARIES + PATCH + USE + PROBES + SHOW,
    "libraries asked, patched, used, undone": (
        LIBRARIES + PROBES + "probes()\n" + PATCH + USE + "mindiesd.unpatch_all()\n" + SHOW
    ),
}


@pytest.fixture(scope="module")
def unpatched() -> dict:
    found = json.loads(run_python(PROBES + SHOW).stdout.splitlines()[-1])
    assert found["diffusers.utils.import_utils flash_attn"] == "None"
    assert "ModuleNotFoundError" in found["transformers.utils.import_utils xformers import"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_libraries_are_told_what_they_would_be_told_without_us(order, unpatched) -> None:
    found = json.loads(run_python(ORDERS[order]).stdout.splitlines()[-1])
    assert found == unpatched


def absent(statement: str) -> ImportError:
    """The error of an import statement that must fail."""
    with pytest.raises(ImportError) as caught:
        exec(statement, {"__name__": __name__})
    return caught.value


def test_patching_imports_no_torch() -> None:
    run_python("""
        import sys
        import mindiesd
        mindiesd.patch_all()
        from importlib.util import find_spec
        assert "torch" not in sys.modules
        from flash_attn import flash_attn_func
        import torch
        x = torch.ones(1, 3, 2, 8)
        assert torch.equal(flash_attn_func(x, x, x), x)
    """)


def test_the_import_statements_people_write() -> None:
    mindiesd.patch_all()
    import flash_attn
    import flash_attn.bert_padding
    import flash_attn.layers.rotary as rotary
    import xformers.ops as xops
    from flash_attn import bert_padding
    from flash_attn.layers import rotary as again
    from flash_attn.layers.rotary import apply_rotary_emb
    from sageattention import sageattn
    from xformers.ops import fmha, memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    assert flash_attn.bert_padding is bert_padding
    assert again is rotary and rotary.apply_rotary_emb is apply_rotary_emb
    assert importlib.import_module("flash_attn.bert_padding") is bert_padding
    assert importlib.import_module("flash_attn") is flash_attn
    assert __import__("flash_attn") is flash_attn
    assert xops.fmha is fmha and fmha.attn_bias is attn_bias
    assert xops.memory_efficient_attention is memory_efficient_attention
    names: dict = {"__name__": __name__}
    exec("from flash_attn import *", names)
    assert names["flash_attn_func"] is flash_attn.flash_attn_func
    for module, name in [
        (flash_attn, "flash_attn"),
        (rotary, "flash_attn.layers.rotary"),
        (xops, "xformers.ops"),
    ]:
        assert module.__name__ == module.__spec__.name == name
        assert importlib.util.find_spec(name) is module.__spec__
        assert module.__package__ == module.__spec__.parent
        assert getattr(module, "__path__", None) == module.__spec__.submodule_search_locations
    assert flash_attn.__path__ == [] and rotary.__package__ == "flash_attn.layers"
    x = torch.ones(1, 2, 1, 8)
    op = xops.MemoryEfficientAttentionFlashAttentionOp
    assert torch.equal(memory_efficient_attention(x, x, x, op=op), x)
    assert torch.equal(sageattn(x, x, x), x)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from flash_attn import nope", "flash_attn"),
        ("import flash_attn.nope", "flash_attn.nope"),
        ("import flash_attn.nope.more", "flash_attn.nope"),
        ("from flash_attn.ops.rms_norm import rms_norm", "flash_attn.ops"),
        ("from flash_attn.cute import flash_attn_func", "flash_attn.cute"),
        (
            "from flash_attn.flash_attn_interface import flash_attn_gpu",
            "flash_attn.flash_attn_interface",
        ),
        ("import flash_attn_2_cuda", "flash_attn_2_cuda"),
        ("import flash_attn_3_cuda", "flash_attn_3_cuda"),
        ("import flash_attn_interface", "flash_attn_interface"),
        ("from xformers.ops import SwiGLU", "xformers.ops"),
        ("import xformers.ops.swiglu_op", "xformers.ops.swiglu_op"),
        ("from sageattention import sageattn_qk_int8_pv_fp16_cuda", "sageattention"),
    ],
)
def test_what_is_not_provided_is_an_import_error(statement, name) -> None:
    mindiesd.patch_all()
    for _ in range(2):
        error = absent(statement)
        assert error.name == name
        wanted = statement.split()[-1] if statement.startswith("from") else name
        assert wanted in str(error) or name in str(error)


def test_undone() -> None:
    mindiesd.patch_all()
    import xformers.ops
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import unpad_input

    assert "flash_attn" not in sys.modules and "xformers" not in sys.modules
    mindiesd.unpatch_all()
    for statement in (
        "import flash_attn",
        "from flash_attn.bert_padding import pad_input",
        "import xformers.ops",
        "import sageattention",
    ):
        assert isinstance(absent(statement), ModuleNotFoundError)
    starts = ("flash_attn", "xformers", "sageattention", "mindiesd.provided")
    assert [name for name in sys.modules if name.startswith(starts)] == []
    assert FINDER not in sys.meta_path
    # What the script holds goes on working.
    x = torch.ones(1, 3, 2, 8)
    assert torch.equal(flash_attn_func(x, x, x), x)
    assert torch.equal(xformers.ops.memory_efficient_attention(x, x, x), x)
    assert unpad_input(x, torch.ones(1, 3))[3] == 3
    mindiesd.patch_all()
    from flash_attn import flash_attn_func as again

    assert again is flash_attn_func


@pytest.fixture
def two_places(tmp_path, monkeypatch):
    """A directory that looks installed and one that is the user's, with the same two modules."""
    names = []
    for folder, who in (("lib/site-packages", "installed"), ("project", "own")):
        place = tmp_path / folder
        place.mkdir(parents=True)
        (place / f"{who}_guarded.py").write_text(
            "try:\n    import flash_attn\n    HAS = True\nexcept ImportError:\n    HAS = False\n"
        )
        (place / f"{who}_by_name.py").write_text(
            "try:\n    from flash_attn import flash_attn_func\n"
            "except ImportError:\n    flash_attn_func = None\n"
            "def text(code):\n    exec(code, {'__name__': __name__})\n"
        )
        names += [f"{who}_guarded", f"{who}_by_name"]
        monkeypatch.syspath_prepend(str(place))
    yield
    for name in names:
        sys.modules.pop(name, None)


def test_by_where_the_importing_code_lies(two_places) -> None:
    migration = mindiesd.patch_all()
    installed_guarded = importlib.import_module("installed_guarded")
    import flash_attn

    others = ("installed_by_name", "own_guarded", "own_by_name")
    installed_by_name, own_guarded, own_by_name = map(importlib.import_module, others)
    assert own_guarded.HAS and own_by_name.flash_attn_func is flash_attn.flash_attn_func
    assert not installed_guarded.HAS and installed_by_name.flash_attn_func is None
    own_by_name.text("import flash_attn")
    with pytest.raises(ImportError):
        installed_by_name.text("import flash_attn")
    notes = " ".join(migration.report().notes)
    assert "flash_attn is provided" in notes and "installed_guarded" in notes
    assert "diffusers" not in notes


def test_a_real_package_wins(tmp_path) -> None:
    (tmp_path / "sageattention.py").write_text("who = 'the real one'")
    run_python(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mindiesd
        report = mindiesd.patch_all().report()
        import sageattention
        assert sageattention.who == "the real one"
        found = {{patch.name: patch for patch in report.patches}}
        assert found["sageattention"].status == "skipped"
        assert found["sageattention"].reason == "sageattention has no version to check"
        assert found["flash_attn"].status == "provided"
    """)


def test_selecting() -> None:
    assert "flash_attn_3" not in [patch.name for patch in select()]
    assert [patch.name for patch in select("flash_attn")] == ["flash_attn"]
    mindiesd.patch_all(only="flash_attn_3,xformers", strict=True)
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    from xformers.ops import memory_efficient_attention

    assert flash_attn_func and flash_attn_varlen_func and memory_efficient_attention
    absent("import flash_attn")
    mindiesd.patch_all(skip="flash_attn")
    absent("import flash_attn")
    absent("import flash_attn_interface")
    import sageattention

    assert sageattention.sageattn


def test_calls_are_counted() -> None:
    migration = mindiesd.patch_all(only=["flash_attn", "xformers", "sageattention"])
    from flash_attn import flash_attn_func
    from sageattention import sageattn

    x = torch.randn(1, 3, 2, 8)
    flash_attn_func(x, x, x)
    flash_attn_func(x, x, x, causal=True)
    flash_attn_func(x, x, x, softcap=1.0)
    flash_attn_func(x, x, x, dropout_p=0.1)
    flash_attn_func(x, x, x, return_attn_probs=True)
    flash_attn_func(x.clone().requires_grad_(), x, x)
    sageattn(x, x, x)
    torch.compile(lambda x: flash_attn_func(x, x, x), backend="eager", fullgraph=True)(x)
    report = migration.report()
    found = {patch.name: patch for patch in report.patches}
    flash = found["flash_attn"]
    assert (flash.status, flash.redirected, flash.traced) == ("provided", 2, 1)
    assert flash.fell_back == {
        "computed natively: no kernel caps scores": 1,
        "computed natively: dropout": 1,
        "computed natively: the log-sum-exp is asked for": 1,
        "computed natively: needs gradients": 1,
    }
    assert found["sageattention"].redirected == 1
    assert "3 provided" in report.summary()
    assert "1 × computed natively: dropout" in " ".join(str(report).split())
    assert mindiesd.Report.from_dict(report.to_dict()).patches == report.patches


def test_in_one_pipelines_block() -> None:
    class Model(torch.nn.Module):
        def forward(self, x):
            from flash_attn import flash_attn_func

            return flash_attn_func(x, x, x)

    model, x = Model(), torch.ones(1, 3, 2, 8)
    with mindiesd.patch_pipeline(model, only="flash_attn") as migration:
        assert torch.equal(model(x), x)
        (found,) = migration.report().patches
    assert (found.status, found.redirected) == ("provided", 1)
    with pytest.raises(ImportError):
        model(x)


def test_an_import_inside_compiled_code() -> None:
    mindiesd.patch_all()
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        from flash_attn import flash_attn_func

        return flash_attn_func(x, x, x)

    x = torch.ones(1, 3, 2, 8)
    assert torch.equal(run(x), x)


@pytest.mark.slow
def test_transformers_refuses_flash_attention_2_as_before() -> None:
    code = """
        import torch, transformers
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                          num_attention_heads=2, vocab_size=8)
        def asked():
            try:
                transformers.LlamaForCausalLM._from_config(
                    config, attn_implementation="flash_attention_2")
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "loaded"
    """
    before = run_python(code + "\n        print(asked())").stdout
    assert before.startswith("ImportError"), before
    patched = "\n        import mindiesd; mindiesd.patch_all(); import flash_attn; print(asked())"
    assert run_python(code + patched).stdout == before
