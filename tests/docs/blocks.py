"""Code blocks of the documents, and which of them can be run.

A comment before a fence says where its commands are run by a test: `<!-- run: WHERE -->`.

    cluster   a cluster with the image loaded and KUBECONFIG set, in the document's order, from the repository's root
    chart     Helm alone; `helm template` in place of what would install
    node      the network namespace of a node, as root, where some policies are in force
    files     nothing but the command itself
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

MARKS = ("cluster", "chart", "node", "files")
_FENCE = re.compile(r"^(\s*)```(\S*)\s*$")
_MARK = re.compile(r"^\s*<!-- run: (\S+) -->\s*$")


class Block(NamedTuple):
    """A fenced block: its language and `mark` ("" without one), its text, and the line of its fence."""

    language: str
    text: str
    mark: str
    line: int


def blocks(path: Path) -> list[Block]:
    """All of a document, in order."""
    found = []
    mark, begin, language, indent = "", 0, "", ""
    inside: list[str] | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is None and fence:
            indent, language = fence.groups()
            begin, inside = number, []
        elif inside is not None and fence and not fence[2]:
            found.append(Block(language, "".join(f"{one}\n" for one in inside), mark, begin))
            inside, mark = None, ""
        elif inside is not None:
            inside.append(line.removeprefix(indent))
        elif marked := _MARK.match(line):
            mark = marked[1]
        elif line.strip():
            mark = ""
    assert inside is None, f"{path}:{begin}: the fence is never closed"
    return found


def commands(text: str) -> list[str]:
    """The lines that are commands, joined where they go on; of a transcript those behind a prompt, without it."""
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed or [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
