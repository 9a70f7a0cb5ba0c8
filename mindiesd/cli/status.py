"""``mindiesd-run --status``: a checklist of this installation, one line an item."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import mindiesd
from mindiesd.patches.engine import nothing_to_mend, to_be_provided, unavailable
from mindiesd.patches.registry import FAMILIES, Patch, records
from mindiesd.patches.report import versions

# Seconds for `import torch_npu` in a process of its own.
TIME_LIMIT = 90.0

# The current directory, which `python -c` puts first, is none of our business.
_TRY = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
import torch, torch_npu
found = {"count": torch.npu.device_count()}
def series():
    from mindiesd.ops.backends.npu import soc
    return soc.series()
for name, ask in (("name", lambda: torch.npu.get_device_name(0)), ("series", series)):
    try:
        found[name] = ask() if found["count"] else ""
    except Exception:  # a device that cannot say what it is
        found[name] = ""
print(json.dumps(found))
"""

OK, NOTE, FIX = "ok", "note", "FIX"


class Item(NamedTuple):
    """One line of the checklist.

    Attributes:
        state: ``"ok"``; ``"note"``: worth knowing, and fine if it is meant; ``"FIX"``: in the way.
        name: what was looked at.
        text: what was found and, unless it is ok, what to do.
    """

    state: str
    name: str
    text: str


def show_status() -> int:
    """Write the checklist to standard output; return 1 if an item has to be fixed, else 0."""
    items = list(_items())
    width = max(len(item.name) for item in items)
    for item in items:
        print(f"{item.state:<4}  {item.name:<{width}}  {item.text}")
    counts = Counter(item.state for item in items)
    print(f"\n{counts[OK]} ok, {counts[NOTE]} notes, {counts[FIX]} to fix")
    return 1 if counts[FIX] else 0


def _items() -> Iterator[Item]:
    found = versions()
    yield Item(OK, "mindiesd", f"{mindiesd.__version__}  {Path(mindiesd.__file__).parent}")
    yield Item(OK, "python", f"{found['python']}  {sys.executable}")
    torch, torch_npu = found["torch"], found["torch_npu"]
    if torch is None:
        yield Item(FIX, "torch", "not installed: install the one that your script needs")
    else:
        yield Item(OK, "torch", torch)
    matching = _torch_npu(torch, torch_npu)
    yield matching
    cann = _cann(os.environ)
    if torch is None or torch_npu is None:
        yield cann if cann.state == OK else cann._replace(state=NOTE)
        yield Item(NOTE, "NPU", "not looked for without torch_npu: scripts run on CPU or CUDA")
    else:
        npu = _npu(torch_npu)
        # What loads has found its CANN, however that was made known.
        yield cann._replace(state=NOTE) if npu.state != FIX and cann.state == FIX else cann
        yield npu
    yield _library(os.environ)
    if torch is not None:
        yield _sparse()
    yield _emulator(torch, torch_npu)
    for name in ("diffusers", "transformers"):
        version = found[name]
        missing = "not installed: its patches have nothing to do"
        yield Item(NOTE if version is None else OK, name, version or missing)
    for family in FAMILIES:
        yield _family(family, [record for record in records() if record.family == family])


def _torch_npu(torch: str | None, torch_npu: str | None) -> Item:
    wanted = ".".join(torch.split("+")[0].split(".")[:3]) if torch else ""
    install = f"pip install torch_npu=={wanted}" if wanted else "install torch first"
    if torch_npu is None:
        return Item(NOTE, "torch_npu", f"not installed; for an NPU, or to rehearse: {install}")
    if torch and torch_npu.split("+")[0].split(".")[:3] != wanted.split("."):
        text = f"{torch_npu} was built for another torch than {torch}: {install}"
        return Item(FIX, "torch_npu", text)
    return Item(OK, "torch_npu", torch_npu)


def _npu(torch_npu: str) -> Item:
    # torch's own loading of torch_npu would hide the reason behind a general remark.
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    # The child imports this package, wherever this process has it from.
    home = str(Path(mindiesd.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), home]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        text = f"torch_npu {torch_npu} did not load within {TIME_LIMIT:.0f} s: see whether npu-smi "
        return Item(FIX, "NPU", text + "answers")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"it ended with code {done.returncode} and said nothing"
        text = (
            f"torch_npu {torch_npu} is installed but cannot be loaded: {last}; source CANN's "
            "set_env.sh. Without CANN, use --emulate, and TORCH_DEVICE_BACKEND_AUTOLOAD=0 for "
            "plain python"
        )
        return Item(FIX, "NPU", text)
    answer = json.loads(done.stdout.splitlines()[-1])
    if not answer["count"]:
        text = "torch_npu loads and sees no device: see whether npu-smi shows one, the container "
        return Item(FIX, "NPU", text + "has it, and ASCEND_RT_VISIBLE_DEVICES names it")
    devices = "1 device" if answer["count"] == 1 else f"{answer['count']} devices"
    text = f"torch_npu {torch_npu} loads and sees {devices}"
    if answer.get("name"):
        text += f", {answer['name']}"
    if answer.get("series"):
        return Item(OK, "NPU", f"{text} (series {answer['series']})")
    text += "; its series is not known here, so attention and rotary are composed of PyTorch's "
    return Item(NOTE, "NPU", text + "operators")


