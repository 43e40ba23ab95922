"""What the verbs print with `-o json`: the stable schema, documented in docs/cli.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from agent.core.findings import Finding
from agent.dataplane.report import Report
from agent.lab.matrix import Answer


class Writes(msgspec.Struct, frozen=True, rename="camel"):
    """Kernel writes by kind; `total` 0 means that nothing was touched."""

    total: int
    sets_created: int
    sets_destroyed: int
    members_added: int
    members_deleted: int
    transactions: int
    chains_written: int
    chains_removed: int
    jumps_set: int
    connections_forgotten: int

    @classmethod
    def of(cls, report: Report) -> Writes:
        names = [name for name in cls.__struct_fields__ if name != "total"]
        return cls(report.writes, *(getattr(report, name) for name in names))


class Counts(msgspec.Struct, frozen=True, rename="camel"):
    """Sizes of what is enforced on the node."""

    policies: int
    pods: int
    local_pods: int
    isolated_pods: int
    sets: int
    members: int
    chains: int


class Applied(msgspec.Struct, frozen=True, rename="camel"):
    """`apply -o json` and `clean -o json`."""

    node: str
    backend: str
    changed: bool
    writes: Writes
    milliseconds: float
    counts: Counts | None
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]


class Rendered(msgspec.Struct, frozen=True, rename="camel"):
    """`render -o json`: the texts that `apply` would load."""

    node: str
    ipset: str
    iptables: str
    ip6tables: str
    findings: tuple[Finding, ...]


class StatusClass(msgspec.Struct, frozen=True, rename="camel"):
    """One class of pods as it is programmed: the policies that its comments name, and the rules."""

    chain: str
    family: int
    direction: str
    pods: tuple[str, ...]
    policies: tuple[str, ...]
    rules: int


class StatusSet(msgspec.Struct, frozen=True, rename="camel"):
    """One set as it is programmed."""

    name: str
    type: str
    family: int
    members: int


class Status(msgspec.Struct, frozen=True, rename="camel"):
    """`status -o json`. `drift` lists what is not as it was programmed, `problems` what cannot be enforced here."""

    backend: str
    programmed: bool
    classes: tuple[StatusClass, ...]
    sets: tuple[StatusSet, ...]
    drift: tuple[str, ...]
    problems: tuple[str, ...]


class MatrixResult(msgspec.Struct, frozen=True):
    """`lab matrix -o json` and `lab probe -o json`."""

    answers: tuple[Answer, ...]
    mismatches: int


class LabPod(msgspec.Struct, frozen=True):
    """A pod of a lab: `NAMESPACE/NAME`, its addresses, its node."""

    key: str
    addresses: tuple[str, ...]
    node: str


class LabUp(msgspec.Struct, frozen=True):
    """`lab up -o json`."""

    name: str
    nodes: tuple[str, ...]
    pods: tuple[LabPod, ...]


class LabList(msgspec.Struct, frozen=True):
    """`lab list -o json`: the names of the held labs."""

    labs: tuple[str, ...]


class LabEnforced(msgspec.Struct, frozen=True):
    """`lab apply -o json`: from the objects to the last node's kernel, and kernel writes by node."""

    milliseconds: float
    writes: dict[str, int]
    problems: tuple[str, ...]


class LabStep(msgspec.Struct, frozen=True):
    """One file of a play: what it cost, and who reaches whom after it."""

    title: str
    enforced: LabEnforced
    answers: tuple[Answer, ...]
    opened: int
    closed: int
    mismatches: int


class LabPlay(msgspec.Struct, frozen=True):
    """`lab play -o json`."""

    steps: tuple[LabStep, ...]
    mismatches: int


SCHEMAS = {
    "apply": Applied,
    "clean": Applied,
    "render": Rendered,
    "status": Status,
    "lab": MatrixResult,
    "lab-up": LabUp,
    "lab-list": LabList,
    "lab-apply": LabEnforced,
    "lab-play": LabPlay,
}
F = TypeVar("F", bound=Callable[..., Any])


def output_option(function: F) -> F:
    """`-o text|json`."""
    return click.option(
        "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How to print the result."
    )(function)


def print_json(value: msgspec.Struct) -> None:
    """One JSON document on standard output."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")
