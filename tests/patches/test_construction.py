"""Constructors that raise where torch_npu is installed."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

import mindiesd
from mindiesd import PatchError
from mindiesd.patches import construction
from mindiesd.patches.engine import nothing_to_mend
from mindiesd.patches.registry import records
from mindiesd.patches.rewriting.rewrite import rewrite
from mindiesd.patches.scope import Site

VERSION = metadata.version("diffusers")
RECORDS = {record.name: record for record in construction.RECORDS}


def concerned(name: str) -> bool:
    return VERSION in SpecifierSet(RECORDS[name].mends["diffusers"])


# The shape of the constructors in diffusers 0.35 to 0.40, around what they share.
RECORDED = """
class Base:
    def __init__(self):
        self.initialised = True


def is_torch_npu_available():
    return AVAILABLE


def deprecate(name, version, message):
    raise ValueError(f"The deprecation tuple {(name, version, message)} should be removed")


class Block(Base):
    def __init__(self, dim: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.mlp_hidden_dim = int(dim * mlp_ratio)

        if is_torch_npu_available():
            from recorded_processors import FluxAttnProcessor2_0_NPU

            deprecation_message = (
                "Defaulting to FluxAttnProcessor2_0_NPU for NPU devices will be removed."
            )
            deprecate("npu_processor", "0.34.0", deprecation_message)
            processor = FluxAttnProcessor2_0_NPU()
        else:
            processor = "ordinary"

        self.processor = processor
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    path = tmp_path / "recorded_constructor.py"
    path.write_text(RECORDED)
    spec = importlib.util.spec_from_file_location("recorded_constructor", path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recorded_constructor", made)
    made.AVAILABLE = True
    processors = types.ModuleType("recorded_processors")
    processors.FluxAttnProcessor2_0_NPU = object
    monkeypatch.setitem(sys.modules, "recorded_processors", processors)
    spec.loader.exec_module(made)
    return made


class Counting(Site):
    """A site that keeps the reasons."""

    def __init__(self) -> None:
        super().__init__("make_Block")
        self.arm()
        self.reasons: list = []

    def takes(self, reason) -> bool:
        self.reasons.append(reason)
        return reason is None


def test_the_branch_is_not_taken(module) -> None:
    original = module.Block.__init__
    with pytest.raises(ValueError, match="npu_processor"):
        module.Block(8)
    site = Counting()
    made = rewrite(original, {construction.ASKS_FOR_NPU: 1}, site)
    assert inspect.signature(made) == inspect.signature(original)
    module.Block.__init__ = made
    block = module.Block(8, mlp_ratio=2.0)
    assert (block.initialised, block.mlp_hidden_dim, block.processor) == (True, 16, "ordinary")
    assert site.reasons == [None]
    module.AVAILABLE = False
    assert module.Block(8).processor == "ordinary"
    assert site.reasons == [None, construction.NO_TORCH_NPU]


@pytest.mark.parametrize("name", RECORDS)
def test_left_out_where_there_is_nothing_to_mend(name: str) -> None:
    if concerned(name):
        pytest.skip(f"diffusers {VERSION} has the fault")
    assert nothing_to_mend(RECORDS[name]).startswith(f"diffusers {VERSION} does not need it")
    report = mindiesd.patch_all().report()
    assert name not in {patch.name for patch in report.patches}
    mindiesd.unpatch_all()
    with pytest.raises(PatchError, match="does not need it"):
        mindiesd.patch_all(only=name)
    # What is mended elsewhere is no failure here.
    assert mindiesd.patch_all(only="sdpa", strict=True)


def test_only_faults_are_left_out() -> None:
    assert {record.name for record in records() if record.mends} == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_the_model_can_be_made(name: str, monkeypatch) -> None:
    """With the installed diffusers, as where torch_npu is installed."""
    if not concerned(name):
        pytest.skip(f"diffusers {VERSION} does not have the fault")
    record = RECORDS[name]
    home = importlib.import_module(record.module)
    block = getattr(home, record.attribute.partition(".")[0])
    arguments = {"dim": 8, "num_attention_heads": 2, "attention_head_dim": 4}
    monkeypatch.setattr(home, "is_torch_npu_available", lambda: False)
    ordinary = block(**arguments)
    monkeypatch.setattr(home, "is_torch_npu_available", lambda: True)
    with pytest.raises(ValueError, match="npu_processor"):
        block(**arguments)
    original = vars(block)["__init__"]
    migration = mindiesd.patch_all(only="construction")
    made = block(**arguments)
    assert type(made.attn.processor) is type(ordinary.attn.processor)
    assert made.state_dict().keys() == ordinary.state_dict().keys()
    counts = {patch.name: patch.redirected for patch in migration.report().patches}
    assert counts[name] == 1
    mindiesd.unpatch_all()
    assert vars(block)["__init__"] is original
