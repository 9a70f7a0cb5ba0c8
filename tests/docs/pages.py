"""A page of the documentation as the blocks that can be run in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))

# What a page says of itself, where that is to be seen by readers of the source.
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_CLONE = "<!-- runs in: a copy of the repository -->"


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        language: the first word behind the fence.
        title: the file that it is to be written to; empty: it is run.
        code: its text.
        line: the number of its first line of code in the page, from 1.
        excuse: why it is not run; empty: it is.
    """

    language: str
    title: str
    code: str
    line: int
    excuse: str


class Page(NamedTuple):
    """One page.

    Attributes:
        path: its file.
        blocks: its fenced blocks, in order.
        in_clone: whether it is to be run in a copy of the repository.
        code: the texts of its inline code.
        links: the targets of its links.
    """

    path: Path
    blocks: list[Block]
    in_clone: bool
    code: list[str]
    links: list[str]


def read(path: Path) -> Page:
    """Read a page, as a Markdown parser sees it."""
    text = path.read_text(encoding="utf-8")
    blocks, code, links = [], [], []
    excuse = ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.fullmatch(r'title="([^"]+)"', rest.strip())
            assert title or not rest, f"{path}: {token.info!r} is not understood"
            line = token.map[0] + 2
            blocks.append(Block(language, title[1] if title else "", token.content, line, excuse))
        for child in token.children or ():
            if child.type == "code_inline":
                code.append(child.content)
            elif child.type == "link_open":
                links.append(str(child.attrs["href"]))
        found = _NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        excuse = found[1] if found else ""
    return Page(path, blocks, _CLONE in text, code, links)
