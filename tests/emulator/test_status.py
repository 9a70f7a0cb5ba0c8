"""``mindiesd-run --status`` where there is an NPU, the emulated one."""

from __future__ import annotations

import re

from tests.emulator.test_run import run


def test_the_device_is_examined() -> None:
    done = run("--emulate", "--quiet", "-m", "mindiesd.cli", "--status")
    assert done.returncode == 0, done.stdout + done.stderr
    items = dict(
        re.fullmatch(r"(?:ok|note|FIX) +(\S+(?: \S+)*?)  +(.+)", line).groups()
        for line in done.stdout.split("\n\n")[0].splitlines()
    )
    assert re.fullmatch(r"torch_npu \S+ loads and sees 1 device, .+ \(series A2\)", items["NPU"])
    assert "ASCEND_HOME_PATH=" in items["CANN"]
    assert items["--emulate"].startswith("can rehearse")
