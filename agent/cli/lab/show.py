"""What is found in a lab, as text or JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from agent.cli.lab.tables import LEGEND, matrix_lines
from agent.cli.output import MatrixResult, print_json
from agent.lab.lab import Enforced
from agent.lab.matrix import Answer, mismatches


def print_answer(answer: Answer) -> None:
    """One probe, in one line."""
    port = "ping" if answer.protocol == "ICMP" else f"{answer.port}/{answer.protocol}"
    found = "reaches" if answer.reached else "does not reach"
    who = f" (answered by {answer.who})" if answer.who and answer.who != answer.destination else ""
    line = f"{answer.source} {found} {answer.destination} {answer.address} {port}{who}: {answer.why}"
    click.secho(line, fg="green" if answer.reached else "red")
    if answer.mismatch:
        says = "allow" if answer.expected else "deny"
        click.secho(f"  MISMATCH: the policies {says} it", fg="magenta", bold=True)


def print_enforced(enforced: Enforced) -> None:
    """What a change cost, by node."""
    if not enforced.writes:
        click.echo("  enforced: nothing to write")
        return
    parts = [f"{name} {report.writes}" for name, report in enforced.reports.items()]
    click.echo(f"  enforced in {enforced.seconds * 1000:.0f} ms (kernel writes: {', '.join(parts)})")
    for problem in enforced.problems:
        click.secho(f"  problem: {problem}", fg="yellow")


def show_matrix(answers: Sequence[Answer], enforced: Enforced | None, output: str) -> int:
    """A matrix as asked for; answers with the exit code."""
    different = list(mismatches(answers))
    if output == "json":
        print_json(MatrixResult(tuple(answers), len(different)))
        return 1 if different else 0
    if enforced is not None:
        print_enforced(enforced)
    for line in matrix_lines(answers):
        click.echo(line)
    click.echo(f"  {LEGEND}")
    for answer in different:
        print_answer(answer)
    click.echo(f"  {len(answers)} probes, {len(different)} mismatches")
    return 1 if different else 0


def print_step(
    number: int, path: Path, enforced: Enforced, answers: Sequence[Answer], before: Sequence[Answer]
) -> None:
    """One step of a play: its title, what it cost, the matrix, and what is new in it."""
    title = re.search(r"^#\s*(.+)$", path.read_text(), re.MULTILINE)
    click.echo()
    click.secho(f"{number}. {title[1] if title else path.stem}", bold=True)
    print_enforced(enforced)
    for line in matrix_lines(answers, before):
        click.echo(line)
    old = {(a.source, a.address, a.protocol, a.port): a.reached for a in before}
    opened = sum(1 for a in answers if a.reached and old.get((a.source, a.address, a.protocol, a.port)) is False)
    closed = sum(1 for a in answers if not a.reached and old.get((a.source, a.address, a.protocol, a.port)) is True)
    wrong = sum(1 for _ in mismatches(answers))
    change = f"{opened} opened, {closed} closed; " if before else ""
    click.echo(f"  {len(answers)} probes: {change}{wrong} mismatches")
