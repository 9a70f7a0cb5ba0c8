"""The part of the launcher that is loaded once the program imports torch, and at its end."""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from mindiesd.bootstrap.settings import Settings
from mindiesd.patches import Migration, patch_all
from mindiesd.patches.device import DEVICE
from mindiesd.patches.process import current_migration
from mindiesd.patches.report import Report, render, versions

if TYPE_CHECKING:
    from mindiesd.bootstrap.path._mindiesd_start import Process

OWN_PATCHES = "the script calls patch_all() itself, so it was patched without the launcher too"


class Attached:
    """The patches of this process, and the file in which it hands its counts in."""

    def __init__(self, me: Process) -> None:
        """Set the patches up; nothing of torch is imported.

        Raises:
            ParametersInvalid: a ``MINDIESD_`` variable is not allowed.
            PatchError: a patch that was asked for by name, or any under ``strict``, does not fit.
        """
        self._me = me
        settings = Settings.read(me.variables)
        self.trace: Any = None
        if settings.emulate:
            from mindiesd.emulator import prepare

            prepare()
            # Registered before the patches' own hook: they find the device there.
            wrapt.register_post_import_hook(lambda _: self._emulate(), "torch")
        self._options = settings.for_patch_all()
        self._migration: Migration | None = None
        if me.run != "unpatched":
            # A script that called patch_all before it imported torch has decided.
            self._migration = current_migration() or patch_all(**self._options)
        elif settings.device:
            DEVICE.acquire()  # what the program calls its device is no matter of patches
        self._ticket = _ticket()
        wrapt.register_post_import_hook(lambda _: self.expect_counts(), "torch")

    def _emulate(self) -> None:
        try:
            from mindiesd import emulator

            emulator.start()
            # Until the process ends: the report shows it.
            self.trace = emulator.Trace()
            emulator.listen(self.trace)
            if self._me.run:
                _seed()
        except Exception as error:  # noqa: BLE001 - the user's import must not fail
            self._me.trouble("the emulated NPU could not be started", error)

    def report(self) -> Report:
        """What became of this process's calls."""
        # A script may itself call patch_all with other options: the last call decides.
        migration = current_migration() or self._migration
        if migration is None or self._me.run == "unpatched":
            report = Report(patches=[], options=self._options, versions=versions())
            report.torch_imported = "torch" in sys.modules
            if migration is not None:
                report.notes.append(OWN_PATCHES)
            if self._options["device"] and DEVICE.note:
                report.notes.append(DEVICE.note)
        else:
            report = replace(migration.report())
        if self.trace is not None:
            report.trace = self.trace.to_dict()
        return report

    def forked(self) -> None:
        """Forget the parent's counts: it reports them itself."""
        self._ticket = _ticket()
        if self.trace is not None:
            self.trace.forget()
        for migration in (self._migration, current_migration()):
            if migration is not None:
                migration.forget_counts()

    def expect_counts(self) -> None:
        """Leave word that this process, which has torch, will hand in counts.

        A process that is killed hands nothing in, and the report must be able to say so.
        """
        if not self._me.is_main and "torch" in sys.modules:
            self._leave("open", "")

    def hand_in(self) -> None:
        """Leave this process's counts for the main process."""
        if "torch" in sys.modules and self._leave("part", self.report().to_json()):
            folder = self._me.session
            os.replace(f"{folder}/{self._ticket}.part", f"{folder}/{self._ticket}.json")
            Path(folder, f"{self._ticket}.open").unlink(missing_ok=True)

    def _leave(self, suffix: str, text: str) -> bool:
        try:
            os.kill(self._me.main_pid, 0)  # nobody collects, or removes, what comes after its end
            try:
                os.mkdir(self._me.session, 0o700)
            except FileExistsError:
                if not _is_private(self._me.session):
                    return False
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            file = os.open(f"{self._me.session}/{self._ticket}.{suffix}", flags, 0o600)
            with open(file, "w", encoding="utf-8") as out:
                out.write(text)
        except OSError:
            return False
        return True


def _seed() -> None:
    """Let two runs that are compared draw the same numbers; the program may seed them otherwise."""
    import random

    import torch

    torch.manual_seed(0)
    random.seed(0)
    wrapt.register_post_import_hook(lambda numpy: numpy.random.seed(0), "numpy")


FAILED = 3
"""The exit code with ``--strict`` where a calling line failed verification."""


def close(me: Process) -> int | None:
    """In the main process, at its end: the one report.

    Returns:
        The exit code where it is not to be the program's own.
    """
    reports, missing = collect(me.session)
    settings = Settings.read(me.variables)
    if me.attached is not None and "torch" in sys.modules:
        reports.insert(0, me.attached.report())
    if not reports and not me.failed:
        if me.attached is None:
            me.attach()
        if me.attached is not None:
            reports.append(me.attached.report())
    if not reports:
        return None
    report = Report.merged(reports)
    note = missed(missing)
    if note:
        report.notes.append(note)
        report.torch_imported = True
    for line in save(report, settings.report):
        me.say(line)
    if not settings.quiet:
        me.say(shown(report, settings.report, note))
        if report.trace is not None:
            from mindiesd.emulator.counts import Counts

            text = str(Counts.from_dict(report.trace))
            whole = settings.report == "1"
            me.say(f"emulated NPU: {text if whole else text.splitlines()[0]}")
    return FAILED if settings.strict and report.failed_verification else None


def shown(report: Report, wanted: str, note: str) -> str:
    """The report for the terminal: the table if it is wanted, else one line."""
    if wanted == "1" and report.torch_imported:
        return _as_fits(report)
    return "; ".join(filter(None, [report.summary(), note]))


def _as_fits(report: Report) -> str:
    """The table as stderr can show it: coloured on a terminal, without signs it has no code for."""
    stream = sys.__stderr__
    color, width = False, None
    if stream is not None and stream.isatty():
        color = not os.environ.get("NO_COLOR")
        with suppress(OSError, ValueError):
            width = os.get_terminal_size(stream.fileno()).columns or None
    text = render(report, width, color)
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)
    return text


_PLAIN = str.maketrans({"→": "->", "×": "x", "─": "-", "…": "...", "·": ".", "²": "2", "≤": "<="})


def missed(number: int) -> str:
    """What to say of processes that announced counts and never handed them in."""
    return f"{number} more handed in no counts (killed, or still running)" if number else ""


def save(report: Report, path: str) -> list[str]:
    """Write the report's file, if ``path`` is one; what went wrong, in lines for people."""
    if path in ("", "1"):
        return []
    try:
        _write(path, report.to_json())
    except OSError as error:
        return [f"mindiesd: cannot write {path}: {error.strerror}"]
    return []


def collect(folder: str) -> tuple[list[Report], int]:
    """The counts that children left, and how many announced theirs in vain. Removes the folder."""
    reports: list[Report] = []
    missing = 0
    if not _is_private(folder):
        return reports, missing
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".json":
            try:
                reports.append(Report.from_dict(json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError, LookupError):
                missing += 1
        elif path.suffix == ".open":
            missing += 1
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a child that is still running may just have left something
        os.rmdir(folder)
    return reports, missing


def _is_private(folder: str) -> bool:
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    private = not stat.S_IMODE(found.st_mode) & 0o077
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and private


def _ticket() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def _write(path: str, text: str) -> None:
    """Replace the file at once, so that nobody ever reads half of it."""
    part = f"{path}.{_ticket()}.part"
    try:
        # In a directory that others can write to, they cannot have put a link there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(part, flags, 0o666), "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(part, path)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
