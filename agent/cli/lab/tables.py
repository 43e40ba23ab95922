"""A matrix on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from agent.lab.matrix import Answer, Cell, table

OPEN, SHUT, HALF = "✓", "·", "½"
LEGEND = f"{OPEN} reaches  {SHUT} does not  {HALF} in one of IPv4 and IPv6  ! packets and policies differ"
OPENED, CLOSED = "+", "-"
CHANGES = f"{OPENED} reaches since this step  {CLOSED} no longer does"


def matrix_lines(answers: Sequence[Answer], before: Sequence[Answer] = ()) -> Iterator[str]:
    """The table: sources down, destinations across under a letter each. The letters' meaning is left out where
    `before` had the same; cells that were otherwise then are marked."""
    rows, columns, cells = table(answers)
    _, known, old = table(before)
    width = max((len(row) for row in rows), default=0)
    letters = [_letter(index) for index in range(len(columns))]
    if columns != known:
        for index, (letter, column) in enumerate(zip(letters, columns)):
            yield (
                " " * (width + 4)
                + "│ " * index
                + f"{letter} "
                + "──" * (len(columns) - index - 1)
                + f"─ {_port_name(*column)}"
            )
    else:
        yield " " * (width + 4) + " ".join(letters)
    for row in rows:
        parts = [_cell(cells.get((row, column)), old, (row, column)) for column in columns]
        yield f"  {row.ljust(width)}  {''.join(parts)}".rstrip()


def _letter(index: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[index % len(letters)]


def _port_name(destination: str, protocol: str, port: int) -> str:
    if protocol == "ICMP":
        return f"{destination} ping"
    return f"{destination}:{port}" + ("" if protocol == "TCP" else f"/{protocol}")


def _cell(cell: Cell | None, old: Mapping[Any, Cell], key: Any) -> str:
    if cell is None:
        return "  "
    mark = {True: OPEN, False: SHUT, None: HALF}[cell.reached]
    changed = key in old and old[key].reached != cell.reached
    if changed:
        mark = {True: OPENED, False: CLOSED, None: HALF}[cell.reached]
    colour = {True: "green", False: "red", None: "yellow"}[cell.reached]
    if cell.mismatch:
        return click.style(f"{mark}!", fg="magenta", bold=True, reverse=True)
    return click.style(mark, fg=colour, bold=changed) + " "