def _cann(environ: Mapping[str, str]) -> Item:
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        path = environ.get(variable)
        if not path:
            continue
        if not os.path.isdir(path):
            text = f"{variable}={path}, which does not exist: source CANN's set_env.sh again"
            return Item(FIX, "CANN", text)
        return Item(OK, "CANN", f"{_cann_version(Path(path))}  {variable}={path}")
    text = "absent: ASCEND_HOME_PATH is not set; source CANN's set_env.sh, which sets it"
    return Item(FIX, "CANN", text)


def _cann_version(home: Path) -> str:
    """The version that CANN's installer noted, where torch_npu itself looks for it."""
    for pattern in ("ascend_*_install.info", "*/ascend_*_install.info"):
        for note in sorted(home.glob(pattern)):
            try:
                lines = note.read_text(errors="replace").splitlines()
            except OSError:
                continue
            for line in lines:
                if line.startswith("version="):
                    return line.partition("=")[2].strip()
    return "version not known"


def _library(environ: Mapping[str, str]) -> Item:
    variable = "MINDIESD_KERNEL_LIBRARY"
    path = environ.get(variable)
    if not path:
        text = f"none named, which is fine ({variable}=/path/lib.so would add laser attention)"
        return Item(OK, "kernel library", text)
    if not os.path.isabs(path) or not os.path.isfile(path):
        text = f"{variable}={path} is no absolute path of a file: correct it or unset it"
        return Item(FIX, "kernel library", text)
    return Item(OK, "kernel library", f"{variable}={path}")


def _sparse() -> Item:
    name = "sparse on CPU"
    from mindiesd.compiled.library import Library, LibraryUnavailable

    try:
        return Item(OK, name, f"compiled, uses {Library().instructions}")
    except LibraryUnavailable as error:
        return Item(NOTE, name, f"computed by ATen's operators, which takes longer: {error}")


def _emulator(torch: str | None, torch_npu: str | None) -> Item:
    name = "--emulate"
    if platform.system() != "Linux":
        return Item(NOTE, name, "needs Linux")
    from mindiesd.emulator import EmulatorUnavailable
    from mindiesd.emulator.runtime import compiler

    missing = [
        what for what, version in (("torch", torch), ("torch_npu", torch_npu)) if not version
    ]
    # What torch_npu imports and does not declare.
    missing += [
        module
        for module in ("yaml", "decorator", "attr", "psutil", "scipy")
        if torch_npu and importlib.util.find_spec(module) is None
    ]
    try:
        found = compiler()[0]
    except EmulatorUnavailable:
        missing.append("a C compiler")
    if missing:
        text = (
            f"cannot rehearse without {', '.join(missing)}: pip install mindiesd's extra emulator"
        )
        return Item(NOTE, name, text)
    return Item(OK, name, f"can rehearse: torch_npu {torch_npu} and {found}")


def _family(family: str, patches: list[Patch]) -> Item:
    """Whether the patches of a family fit what is installed."""
    fitting = provided = idle = 0
    by_name: list[str] = []
    refused: Counter[str] = Counter()
    absent: set[str] = set()
    for patch in patches:
        reason = unavailable(patch)
        if nothing_to_mend(patch):
            idle += 1
        elif reason:
            refused[reason] += 1
            if reason.endswith("is not installed"):
                absent.add(reason)
        else:
            provided += to_be_provided(patch)
            fitting += not to_be_provided(patch)
            by_name += [patch.name] * patch.by_name_only
    texts = []
    if fitting or not (provided or idle):
        texts.append(f"{fitting} of {len(patches) - idle} patches fit")
    if provided:
        texts.append(f"{provided} provided to the script: the package is not installed")
    if by_name:
        texts.append(f"only if named in --only: {', '.join(by_name)}")
    if idle:
        texts.append(f"{idle} not needed: the installed version lacks the fault")
    texts += [f"{count} skipped: {reason}" for reason, count in refused.most_common()]
    # A version that nobody has read is in the way; a library that is absent is not.
    if set(refused) <= absent:
        return Item(NOTE if refused else OK, family, "; ".join(texts))
    texts.append("install the versions of constraints.txt")
    return Item(NOTE if fitting or provided else FIX, family, "; ".join(texts))
