"""Forks, threads, the end of the interpreter, odd ways to be imported: each in a fresh process."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.processes import run_python


def test_forks() -> None:
    """A child keeps what its parent patched, may undo it, and changes nothing of the parent's."""
    run_python(
        """
        import os, threading
        import torch
        import torch.nn.functional as F
        import mindiesd
        from mindiesd.patches.engine import ENGINE

        q = torch.randn(1, 2, 4, 8)
        expected = F.scaled_dot_product_attention(q, q, q)
        migration = mindiesd.patch_all()

        def child(work):
            pid = os.fork()
            if not pid:
                try:
                    work()
                except BaseException as error:
                    print(repr(error), flush=True)
                    os._exit(1)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0

        def use_and_undo():
            assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
            mindiesd.unpatch_all()
            assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
            mindiesd.patch_all(only="sdpa")
            assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)

        child(use_and_undo)
        # Forked while another thread holds the engine's lock, which nobody in the child releases.
        held, go_on = threading.Event(), threading.Event()

        def hold():
            with ENGINE.lock():
                held.set()
                go_on.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child(use_and_undo)
        go_on.set()
        thread.join()
        assert F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
        F.scaled_dot_product_attention(q, q, q)
        (sdpa,) = [p for p in migration.report().patches if p.name == "sdpa"]
        assert sdpa.redirected == 1, sdpa
        """
    )


def test_the_end_of_the_interpreter() -> None:
    """Calls from atexit functions and from what is finalized when modules are already gone."""
    done = run_python(
        """
        import atexit, threading
        import torch
        import torch.nn.functional as F
        import mindiesd

        q = torch.randn(1, 2, 4, 8)
        expected = F.scaled_dot_product_attention(q, q, q)

        class Late:
            def __init__(self, *needed):
                self.needed = needed

            def __del__(self):
                attend, q, expected, say = self.needed
                say("late", bool((attend(q, q, q) == expected).all()))

        def at_exit():
            print("at exit", torch.equal(F.scaled_dot_product_attention(q, q, q), expected))

        atexit.register(at_exit)
        migration = mindiesd.patch_all()
        import builtins
        builtins.late = Late(F.scaled_dot_product_attention, q, expected, print)

        F.scaled_dot_product_attention(q, q, q)
        atexit.register(lambda: print("report", migration.report().redirected > 0))
        """
    )
    assert done.stdout.splitlines() == ["report True", "at exit True", "late True"]
    assert done.stderr == ""


def test_import_cycles(tmp_path: Path) -> None:
    """Two modules of the user's that import one another, one of which patches in between."""
    (tmp_path / "first.py").write_text(
        "import torch\n"
        "from torch.nn.functional import rms_norm\n"
        "import mindiesd\n"
        "migration = mindiesd.patch_all()\n"
        "import second\n"
        "def work(x):\n"
        "    return rms_norm(x, (8,))\n"
    )
    (tmp_path / "second.py").write_text(
        "import first\n"
        "from torch.nn.functional import rms_norm\n"
        "def work(x):\n"
        "    return rms_norm(x, (8,)) + first.work(x)\n"
    )
    run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import first, second, torch
        second.work(torch.randn(2, 8))
        (norm,) = [p for p in first.migration.report().patches if p.name == "torch_rms_norm"]
        assert norm.redirected == 2, norm
        first.mindiesd.unpatch_all()
        assert first.rms_norm is second.rms_norm is torch.nn.functional.rms_norm
        assert not hasattr(first.rms_norm, "__wrapped__")
        """
    )


def test_threads_that_patch_at_once_before_anything_is_imported() -> None:
    run_python(
        """
        import sys, threading
        import mindiesd
        sys.setswitchinterval(1e-5)
        start, migrations, errors = threading.Barrier(8), [], []

        def work(number):
            start.wait()
            try:
                migrations.append(mindiesd.patch_all())
                import torch.nn.functional as F
                q = loaded.randn(1, 2, 4, 8)
                for _ in range(20):
                    F.scaled_dot_product_attention(q, q, q)
            except BaseException as error:
                errors.append(error)

        import torch as loaded  # the import is not what is tested; its locks are Python's
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        assert len(set(map(id, migrations))) == 1, "they do not share one migration"
        (sdpa,) = [p for p in migrations[0].report().patches if p.name == "sdpa"]
        assert sdpa.redirected == 160, sdpa
        mindiesd.unpatch_all()
        import torch, torch.nn.functional as F
        assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        """
    )


def test_patch_all_by_a_plugin_that_torch_loads_while_it_is_imported(tmp_path: Path) -> None:
    """An entry point of torch.backends runs when all but the end of torch's import is done."""
    (tmp_path / "plug.py").write_text(
        "import sys\n"
        "def load():\n"
        "    assert sys.modules['torch'].__spec__._initializing\n"
        "    import mindiesd\n"
        "    global migration\n"
        "    migration = mindiesd.patch_all()\n"
    )
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nplug = plug:load\n")
    run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, plug
        import torch.nn.functional as F
        F.rms_norm(torch.randn(2, 8), (8,))
        (norm,) = [p for p in plug.migration.report().patches if p.name == "torch_rms_norm"]
        assert (norm.status, norm.redirected) == ("applied", 1), norm
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="1",
    )


