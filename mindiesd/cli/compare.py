"""``mindiesd-run --emulate --compare``: the command twice, without and with the patches.

Both runs see the same arguments, standard input, directory, environment and seeds (of hashes,
torch, numpy and random; the last three are set when torch is imported), and each has an emulated
NPU of its own. A terminal cannot be read twice: the runs find an empty standard input there.

The run with the patches comes second and is the one that counts for everything else: its standard
output is shown, the files it writes are what remains, and the exit code is its own unless only the
other run failed. Every process of this Python that the command starts is counted: subprocesses,
forks, the workers of torchrun.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from mindiesd.bootstrap.attach import collect, missed, save, shown
from mindiesd.bootstrap.settings import Settings
from mindiesd.cli.command import Command, Refused
from mindiesd.cli.comparison import Outcome, compared, table
from mindiesd.cli.stdin import Stdin
from mindiesd.patches.report import Report, versions

# Sent to the launcher, these are meant for the command. The terminal's interrupt reaches both.
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def compare(command: Command, settings: Settings) -> int:
    """Run the command without and with the patches, and tell the difference.

    Returns:
        The exit code for the launcher, which dies of the signal that a run died of instead.
    """
    runs = _Runs(command, settings)
    try:
        without = runs.run("unpatched")
        patched = None if _interrupted(without.code) else runs.run("patched")
    finally:
        runs.clean()
    if patched is None:
        return _end(without.code)
    report = patched.report
    report.compare = compared(without, patched)
    lines = save(report, settings.report)
    if not settings.quiet:
        lines.append(shown(report, settings.report, ""))
        lines.append(table(report))
    for line in lines:
        _say(line)
    return _end(patched.code or without.code)


class _Runs:
    """Runs the command; what its processes count is handed in to this one."""

    def __init__(self, command: Command, settings: Settings) -> None:
        from mindiesd.cli import environment

        self._command = command
        self._settings = settings
        self._stdin = Stdin()
        # The children have nothing to say: the launcher reports for them.
        self._env = environment(settings._replace(compare=False, report="", quiet=True))
        # Whether sets are walked in the same order should not depend on chance.
        self._env.setdefault("PYTHONHASHSEED", "0")
        self._folder = tempfile.mkdtemp(prefix="mindiesd-run-")  # mode 0700

    def run(self, which: str) -> Outcome:
        """Run the command once, ``"unpatched"`` or ``"patched"``."""
        first = which == "unpatched"
        if not self._settings.quiet:
            _say(
                "mindiesd: first without the patches; its standard output is not shown"
                if first
                else "mindiesd: now with the patches"
            )
        session = os.path.join(self._folder, which)
        env = {
            **self._env,
            "_MINDIESD_RUN": which,
            "_MINDIESD_SESSION": f"{os.getpid()}:{session}",
        }
        with self._stdin.again() as stdin:
            try:
                process = subprocess.Popen(
                    self._command.arguments,
                    executable=self._command.executable,
                    env=env,
                    stdin=stdin,
                    stdout=subprocess.DEVNULL if first else None,
                )
            except OSError as error:
                raise Refused(f"cannot run {self._command.executable}: {error.strerror}") from error
            with _passing_signals_to(process):
                code = process.wait()
        reports, missing = collect(session)
        if reports:
            report = Report.merged(reports)
        else:
            options = self._settings.for_patch_all()
            report = Report(
                patches=[], options=options, versions=versions(), processes=0, torch_imported=False
            )
        if missing:
            report.notes.append(missed(missing))
            report.torch_imported = True
        return Outcome(code, report, missing)

    def clean(self) -> None:
        """Remove what the runs handed in."""
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _passing_signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def ignore(number: int, frame: object) -> None:
        """Wait for what the command makes of it."""

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    for number in (signal.SIGINT, signal.SIGQUIT):
        before[number] = signal.signal(number, ignore)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(code: int) -> bool:
    return -code in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _end(code: int) -> int:
    """The exit code; for a run that died of a signal, the same death."""
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):  # nobody else can handle these
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        return 128 - code  # a signal that does not end a process
    return code


def _say(text: str) -> None:
    try:
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
