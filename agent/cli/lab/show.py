"""What is found in a lab, as text or JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from agent.cli.lab.tables import LEGEND, matrix_lines
from agent.cli.output import LabEnforced, LabStep, MatrixResult, print_json
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


def enforced_of(enforced: Enforced) -> LabEnforced:
    """What a change cost, for JSON."""
    writes = {name: report.writes for name, report in enforced.reports.items()}
    return LabEnforced(round(enforced.seconds * 1000, 1), writes, enforced.problems)


def step_of(path: Path, enforced: Enforced, answers: Sequence[Answer], before: Sequence[Answer]) -> LabStep:
    """One step of a play: its title, what it cost, who reaches whom, and what is new in that."""
    title = re.search(r"^#\s*(.+)$", path.read_text(), re.MULTILINE)
    old = {(a.source, a.address, a.protocol, a.port): a.reached for a in before}
    was = [old.get((a.source, a.address, a.protocol, a.port)) for a in answers]
    return LabStep(
        title=title[1] if title else path.stem,
        enforced=enforced_of(enforced),
        answers=tuple(answers),
        opened=sum(1 for a, b in zip(answers, was) if a.reached and b is False),
        closed=sum(1 for a, b in zip(answers, was) if not a.reached and b is True),
        mismatches=sum(1 for _ in mismatches(answers)),
    )


def print_step(number: int, step: LabStep, enforced: Enforced, before: Sequence[Answer]) -> None:
    """One step of a play."""
    click.echo()
    click.secho(f"{number}. {step.title}", bold=True)
    print_enforced(enforced)
    for line in matrix_lines(step.answers, before):
        click.echo(line)
    change = f"{step.opened} opened, {step.closed} closed; " if before else ""
    click.echo(f"  {len(step.answers)} probes: {change}{step.mismatches} mismatches")
