"""Cases of `tests.upstream` and `tests.recipes`, played through the real dataplane and probed with packets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from agent.core.inventory import Inventory
from agent.dataplane.iptables import Backend
from agent.lab.lab import Lab
from agent.lab.probes import Probe, probe
from agent.lab.services import ServiceSpec
from agent.lab.spec import OUTSIDE, Mode, family
from agent.lab.staging import Stage, Wishes, stage
from tests.upstream import Addresses, Case, Object, Reachability, Step, objects

NODES = ("node-1", "node-2")
OUTSIDE_ADDRESSES = ("203.0.113.5", "2001:db8::5")


@dataclass(frozen=True)
class Cast:
    """The pods of some cases: every second one on the second node, each with an address of both families."""

    pods: tuple[str, ...]

    def node(self, ref: str) -> str:
        return NODES[self.pods.index(ref) % 2]

    @property
    def addresses(self) -> Addresses:
        """By pod, the host outside among them."""
        held = {ref: self._addresses(number) for number, ref in enumerate(self.pods)}
        return {**held, OUTSIDE: OUTSIDE_ADDRESSES}

    @staticmethod
    def _addresses(number: int) -> tuple[str, str]:
        node = number % 2 + 1
        return f"10.244.{node}.{number + 10}", f"fd44:{node}::{number + 10:x}"

    def objects(self, step: Step) -> list[Object]:
        """All objects of a step, the pods on their nodes."""
        made = objects(step, self.addresses)
        for one in made:
            if one["kind"] == "Pod":
                one["spec"]["nodeName"] = self.node(f"{one['metadata']['namespace']}/{one['metadata']['name']}")
        return made


def read(made: Sequence[Object]) -> Inventory:
    """The objects as a file of them is read."""
    inventory = Inventory()
    inventory.read(json.dumps({"apiVersion": "v1", "kind": "List", "items": made}).encode(), "objects")
    inventory.finish()
    return inventory


@dataclass(frozen=True)
class Ask:
    """One probe with the verdict that was written by hand."""

    source: str
    destination: str
    address: str
    protocol: str
    port: int
    expected: bool

    def __str__(self) -> str:
        port = self.protocol if self.protocol == "ICMP" else f"{self.protocol} {self.port}"
        return f"{self.source} -> {self.destination} {self.address} (IPv{family(self.address)}) {port}"


def asked(step: Step, addresses: Addresses) -> list[Ask]:
    """All probes of a step, in each family."""
    return [
        Ask(src, dst, address, one.protocol, one.port or 0, expected)
        for one in step.probes
        for src, dst, expected in one.expected.pairs()
        for address in addresses[dst]
    ]


def through(name: str, address: str, protocol: str, port: int, endpoint: str, expected: Reachability) -> list[Ask]:
    """The probes of a Service's address from every pod: each fares as with the endpoint, which reaches itself."""
    table = {src: connected for src, dst, connected in expected.pairs() if dst == endpoint}
    return [
        Ask(src, name, address, protocol, port, table.get(src, True)) for src in expected.endpoints if src != OUTSIDE
    ]


def check(lab: Lab, asks: Sequence[Ask], timeout: float = 0.4) -> Iterator[str]:
    """Send the packets of all asks at once; a line for each that was not as written."""
    probes = [Probe(a.source, a.address, a.protocol, a.port, a.expected) for a in asks]  # type: ignore[arg-type]
    listening = {(pod.key, *port) for pod in lab.pods().values() for port in pod.listen}
    for ask, outcome in zip(asks, probe(lab.fabric, probes, timeout=timeout)):
        served = (ask.destination, ask.protocol, ask.port) in listening
        if outcome.reached != ask.expected:
            yield f"{ask}: expected {_word(ask.expected)}, found {_word(outcome.reached)} ({outcome.detail})"
        elif outcome.reached and served and outcome.who != ask.destination:
            yield f"{ask}: {outcome.who} answered ({outcome.detail})"


def _word(reached: bool) -> str:
    return "connected" if reached else "denied"


MoreAsks = Callable[[Step], list[Ask]]


class Player:
    """One lab in which cases of the same pods follow each other, as changes of the objects of a live cluster do."""

    def __init__(self, pods: Iterable[str], backend: str, mode: Mode) -> None:
        self.cast = Cast(tuple(pods))
        self.backend = Backend(backend)
        self.mode = mode
        self.lab: Lab | None = None
        self.seconds: list[float] = []

    def enforce(self, made: Sequence[Object]) -> tuple[Lab, Stage]:
        """The nodes see these objects; the first time the lab is built for them."""
        inventory = read(made)
        staged = stage(inventory, Wishes(mode=self.mode), self.lab and self.lab.pods())
        if self.lab is None:
            self.lab = Lab.start(staged, self.backend)
        enforced = self.lab.enforce(inventory, staged.pods)
        self.seconds.append(enforced.seconds)
        if enforced.problems:
            raise AssertionError(f"the lab's own nodes have problems: {enforced.problems}")
        return self.lab, staged

    def play(self, case: Case, services: Sequence[ServiceSpec] = (), more: MoreAsks = lambda _: []) -> Iterator[str]:
        """A case, step by step; a line for each packet that fared otherwise than written.

        `services` are translated in the nodes; `more` says what to ask of a step beside its own probes."""
        for number, step in enumerate(case.steps, 1):
            lab, staged = self.enforce(self.cast.objects(step))
            if number == 1:
                lab.load_services(replace(staged, services=tuple(services)))
            for line in check(lab, [*asked(step, self.cast.addresses), *more(step)]):
                yield f"case {case.number} ({case.title}), step {number}: {line}"

    def close(self) -> None:
        if self.lab is not None:
            self.lab.close()


def play_all(cases: Sequence[Case], backend: str, mode: Mode) -> list[str]:
    """Play cases of the same pods in one lab."""
    player = Player(cast_of(*cases), backend, mode)
    try:
        return [line for case in cases for line in player.play(case)]
    finally:
        player.close()


def cast_of(*cases: Case) -> list[str]:
    """The pods of all steps."""
    return list(dict.fromkeys(ref for case in cases for step in case.steps for ref in step.pods))