USE = """
        import torch
        from diffusers.models.embeddings import apply_rotary_emb
        from diffusers.models.normalization import RMSNorm
        from diffusers.models.transformers import transformer_flux
        from tests.tiny import flux_inputs, tiny_flux_transformer

        model = tiny_flux_transformer()
        inputs = flux_inputs(model)
        def run():
            with torch.no_grad():
                return model(**inputs, return_dict=False)[0]
        expected = run()
        migration = mindiesd.patch_all()
        assert torch.allclose(run(), expected, atol=1e-5)
        counts = {p.name: (p.redirected, p.fell_back) for p in migration.report().patches}
"""


@pytest.mark.slow
def test_modules_without_a_source() -> None:
    """As in a frozen program: what would be rewritten is the original, and counted."""
    run_python(
        """
        import importlib.machinery, importlib.util, sys, types
        import mindiesd

        def elsewhere(code):
            consts = [elsewhere(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
            return code.replace(co_filename="frozen diffusers", co_consts=tuple(consts))

        class Frozen(importlib.machinery.SourceFileLoader):
            def get_code(self, name):
                return elsewhere(super().get_code(name))
            def get_source(self, name):
                return None

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] != "diffusers":
                    return None
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                    spec.loader = Frozen(spec.loader.name, spec.loader.path)
                return spec

        sys.meta_path.insert(0, Finder())
"""
        + USE
        + """
        assert apply_rotary_emb.__wrapped__.__code__.co_filename == "frozen diffusers"
        assert counts["sdpa"][0] == 2 and counts["diffusers_rope"][0] == 4, counts
        rewritten = [p for p in migration.report().patches if "transformer_flux" in p.target]
        reasons = [reason for p in rewritten for reason in p.fell_back]
        assert any(reason.startswith("not rewritten: ") for reason in reasons), reasons
        assert not any("could not be rewritten" in reason for reason in reasons), reasons
        mindiesd.unpatch_all()
        assert torch.equal(run(), expected)
        """
    )


@pytest.mark.slow
def test_a_library_in_a_zip_file(tmp_path: Path) -> None:
    import diffusers

    folder = Path(diffusers.__file__).parent
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as file:
        for path in folder.rglob("*.py"):
            file.write(path, Path("diffusers") / path.relative_to(folder))
    run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "lib.zip")!r})
        import mindiesd
"""
        + USE
        + """
        assert "lib.zip" in transformer_flux.__file__
        assert counts["sdpa"][0] == 2 and counts["diffusers_rope"][0] == 4, counts
        rewritten = [p for p in migration.report().patches if "transformer_flux" in p.target]
        assert sum(p.redirected for p in rewritten) > 0, rewritten
        """
    )


@pytest.mark.slow
def test_nothing_is_written_unpickled_or_run_from_here(tmp_path: Path) -> None:
    """Patching, calling, verifying and reporting: no file, no pickle, no module of this directory.

    So a read-only installation is one like any other.
    """
    for name in ("wrapt", "packaging", "rich", "inspect", "json", "platform"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this must not run')")
    run_python(
        f"""
        import os, sys
        import torch, wrapt, packaging.version, inspect, json, platform
        import diffusers.models.transformers.transformer_flux
        from tests.tiny import flux_inputs, tiny_flux_transformer
        model = tiny_flux_transformer()
        inputs = flux_inputs(model)
        sys.path.remove("")  # Python's own, for -c
        sys.dont_write_bytecode = True  # the cache of compiled modules is Python's own
        os.chdir({str(tmp_path)!r})
        seen = []

        def audit(event, args):
            if event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int):
                if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    seen.append((event, args[0]))
            elif event in ("pickle.find_class", "marshal.loads", "os.mkdir", "os.rename",
                           "subprocess.Popen", "socket.connect", "shutil.rmtree"):
                if event != "marshal.loads":
                    seen.append((event, args))

        sys.addaudithook(audit)
        import mindiesd
        migration = mindiesd.patch_all(verify=1, sites=True)
        with torch.no_grad():
            model(**inputs)
        text = str(migration.report()) + migration.report().to_json()
        mindiesd.unpatch_all()
        assert "verified" in text
        assert not seen, seen
        import mindiesd.patches.report, rich
        assert not [m for m in sys.modules.values()
                    if str(getattr(m, "__file__", "")).startswith({str(tmp_path)!r})]
        """
    )


@pytest.mark.slow
def test_reload_of_the_whole_library() -> None:
    run_python(
        """
        import importlib
        import torch
        import diffusers
        from diffusers import FluxTransformer2DModel
        import mindiesd
        from tests.tiny import flux_inputs, tiny_flux_transformer

        def run(model):
            with torch.no_grad():
                return model(**flux_inputs(model), return_dict=False)[0]

        def redirected():
            return {p.name: p.redirected for p in migration.report().patches}

        model = tiny_flux_transformer()
        expected = run(model)
        migration = mindiesd.patch_all()
        assert torch.allclose(run(model), expected, atol=1e-5)
        once = redirected()
        importlib.reload(diffusers)
        assert diffusers.FluxTransformer2DModel is FluxTransformer2DModel
        run(model)
        assert redirected() == {name: 2 * count for name, count in once.items()}
        # A module of it: new classes, and new originals.
        flux = importlib.import_module("diffusers.models.transformers.transformer_flux")
        importlib.reload(flux)
        fresh = flux.FluxTransformer2DModel.from_config(model.config)
        fresh.load_state_dict(model.state_dict())
        fresh.eval()
        assert type(fresh) is not type(model)
        assert torch.allclose(run(fresh), expected, atol=1e-5)
        assert redirected() == {name: 3 * count for name, count in once.items()}
        mindiesd.unpatch_all()
        assert torch.equal(run(fresh), expected) and torch.equal(run(model), expected)
        assert redirected() == {name: 3 * count for name, count in once.items()}
        """
    )
