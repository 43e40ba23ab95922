"""Who reaches whom: every pair asked with real packets, beside what the policies say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from agent.lab.expectation import Expectation, Expected
from agent.lab.fabric import Fabric
from agent.lab.probes import Outcome, Probe, probe
from agent.lab.spec import OUTSIDE, family
from agent.lab.staging import DEFAULT_PORT, Port, Stage

PATIENCE = 1.5


class Question(msgspec.Struct, frozen=True):
    """From an end of the lab to an address: `source` and `destination` are keys (`ns/pod`, `node:NAME`, `outside`)."""

    source: str
    source_address: str
    destination: str
    address: str
    protocol: str
    port: int


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """What packets found of a question, and what the policies say. `expected` None is: depends on an endpoint.

    `reached` tells that the destination's host answered, `who` which pod it was. `mismatch` is the point of a lab."""

    source: str
    destination: str
    address: str
    family: int
    protocol: str
    port: int
    reached: bool
    expected: bool | None
    mismatch: bool
    who: str | None
    milliseconds: float
    detail: str
    why: str


def questions(
    stage: Stage,
    fabric: Fabric,
    *,
    ports: Sequence[Port] = (),
    ends: Sequence[str] = (),
    with_services: bool = False,
) -> list[Question]:
    """Every ordered pair of pods and the outside host, on each port that the destination serves, in each family both
    have. `ports` replaces those. `ends` are keys (`svc/NAMESPACE/NAME` too): only pairs of these, or all pairs of a
    single one. `with_services` asks the Services' cluster addresses, too; nobody outside has a route to those."""
    nodes = [node.key for node in fabric.spec.nodes if node.key in ends]
    keys = [*(pod.key for pod in fabric.spec.pods), OUTSIDE, *nodes]
    held: dict[str, list[str]] = {}
    for key, address in fabric.spec.held():
        held.setdefault(key, []).append(address)
    for pod in fabric.spec.pods:
        held.setdefault(pod.key, list(pod.addresses))
    asked = {key: tuple(ports) or stage.ports.get(key) or (DEFAULT_PORT,) for key in keys}
    for service in stage.services:
        if with_services or service.key in ends:
            held[service.key] = list(service.cluster_ips)
            asked[service.key] = tuple((port.protocol, port.port) for port in service.ports)
    return [
        Question(source, own, destination, other, protocol, port)
        for source in keys
        for destination in asked
        if source != destination and not (source == OUTSIDE and destination.startswith("svc/"))
        if not ends or (len(ends) == 1 and {source, destination} & set(ends)) or {source, destination} <= set(ends)
        for protocol, port in asked[destination]
        for version in (4, 6)
        if (own := _first(held.get(source, ()), version)) and (other := _first(held.get(destination, ()), version))
        if own != other
    ]


def _first(addresses: Iterable[str], version: int) -> str | None:
    return next((address for address in addresses if family(address) == version), None)


def ask(fabric: Fabric, expectation: Expectation, asked: Sequence[Question]) -> list[Answer]:
    """Send the packets, all at once. A difference is asked again, more patiently, before it is believed."""
    expected = [expectation.expect(q.source_address, q.address, q.protocol, q.port) for q in asked]
    outcomes = probe(fabric, [_probe(q, e) for q, e in zip(asked, expected)], patience=PATIENCE)
    return [_answer(q, e, o, _differs(fabric, e, o)) for q, e, o in zip(asked, expected, outcomes)]


def _differs(fabric: Fabric, expected: Expected, outcome: Outcome) -> bool:
    """Whether packets and policies disagree; where a Service picks, on the endpoint that answered."""
    if expected.reaches is not None:
        return expected.reaches != outcome.reached
    picked = [reached for address, reached in expected.ways if fabric.owner(address) == outcome.who]
    return outcome.reached and bool(picked) and not any(picked)


def _probe(question: Question, expected: Expected) -> Probe:
    protocol: Any = question.protocol
    return Probe(
        question.source,
        question.address,
        protocol,
        question.port,
        expected=expected.reaches is not False,
        source_address=question.source_address,
    )


def _answer(question: Question, expected: Expected, outcome: Outcome, mismatch: bool) -> Answer:
    return Answer(
        source=question.source,
        destination=question.destination,
        address=question.address,
        family=family(question.address),
        protocol=question.protocol,
        port=question.port,
        reached=outcome.reached,
        expected=expected.reaches,
        mismatch=mismatch,
        who=outcome.who,
        milliseconds=round(outcome.milliseconds, 2),
        detail=outcome.detail,
        why=expected.why,
    )


class Cell(msgspec.Struct, frozen=True):
    """One place of the table: all families of one (source, destination, port). `reached` None: the families differ."""

    reached: bool | None
    mismatch: bool


def table(answers: Sequence[Answer]) -> tuple[list[str], list[tuple[str, str, int]], dict[Any, Cell]]:
    """Rows (sources), columns (destination, protocol, port) and cells by (row, column). Columns follow the rows."""
    grouped: dict[tuple[str, tuple[str, str, int]], list[Answer]] = {}
    for answer in answers:
        grouped.setdefault((answer.source, (answer.destination, answer.protocol, answer.port)), []).append(answer)
    rows = list(dict.fromkeys(row for row, _ in grouped))
    rank = {row: number for number, row in enumerate(rows)}
    columns = sorted(dict.fromkeys(column for _, column in grouped), key=lambda c: rank.get(c[0], len(rank)))
    cells = {}
    for key, group in grouped.items():
        reached = {answer.reached for answer in group}
        cells[key] = Cell(reached.pop() if len(reached) == 1 else None, any(a.mismatch for a in group))
    return rows, columns, cells


def mismatches(answers: Iterable[Answer]) -> Iterator[Answer]:
    """The answers where packets and policies differ."""
    return (answer for answer in answers if answer.mismatch)
