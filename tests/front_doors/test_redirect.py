"""An installed flash_attn: its functions go on, except for tensors it cannot compute.

The package itself needs CUDA to be built. In its place stands one of the same names, signatures and
metadata whose functions refuse every tensor that is not on a CUDA device, as the real ones do.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

import mindiesd
from mindiesd.patches import engine
from tests import oracles
from tests.front_doors.test_signatures import FLASH_ATTN


def install(place, functions=FLASH_ATTN, version="2.8.3") -> str:
    folder = place / "site-packages"
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    lines = ["def _kernel(name, q):", "    assert q.is_cuda, 'FlashAttention only runs on CUDA'"]
    lines.append("    return name")
    for name, parameters in functions.items():
        first = parameters.split(",")[0]
        lines += [f"def {name}({parameters}):", f"    return _kernel('{name}', {first})"]
    (package / "flash_attn_interface.py").write_text("\n".join(lines))
    names = ", ".join(functions)
    (package / "__init__.py").write_text(
        f"__version__ = '{version}'\nfrom flash_attn.flash_attn_interface import {names}\n"
    )
    info = folder / f"flash_attn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n")
    return str(folder)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a stand-in when called, and takes it away after the test."""

    def put(*arguments) -> None:
        monkeypatch.syspath_prepend(install(tmp_path, *arguments))
        engine._version.cache_clear()

    yield put
    mindiesd.unpatch_all()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    engine._version.cache_clear()


# What is on a CUDA device, as far as anybody looks.
CUDA = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("imported_first", [False, True])
def test_redirected_where_it_cannot_compute(installed, imported_first) -> None:
    installed()
    if imported_first:
        import flash_attn.flash_attn_interface
    migration = mindiesd.patch_all(only="flash_attn")
    import flash_attn
    import flash_attn.flash_attn_interface as interface

    assert flash_attn.flash_attn_func is interface.flash_attn_func
    x = torch.randn(1, 3, 2, 8)
    out = flash_attn.flash_attn_func(q=x, k=x, v=x, causal=True)
    want = oracles.attention(*[x.transpose(1, 2)] * 3, oracles.top_left(3, 3)).transpose(1, 2)
    oracles.assert_close(out, want)
    cu = torch.tensor([0, 3])
    out = flash_attn.flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 3, 3, causal=True)
    oracles.assert_close(out, want[0])
    assert flash_attn.flash_attn_func(CUDA, CUDA, CUDA) == "flash_attn_func"
    assert interface.flash_attn_with_kvcache(CUDA, 1, 2) == "flash_attn_with_kvcache"
    (found,) = migration.report().patches
    assert (found.status, found.redirected) == ("applied", 2)
    assert found.fell_back == {"on a CUDA device: the package's own kernel": 2}
    ours = flash_attn.flash_attn_func
    assert ours.__module__ == "flash_attn.flash_attn_interface"
    assert list(inspect.signature(ours).parameters)[:2] == ["q", "k"]
    assert pickle.loads(pickle.dumps(ours)) is ours
    del ours
    mindiesd.unpatch_all()
    for name in FLASH_ATTN:
        assert getattr(flash_attn, name) is getattr(interface, name)
        with pytest.raises(AssertionError, match="only runs on CUDA"):
            getattr(interface, name)(*[x] * 7)


def test_in_scope_of_one_module_only(installed) -> None:
    installed()
    import flash_attn

    class Model(torch.nn.Module):
        def forward(self, x):
            return flash_attn.flash_attn_func(x, x, x)

    inside, outside, x = Model(), Model(), torch.ones(1, 3, 2, 8)
    with mindiesd.patch_pipeline(inside) as migration:
        assert torch.equal(inside(x), x)
        with pytest.raises(AssertionError, match="only runs on CUDA"):
            outside(x)
        found = next(p for p in migration.report().patches if p.name == "flash_attn")
        assert found.redirected == 1


@pytest.mark.parametrize(
    ("change", "version", "reason"),
    [
        ({"flash_attn_func": "q, k, v, new=1"}, "2.8.3", "takes (q, k, v, new=1)"),
        ({"flash_attn_varlen_func": "q"}, "2.8.3", "takes (q)"),
        ({}, "2.6.3", "flash_attn 2.6.3 is not a tested version (>=2.7)"),
    ],
)
def test_skipped_as_a_whole_with_a_reason(installed, change, version, reason) -> None:
    installed({**FLASH_ATTN, **change}, version)
    migration = mindiesd.patch_all()
    import flash_attn

    found = next(p for p in migration.report().patches if p.name == "flash_attn")
    assert found.status == "skipped" and reason in found.reason
    for name in FLASH_ATTN:
        code = getattr(flash_attn, name).__code__
        assert code.co_filename.endswith("flash_attn_interface.py")
    with pytest.raises(mindiesd.PatchError) as caught:
        mindiesd.patch_all(only="flash_attn")
    assert reason in str(caught.value)
