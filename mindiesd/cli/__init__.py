"""``mindiesd-run``: runs any Python command with the patches in force, in it and in its children.

It looks at the command line, prepares the environment and then *becomes* the command by ``exec``:
process id, signals, exit code, standard streams and tracebacks are the command's own. What happens
in the Python processes below is in :mod:`mindiesd.bootstrap`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from mindiesd.bootstrap.settings import Settings
from mindiesd.cli.command import Command, Refused, is_command, resolve
from mindiesd.errors import ParametersInvalid


def main() -> int:
    """Entry point of ``mindiesd-run``; returns only where it does not become the command."""
    try:
        return _run(sys.argv[1:])
    except (Refused, ParametersInvalid) as problem:
        sys.stderr.write(f"mindiesd-run: {' '.join(str(problem).split())}\n")
        return 2


def _run(arguments: list[str]) -> int:
    given: dict[str, str] = {}
    # Reading the options costs click's import; most command lines have none.
    if arguments and arguments[0].startswith("-") and not is_command(arguments[0]):
        from mindiesd.cli.options import read

        given, action, arguments = read(arguments)
        if action is not None:
            # `mindiesd-run --list | head` ends quietly, like other commands.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            return action() or 0
    settings = Settings.read(os.environ, given)
    _check(settings, given)
    command = resolve(arguments)
    if settings.compare:
        from mindiesd.cli.compare import compare

        return compare(command, settings)
    _become(command, environment(settings))


def _check(settings: Settings, given: dict[str, str]) -> None:
    """Refuse what the patches would refuse later, in the middle of the program's imports."""
    if settings.for_patch_all() != Settings(strict=settings.strict).for_patch_all():
        from mindiesd.patches.migration import Options

        try:
            Options(**settings.for_patch_all())
        except ParametersInvalid as problem:
            name = problem.argument.partition(".")[0]
            label = f"--{name}" if name in given else f"MINDIESD_{name.upper()}"
            raise ParametersInvalid(label, problem.received, problem.allowed) from None
    if settings.compare:
        label = "--compare" if "compare" in given else "MINDIESD_COMPARE"
        if not settings.emulate:
            raise Refused(f"{label} counts what an emulated NPU launches; add --emulate")
        if settings.verify:
            raise Refused(f"{label} would count the launches of --verify too; leave one out")
    if settings.report not in ("", "1"):
        folder = os.path.dirname(settings.report)
        label = "--report" if "report" in given else "MINDIESD_REPORT"
        if not os.path.isdir(folder):
            raise Refused(f"{label}: there is no directory {folder}; create it first")
        if not os.access(folder, os.W_OK):
            raise Refused(f"{label}: the directory {folder} is not writable; name another one")


def environment(settings: Settings) -> dict[str, str]:
    """The environment of the command: the options, and our bootstrap directory found first."""
    bootstrap = os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bootstrap", "path"
    )
    if os.pathsep in bootstrap:
        raise Refused(
            f"PYTHONPATH cannot hold {bootstrap}; install mindiesd in a path without {os.pathsep}"
        )
    ours = {f"MINDIESD_{name.upper()}" for name in Settings._fields}
    # A launcher below one that compares belongs to its run.
    kept = {"_MINDIESD_RUN", "_MINDIESD_SESSION"} if "_MINDIESD_RUN" in os.environ else set()
    env = {
        name: value
        for name, value in os.environ.items()
        if name in kept or (name not in ours and not name.startswith("_MINDIESD_"))
    }
    env.update(settings.variables())
    if settings.emulate:
        from mindiesd.emulator import EmulatorUnavailable
        from mindiesd.emulator import environment as emulated

        try:
            env.update(emulated())
        except EmulatorUnavailable as problem:
            raise Refused(f"--emulate: {problem}") from problem
    major, minor = sys.version_info[:2]
    env["_MINDIESD_PYTHON"] = f"{major}.{minor}:{os.path.realpath(sys.prefix)}"
    # An empty part of PYTHONPATH would mean the current directory.
    own = env.get("PYTHONPATH", "")
    users = [part for part in own.split(os.pathsep) if part != bootstrap] if own else []
    env["PYTHONPATH"] = os.pathsep.join([bootstrap, *users])
    return env


def _become(command: Command, env: dict[str, str]) -> NoReturn:
    # Python ignores these two signals, and ignored signals stay ignored across exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execve(command.executable, command.arguments, env)
    except OSError as error:
        raise Refused(f"cannot run {command.executable}: {error.strerror}") from error
