"""Plays the blocks of one page, in this process and this folder: ``python play.py PAGE.json``.

The Python blocks share their variables, as in one script; a bash block is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def main() -> None:
    """Play the blocks; the first that fails ends it, with the page's name and line."""
    with open(sys.argv[1], encoding="utf-8") as file:
        page = json.load(file)
    sys.argv = [""]
    sys.path[0] = os.getcwd()
    variables = sys.modules["__main__"].__dict__
    for name in ("main", "page"):
        variables.pop(name, None)
    for block in page["blocks"]:
        where = f"{page['path']}:{block['line']}"
        print(f"-- {where}", flush=True)
        if block["title"]:
            folder = os.path.dirname(block["title"])
            if folder:
                os.makedirs(folder, exist_ok=True)
            with open(block["title"], "w", encoding="utf-8") as file:
                file.write(block["code"])
        elif block["language"] == "python":
            # The line numbers of tracebacks are the page's.
            code = "\n" * (block["line"] - 1) + block["code"]
            exec(compile(code, page["path"], "exec", dont_inherit=True), variables)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]])
            if done.returncode:
                raise SystemExit(f"{where}: bash ended with {done.returncode}")
        sys.stdout.flush()


main()
