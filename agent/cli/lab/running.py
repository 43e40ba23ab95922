"""Work in a lab: one of its own made from files, or the held one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.cli.exits import exit_code
from agent.cli.lab.options import LabOptions
from agent.cli.sources import read_files, warn
from agent.core.inventory import Inventory
from agent.lab import enclosure, held
from agent.lab.lab import Enforced, Lab
from agent.lab.spec import PodSpec
from agent.lab.staging import Stage, stage

_INPUT = Path("/run/netpol-agent-lab-input.json")
"""Inside the enclosure only: what the held lab enforces."""


Contents = list[tuple[str, bytes]]


def inventory_of(contents: Contents, namespace: str) -> Inventory:
    """The objects of these files. Raises BadInput."""
    inventory = Inventory(namespace)
    for file, data in contents:
        inventory.read(data, file)
    inventory.finish()
    return inventory


def staged_from(inventory: Inventory, wanted: LabOptions, known: dict[str, PodSpec] | None = None) -> Stage:
    try:
        staged = stage(inventory, wanted.wishes, known)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not staged.pods:
        raise click.UsageError("the input holds no pods, and no workload that would create any")
    return staged


def with_lab(
    wanted: LabOptions, name: str, work: Callable[[Lab, Stage, Enforced | None], int], *, policies: bool = True
) -> int:
    """Do `work` in a lab of its own made from -f, or without -f in the held one. Answers with its exit code."""
    if not wanted.files:
        return joined(name, lambda topology: _in_held(topology, work))
    contents = read_files(wanted.files)
    inventory = inventory_of(contents, wanted.namespace)
    if not policies:
        inventory.policies.clear()
    warn(inventory.findings)
    staged = staged_from(inventory, wanted)

    def inside() -> int:
        running = Lab.start(staged, wanted.chosen())
        try:
            return work(running, staged, running.enforce(inventory, staged.pods))
        finally:
            running.close()

    return enclosure.run(lambda: exit_code(inside))


def _in_held(topology: dict[str, Any], work: Callable[[Lab, Stage, Enforced | None], int]) -> int:
    contents, wanted = load_input()
    inventory = inventory_of(contents, wanted.namespace)
    running = Lab.join(topology, wanted.chosen())
    staged = staged_from(inventory, wanted, running.pods())
    running.observe(inventory, staged.pods)
    return work(running, staged, None)


def joined(name: str, work: Callable[[dict[str, Any]], int]) -> int:
    """Do `work` inside the held lab."""
    try:
        return enclosure.join(name, lambda topology: exit_code(lambda: work(topology)))
    except held.NotHeld as error:
        raise enclosure.LabUnavailable(
            f"no lab {name!r} is up; give -f FILE, or make one with: {with_name('up -f FILE', name)}"
        ) from error


def with_name(verb: str, name: str) -> str:
    """What the user has to type for this lab."""
    return f"netpol-agent lab {verb}" + ("" if name == "default" else f" --name {name}")


def save_input(contents: Contents, wanted: LabOptions) -> None:
    """Leave what is enforced for those who join the held lab."""
    _INPUT.write_bytes(msgspec.json.encode({"contents": contents, "wanted": wanted}))


def load_input() -> tuple[Contents, LabOptions]:
    """What the held lab enforces."""
    saved = msgspec.json.decode(_INPUT.read_bytes(), type=_Saved)
    return saved.contents, saved.wanted


class _Saved(msgspec.Struct):
    contents: list[tuple[str, bytes]]
    wanted: LabOptions
