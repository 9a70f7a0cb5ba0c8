"""The part of the launcher that every Python process runs at start-up.

It imports nothing that Python has not imported already: what is imported here would be found in
``sys.modules`` by a script that has a file of that name beside it, and its time is paid by every
child process. So the engine, wrapt and the rest wait in :class:`Watch` until the program first asks
for a package that has patches, and the counts are handed over in an ``atexit`` function.

This module and ``attach`` speak of these environment variables:

* ``_MINDIESD_PYTHON``: version and prefix of the Python that mindiesd-run belongs to.
* ``_MINDIESD_SESSION``: ``pid:directory``. The first of our Pythons to start below the launcher
  (usually the launcher's own process, whose pid survives ``exec``) is the main process: it writes
  this variable and, at its end, the one report. Its children leave their counts in that directory,
  which the first of them creates. Under ``--compare`` the launcher itself is the main process.
* ``_MINDIESD_RUN``: ``unpatched`` or ``patched``, which of its two runs this is.
"""

from __future__ import annotations

import atexit
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from mindiesd.bootstrap.attach import Attached

# The packages that patch records name in `after`; a test compares the two.
WATCHED = frozenset(
    {
        "torch",
        "diffusers",
        "transformers",
        "flash_attn",
        "flash_attn_interface",
        "xformers",
        "sageattention",
    }
)


def begin() -> None:
    """Prepare this process: a watch on imports, a report at exit, and the same in its forks."""
    process = Process()
    atexit.register(process.finish)
    os.register_at_fork(after_in_child=process.forked)
    if WATCHED.isdisjoint(sys.modules):
        sys.meta_path.insert(0, Watch(process))
    else:  # a .pth file was quicker
        process.attach()


class Process:
    """This process's part in the run."""

    def __init__(self) -> None:
        """Read the environment now: the program may change it later, and its path too."""
        session = os.environ.get("_MINDIESD_SESSION", "")
        if not session:
            session = f"{os.getpid()}:{_private_name()}"
            os.environ["_MINDIESD_SESSION"] = session
        pid, _, self.session = session.partition(":")
        self.main_pid = int(pid)
        self.run = os.environ.get("_MINDIESD_RUN", "")
        self.variables = {
            name: value for name, value in os.environ.items() if name.startswith("MINDIESD_")
        }
        here = os.path.dirname(__file__)
        self.path = [entry for entry in sys.path if entry != here]
        self.attached: Attached | None = None
        self.failed = False
        self.forks = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports. Asked each time: a fork has another pid."""
        return os.getpid() == self.main_pid

    @staticmethod
    def say(text: str) -> None:
        """Write text for people. Standard output is the script's own, and stderr may be gone."""
        try:
            if sys.__stderr__ is not None:
                sys.__stderr__.write(text if text.endswith("\n") else text + "\n")
                sys.__stderr__.flush()
        except (OSError, ValueError):
            return

    def _is_on(self, name: str) -> bool:
        """Whether an option is on, for what comes before or after its value is checked."""
        text = self.variables.get(f"MINDIESD_{name}", "")
        return text.lower() in ("1", "true", "yes", "on")

    def attach(self) -> None:
        """Set the patches up. Whatever goes wrong is one line; the program runs on."""
        try:
            self.attached = _part("attach").Attached(self)
        except Exception as error:  # noqa: BLE001 - the user's program must not notice
            self.failed = True
            self.trouble("the patches could not be set up", error)

    def trouble(self, what: str, error: Exception) -> None:
        """Say what went wrong with us; with --strict, end the program."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if not self._is_on("STRICT"):
            self.say(f"mindiesd: {what}, the script runs on without them: {reason}")
            return
        self.say(f"mindiesd: {what}: {reason}")
        _exit(1)

    def forked(self) -> None:
        """In a fork: this process has made no calls of its own yet, and ends by itself."""
        self.forks += 1
        if self.attached is not None:
            self.attached.forked()
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            # A fork that multiprocessing made leaves by os._exit, past atexit. It forgets the
            # finalizers of its parent and then runs this.
            util.register_after_fork(self, Process._finish_with_multiprocessing)

    def _finish_with_multiprocessing(self) -> None:
        if self.is_main:
            return
        if self.attached is not None:
            self.attached.expect_counts()
        util = sys.modules["multiprocessing.util"]
        util.Finalize(None, self.finish, exitpriority=-1000)

    def finish(self) -> None:
        """Hand the counts in, or in the main process gather them and report."""
        try:
            if not self.is_main:
                if self.attached is not None:
                    self.attached.hand_in()
            elif self.attached is None and self._nothing_to_tell():
                if not self._is_on("QUIET") and not self.failed:
                    self.say("mindiesd: torch was never imported, nothing to patch")
            else:
                sys.path[:] = self.path
                code = _part("attach").close(self)
                if code is not None:
                    # The functions that the program registered have run: ours was the first.
                    _exit(code)
        except Exception as error:  # noqa: BLE001 - the program's exit code stands
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"mindiesd: the report could not be made: {reason}")

    def _nothing_to_tell(self) -> bool:
        to_file = self.variables.get("MINDIESD_REPORT", "").endswith(".json")
        return not to_file and not os.path.isdir(self.session)


class Watch:
    """Stands first among the finders until a watched package is asked for, then steps aside."""

    def __init__(self, process: Process) -> None:
        """Watch on behalf of `process`."""
        # A thread that asks for another watched package meanwhile must wait. _thread is built in.
        self._lock = sys.modules["_thread"].RLock()
        self._process = process

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find `name` as Python would now that the patches' import hooks are in place."""
        if name not in WATCHED:
            return None
        with self._lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._process.attach()
        # The caller's loop over the finders began before the hooks came: begin again.
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None


def _exit(code: int) -> None:
    """End the process here, with what it has written so far written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    os._exit(code)


def _private_name() -> str:
    """A directory that nobody else can have guessed; it is created when there is need."""
    asked = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for place in [*asked, "/tmp", "/var/tmp"]:
        if place and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return os.path.join(os.path.abspath(place), f"mindiesd-run-{os.urandom(16).hex()}")
    return ""


def _part(name: str) -> ModuleType:
    """A module of this package, from where this file lies and whatever sys.path says."""
    import importlib.util

    if "mindiesd" not in sys.modules:
        root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        spec = importlib.util.spec_from_file_location(
            "mindiesd", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"mindiesd is not below {root}")
        package = importlib.util.module_from_spec(spec)
        sys.modules["mindiesd"] = package
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules["mindiesd"]
            raise
    return importlib.import_module(f"mindiesd.bootstrap.{name}")
