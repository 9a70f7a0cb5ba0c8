"""The stand-in CANN runtime: compiled once from ``cann.c``, cached, and loaded under CANN's names.

The libraries lie in a folder that only this user can write (mode 0700, ownership checked) and whose
name is a hash of everything that went into them. A folder is filled under another name and then
renamed, so that no process ever sees half of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from mindiesd.emulator.errors import EmulatorUnavailable

SOURCE = Path(__file__).with_name("cann.c")

# The library that holds the runtime, and those that torch_npu's libraries only name as needed
# (``readelf -d libtorch_npu.so libtensorpipe.so``). libruntime.so is looked up with dlopen.
REAL = "libascendcl.so"
EMPTY = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)

# Folders that torch_npu expects under ASCEND_HOME_PATH.
FOLDERS = ("opp", "runtime", "compiler")

_FLAGS = ("-O1", "-shared", "-fPIC")
_keep: list[ctypes.CDLL] = []


def compiler() -> list[str]:
    """The machine's C compiler: ``$CC``, else the first of cc, gcc, clang."""
    asked = os.environ.get("CC")
    if asked:
        words = shlex.split(asked)
        if words and shutil.which(words[0]):
            return words
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    raise EmulatorUnavailable(
        "the emulated NPU needs a C compiler (cc, gcc or clang on PATH, or $CC) and there is none"
    )


def _is_private(folder: Path) -> bool:
    """Whether ``folder`` is a real folder that belongs to this user and that only they can open."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and stat.S_IMODE(status.st_mode) & 0o077 == 0
    )


def _cache_root() -> Path:
    """This user's private folder for compiled files, made if it is not there.

    Raises:
        EmulatorUnavailable: it cannot be made, or others could put files of theirs in.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    # A relative XDG_CACHE_HOME is to be ignored (XDG base directory specification).
    parent = Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()
    root = parent / "mindiesd" / "emulator"
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.parent.lstat()
        # Whoever can write the folder above could swap ours for theirs.
        if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.geteuid() or owner.st_mode & 0o022:
            raise _no_cache(root.parent, "others can write to it, or it is not yours")
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink() or root.lstat().st_uid != os.geteuid():
            raise _no_cache(root, "it is a link, or not yours")
        root.chmod(0o700)
    except (OSError, RuntimeError) as error:
        if isinstance(error, EmulatorUnavailable):
            raise
        raise _no_cache(root, getattr(error, "strerror", None) or str(error)) from None
    if not _is_private(root) or not os.access(root, os.W_OK):
        raise _no_cache(root, "it is not private and writable")
    return root


def _no_cache(folder: Path, why: str) -> EmulatorUnavailable:
    return EmulatorUnavailable(
        "the emulated NPU needs a private folder for what it compiles, and "
        f"{folder} cannot be used: {why}; set XDG_CACHE_HOME to a folder of your own"
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmulatorUnavailable(
            f"the C compiler {command[0]} could not be run: {error}"
        ) from None
    if done.returncode:
        lines = (done.stderr.strip() or "no message").splitlines()
        shown = next((line for line in lines if "error" in line), lines[0])
        raise EmulatorUnavailable(
            f"the C compiler {command[0]} could not compile {SOURCE.name}: {shown}"
        )


def _compile_into(folder: Path, command: list[str]) -> None:
    real = folder / REAL
    _run(
        [*command, *_FLAGS, f"-Wl,-soname,{REAL}", "-o", str(real), str(SOURCE), "-lm"],
    )
    for name in EMPTY:
        # They name the real one as needed: torch_npu looks symbols up through any of the handles.
        target = folder / name
        linked = ["-Wl,--no-as-needed", str(real)]
        soname = f"-Wl,-soname,{name}"
        _run(
            [
                *command,
                *_FLAGS,
                "-DMINDIESD_EMPTY",
                soname,
                "-o",
                str(target),
                str(SOURCE),
                *linked,
            ]
        )
    for name in FOLDERS:
        (folder / name).mkdir(mode=0o700)


def build() -> Path:
    """The folder with the compiled libraries, compiling them if this user has not done so yet."""
    if platform.system() != "Linux":
        raise EmulatorUnavailable(
            f"the emulated NPU needs Linux: torch_npu has no wheel for {platform.system()}"
        )
    command = compiler()
    words = [SOURCE.read_text("utf-8"), Path(__file__).read_text("utf-8")]
    words += [platform.machine(), *command]
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
    root = _cache_root()
    home = root / name
    if _is_private(home):
        return home
    building = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    try:
        _compile_into(building, command)
        try:
            building.rename(home)
        except OSError:
            # Another process was faster; what lies there now was renamed there whole.
            if not _is_private(home):
                raise
    except OSError as error:
        raise EmulatorUnavailable(f"the emulated NPU could not be cached: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return home


def load(home: Path) -> None:
    """Load the libraries for the whole process, so that torch_npu's find them by their sonames."""
    for name in (REAL, *EMPTY):
        try:
            _keep.append(ctypes.CDLL(str(home / name), mode=ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise EmulatorUnavailable(f"the emulated NPU could not be loaded: {error}") from None


def reserve_only(on: bool) -> None:
    """Let the device's memory be larger than the host's, as long as most of it is never written.

    Raises:
        EmulatorUnavailable: the emulated NPU has not been started.
    """
    if not _keep:
        raise EmulatorUnavailable("call mindiesd.emulator.start() first")
    _keep[0].mindiesdReserveOnly(int(on))
