"""Which program a command line means: what to ``exec`` for its first word."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

# What Python runs as a script by the name alone, executable or not.
_SUFFIXES = (".py", ".pyw", ".pyc", ".pyz")


class Refused(Exception):
    """The command cannot be run, or could not be patched. One line, with what to do about it."""


class Command(NamedTuple):
    """A program and its arguments, the first of them its own name, as ``exec`` wants them."""

    executable: str
    arguments: list[str]


def is_command(word: str) -> bool:
    """Whether this word begins the command; otherwise it is one of the launcher's options."""
    return not word.startswith("-") or word == "-" or word.startswith(("-m", "-c"))


def resolve(words: list[str]) -> Command:
    """Find the program for a command line.

    Args:
        words: the command line without the launcher's options. A first word ``-m`` or ``-c``, or a
            script in whatever form Python runs it, is run by this Python; a command is run as is.

    Raises:
        Refused: there is no such script or command, it cannot be executed, or it would start
            Python in a way that ignores PYTHONPATH.
    """
    if not words:
        raise Refused("nothing to run; give a script, -m module, -c code or a command (see --help)")
    word = words[0]
    if word.startswith(("-m", "-c")):
        if len(words) == 1 and len(word) == 2:
            what = "the name of a module" if word == "-m" else "code"
            raise Refused(f"{word} needs {what} after it")
        return _with_python(words)
    if word == "-":
        return _with_python(words)
    if not word:
        raise Refused("the name of the script is empty")
    if os.path.isdir(word):
        if any(os.path.exists(os.path.join(word, f"__main__{s}")) for s in (".py", ".pyc")):
            return _with_python(words)
        if os.sep in word:
            raise Refused(f"{word}: is a directory without __main__.py; name a script in it")
    elif os.path.exists(word):
        return _file(words)
    elif os.sep in word:
        raise Refused(f"{word}: no such file; check the path (seen from {os.getcwd()})")
    return _on_path(words)


def _with_python(words: list[str]) -> Command:
    if not sys.executable:
        raise Refused(
            "this Python does not know its own path; give it: mindiesd-run /path/python …"
        )
    return Command(sys.executable, [sys.executable, *words])


def _file(words: list[str]) -> Command:
    path = words[0]
    if path.endswith(_SUFFIXES):
        return _with_python(words)
    foreign, _ = _first_line(path)
    if not foreign:
        return _with_python(words)
    if not os.access(path, os.X_OK):
        raise Refused(
            f"{path}: not a Python script and not executable; chmod +x it if it is a program"
        )
    return _program(path, words)


def _on_path(words: list[str]) -> Command:
    from shutil import which

    found = which(words[0])
    if found is None:
        raise Refused(
            f"{words[0]}: neither a file here nor a command on PATH; "
            "check the spelling and the current directory"
        )
    return _program(found, words)


def _program(path: str, words: list[str]) -> Command:
    if os.path.basename(path) == "opentelemetry-instrument":
        raise Refused(
            "opentelemetry-instrument would hide the launcher's start-up code from Python; "
            "write them the other way round: opentelemetry-instrument mindiesd-run …"
        )
    _, interpreter = _first_line(path)
    if interpreter and _is_python(interpreter[0]):
        _refuse_isolated(interpreter[0], interpreter[1:])
    if _is_python(path):
        _refuse_isolated(words[0], words[1:])
    return Command(path, words)


def _first_line(path: str) -> tuple[bool, list[str]]:
    """Whether a file is a program of another kind than Python, and its #! line as words."""
    try:
        if not os.path.isfile(path):  # a pipe: reading it here would take it from Python
            return False, []
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return False, []
    if start.startswith(b"\x7fELF"):
        return True, []
    if not start.startswith(b"#!"):
        return False, []
    line = os.fsdecode(start[2:].split(b"\n", 1)[0]).split()
    if line and os.path.basename(line[0]) == "env":
        line = [word for word in line[1:] if word != "-S" and "=" not in word]
    return not (line and _is_python(line[0])), line


def _is_python(path: str) -> bool:
    return os.path.basename(path).rstrip("0123456789.t") in ("python", "pypy")


def _refuse_isolated(name: str, arguments: list[str]) -> None:
    """Refuse -I, -E and -S: with them Python never reads PYTHONPATH or sitecustomize."""
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-") or word in ("-", "--"):
            return
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(rest, None)
            continue
        for position, letter in enumerate(word[1:], 2):
            if letter in "cm":
                return
            if letter in "WX":
                if position == len(word):
                    next(rest, None)
                break
            if letter in "IES":
                raise Refused(
                    f"{name} -{letter} ignores PYTHONPATH or site, so nothing could be patched; "
                    f"leave -{letter} out"
                )
