"""The launcher's own options, read with click. They end where the command begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

import mindiesd
from mindiesd.cli.command import Refused, is_command

_EXAMPLES = """\b
Examples:
  mindiesd-run script.py --steps 20
  mindiesd-run --report=patches.json -m package.train
  mindiesd-run --skip sdpa torchrun --nproc-per-node 8 script.py

Each option may also be given as a variable: MINDIESD_ONLY, _SKIP, _NUMERICS, _VERIFY, _STRICT,
_REPORT, _SITES, _QUIET, _EMULATE, _COMPARE, _SPARSE, _DEVICE (0: --no-device). Everything from the
script on, or from -m or -c on, belongs to the command.

The exit code is the command's; 2 if it could not be run; with --strict 1 if a patch could not be
applied, and 3 if a line failed --verify."""


class _Launcher(click.Command):
    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What comes after the options; click knows nothing of it."""
        return ["[OPTIONS]", "{script.py | -m MODULE | -c CODE | COMMAND}", "[ARGUMENTS]..."]


_command = _Launcher(
    "mindiesd-run",
    help="Run a Python command with calls redirected to Ascend NPU operators, without editing it.",
    epilog=_EXAMPLES,
    context_settings={"max_content_width": 100},
    params=[
        click.Option(
            ["--only"], metavar="A,B", multiple=True, help="Apply only these patches or families."
        ),
        click.Option(
            ["--skip"], metavar="A,B", multiple=True, help="Leave these patches or families out."
        ),
        click.Option(
            ["--numerics"],
            metavar="faithful|fast",
            help="faithful (default): never less accurate than the original; fast: may round more.",
        ),
        click.Option(
            ["--verify"],
            metavar="[=N]",
            help="Judge the first N calls (1) of each calling line, and the original, by float64.",
        ),
        click.Option(
            ["--strict"],
            is_flag=True,
            help="Trouble with a patch ends the program with exit code 1; failed verification "
            "gives exit code 3.",
        ),
        click.Option(
            ["--report"],
            metavar="[=FILE.json]",
            help="At the end, write a table to stderr, or everything to a file.",
        ),
        click.Option(
            ["--sites"],
            is_flag=True,
            help="Count by calling line too, for --report; about a microsecond more at each call.",
        ),
        click.Option(
            ["--emulate"],
            is_flag=True,
            help="Give the program an NPU in host memory and count what it launches there.",
        ),
        click.Option(
            ["--compare"],
            is_flag=True,
            help="With --emulate: run the command without the patches first, then with them, and "
            "tell what each launched. Never a time.",
        ),
        click.Option(
            ["--no-device"],
            is_flag=True,
            help='Leave "cuda" alone; without this it means the NPU where CUDA is not available.',
        ),
        click.Option(
            ["--sparse"],
            metavar="rf_v2|ada_bsa[:SHARE]",
            help="Drop a share (0.75) of the key blocks in video models: an approximation.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Write no summary at the end."),
        click.Option(["--list"], is_flag=True, help="Show every patch and exit."),
        click.Option(
            ["--status"],
            is_flag=True,
            help="Check this installation, item by item, and exit: 1 if one must be fixed, else 0.",
        ),
        click.Option(["--version"], is_flag=True, help="Show the version and exit."),
        click.Option(["--help"], is_flag=True, help="Show this text and exit."),
    ],
    add_help_option=False,
)

# These take a value only after "=": the word that follows is the script. A number is none.
_BARE = {"--report": "1", "--verify": "1"}
_WITH_VALUE = ("--only", "--skip", "--numerics", "--sparse")


def read(
    arguments: list[str],
) -> tuple[dict[str, str], Callable[[], int | None] | None, list[str]]:
    """Read the options in front of the command.

    Returns:
        The text of each option that was given; what to do instead of running a command, if
        anything; the command line that is left.

    Raises:
        Refused: an option is unknown or lacks its value.
    """
    ours, rest = _split(arguments)
    try:
        with _command.make_context("mindiesd-run", ours) as context:
            values = context.params
            help_text = context.get_help()
    except click.UsageError as error:
        raise Refused(f"{error.format_message().rstrip('.')} (see mindiesd-run --help)") from None
    given: dict[str, str] = {}
    for name in ("only", "skip"):
        if values[name]:
            given[name] = ",".join(values[name])
    for name in ("numerics", "verify", "report", "sparse"):
        if values[name] is not None:
            given[name] = values[name]
    for name in ("strict", "quiet", "emulate", "compare", "sites"):
        if values[name]:
            given[name] = "1"
    if values["no_device"]:
        given["device"] = "0"
    return given, _action(values, help_text), rest


def _action(values: dict[str, Any], help_text: str) -> Callable[[], int | None] | None:
    if values["help"]:
        return lambda: click.echo(help_text)
    if values["version"]:
        return lambda: click.echo(f"mindiesd {mindiesd.__version__}")
    if values["list"]:
        from mindiesd.cli.listing import show_list

        return show_list
    if values["status"]:
        from mindiesd.cli.status import show_status

        return show_status
    return None


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our options, made unambiguous for click, and the command."""
    ours: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        if word == "--":
            at += 1
            break
        if is_command(word):
            break
        if not word.startswith("--"):
            raise Refused(
                f"no such option: {word}; an option of Python goes so: mindiesd-run python {word} …"
            )
        at += 1
        if word == "--verify" and at < len(arguments) and _is_number(arguments[at]):
            ours.append(f"{word}={arguments[at]}")
            at += 1
            continue
        ours.append(f"{word}={_BARE[word]}" if word in _BARE else word)
        if word in _WITH_VALUE and at < len(arguments):
            ours.append(arguments[at])
            at += 1
    return ours, arguments[at:]


def _is_number(word: str) -> bool:
    """Whether a word is the N of ``--verify N``; a script of that name goes before."""
    return word.isascii() and word.isdigit() and not os.path.exists(word)
