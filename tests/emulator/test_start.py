"""Starting the device: when, where, and what is said when it cannot be had."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest

from mindiesd.emulator import EmulatorUnavailable, device, environment, is_started, runtime, start


def run(code, **variables):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASCEND")}
    clean.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    clean.update(OMP_NUM_THREADS="1", **variables)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=300
    )


def test_before_torch_and_nothing_heavy_at_import():
    done = run(
        "import sys, mindiesd.emulator as e\n"
        "assert 'torch' not in sys.modules\n"
        "e.start(); e.start()\n"
        "import torch\n"
        "assert torch.ones(2, device='npu').sum().item() == 2\n"
        "import os; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_in_children_with_environment_and_as_another_soc():
    done = run(
        "import torch, mindiesd.emulator as e\n"
        "e.start()\n"
        "import torch_npu\n"
        "print(torch.npu.get_device_name(0))\n"
        "q = torch.zeros(1, 1, 8, 16, device='npu', dtype=torch.float16)\n"
        "for call in (lambda: torch_npu.npu_fusion_attention(q, q, q, 1, 'BNSD'),\n"
        "             lambda: torch_npu.npu_rms_norm(q, torch.ones(16, device='npu')),\n"
        "             lambda: torch_npu.npu_rotary_mul(q, q, q, 'interleave')):\n"
        "    try: call(); print('no')\n"
        "    except RuntimeError: print('refused')\n"
        "args = dict(num_heads=1, input_layout='BNSD')\n"
        "print(torch_npu.npu_prompt_flash_attention(q, q, q, **args).shape[2])",
        **environment(),
        MINDIESD_EMULATOR_SOC="Ascend310P3",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Ascend310P3", "refused", "refused", "refused", "8"]


def test_no_pfa_on_950():
    done = run(
        "import mindiesd.emulator as e; e.start('Ascend950PR_9599')\n"
        "import torch, torch_npu\n"
        "q = torch.zeros(1, 1, 8, 16, device='npu', dtype=torch.float16)\n"
        "try: torch_npu.npu_prompt_flash_attention(q, q, q, num_heads=1, input_layout='BNSD')\n"
        "except RuntimeError as error: print('no longer supported' in str(error))"
    )
    assert done.stdout.strip() == "True", done.stderr


def test_too_late_after_another_runtime():
    done = run(
        "import sys, types; sys.modules['torch_npu'] = types.ModuleType('torch_npu')\n"
        "import mindiesd.emulator as e\n"
        "try: e.start()\n"
        "except e.EmulatorUnavailable as error: print(error)"
    )
    assert "before torch_npu is imported" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_again_and_from_threads():
    assert is_started()
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_started()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(EmulatorUnavailable, match="needs a C compiler") as caught:
        runtime.build()
    assert "\n" not in str(caught.value)


def test_broken_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(EmulatorUnavailable, match="could not compile") as caught:
        runtime.build()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "mindiesd" / "emulator").iterdir()) == []


def test_versions(monkeypatch):
    monkeypatch.setattr(
        device.metadata, "version", lambda name: {"torch": "2.13.0+cpu"}.get(name, "2.7.1.post2")
    )
    with pytest.raises(EmulatorUnavailable, match=r"torch_npu==2\.13\.0"):
        device._check_versions()
    monkeypatch.setattr(device.util, "find_spec", lambda name: None if name == "torch_npu" else 1)
    with pytest.raises(EmulatorUnavailable, match="torch_npu wheel, which is not installed"):
        device._check_versions()


def test_cache_is_private_and_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = runtime.build()
    assert tmp_path in home.parents
    for folder in (home, home.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = (home / runtime.REAL).stat().st_mtime_ns
    assert runtime.build() == home
    assert (home / runtime.REAL).stat().st_mtime_ns == before
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def _refused(folder):
    with pytest.raises(EmulatorUnavailable, match="XDG_CACHE_HOME") as caught:
        runtime.build()
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cache_that_others_can_write_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mindiesd"
    folder.mkdir()
    folder.chmod(0o777)
    _refused(folder)
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    assert runtime._cache_root() == folder / "emulator"


def test_cache_of_somebody_else_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime._cache_root()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    _refused(tmp_path)


def test_cache_behind_a_link_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mindiesd").mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "mindiesd" / "emulator").symlink_to(tmp_path / "elsewhere")
    _refused(tmp_path / "mindiesd" / "emulator")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _refused(tmp_path / "file")


def test_cache_is_open_to_its_owner_alone_even_if_it_was_not(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = runtime._cache_root()
    root.chmod(0o755)
    assert runtime._cache_root() == root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_folder_is_filled_before_it_gets_its_name(monkeypatch, tmp_path):
    """Two processes at once: neither ever sees half of it, and both end up with the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_into = runtime._compile_into

    def slower(folder, compiler):
        assert folder.name.startswith("building-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        compile_into(folder, compiler)
        monkeypatch.setattr(runtime, "_compile_into", compile_into)
        runtime.build()  # another process, faster

    monkeypatch.setattr(runtime, "_compile_into", slower)
    home = runtime.build()
    assert [path.name for path in home.parent.iterdir()] == [home.name]
    assert {path.name for path in home.iterdir()} == {
        runtime.REAL,
        *runtime.EMPTY,
        *runtime.FOLDERS,
    }
