"""Cases of `tests.upstream` and `tests.recipes` as real pods on both nodes, and their probes as real connections."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from typing import Any, NamedTuple

from tests.cluster.echoes import echoing
from tests.cluster.kube import NODES, agnhost, kubectl
from tests.cluster.live import node_addresses
from tests.cluster.places import Places
from tests.cluster.prober import Question, probe
from tests.packets.cases import Ask, cast_of
from tests.recipes import OUTSIDE
from tests.upstream import Case, Object, Step, namespace, policies

PATIENCE = 8.0
"""Seconds in which the verdicts must become those that are written."""
NAME = "kubernetes.io/metadata.name"
WHO = "who"
"""A label that each pod has beside those of its step: its name, for Services."""


class Serving(NamedTuple):
    """Pairs of a TCP and a UDP port that each pod serves, and further TCP ports. It answers all others by refusing."""

    pairs: tuple[tuple[int, int], ...]
    more: tuple[int, ...] = ()


class Stage:
    """Pods of some cases, every second one on the second node; `prefix` goes before the names of their namespaces.

    To a pod the node that it is not on is the host outside. `borrowed` pods are the cluster's own, by the name that
    the cases give them: their node and addresses. They and their namespaces are left as they are."""

    def __init__(
        self,
        prefix: str,
        cases: Sequence[Case],
        places: Places,
        serving: Serving,
        borrowed: dict[str, tuple[str, list[str]]] | None = None,
    ) -> None:
        self.prefix = prefix
        self._borrowed = borrowed or {}
        self._own = [ref for ref in cast_of(*cases) if ref not in self._borrowed]
        probes = [one for case in cases for step in case.steps for one in step.probes if one.protocol == "UDP"]
        self._echoed = sorted({one.port or 0 for one in probes if (OUTSIDE in {d for _, d, _ in one.expected.pairs()})})
        self._ports = sorted({port for case in cases for step in case.steps for port in step.ports})
        self._nodes = {ref: NODES[number % 2] for number, ref in enumerate(self._own)}
        self.addresses: dict[str, list[str]] = {}
        for ref, (node, held) in self._borrowed.items():
            self._nodes[ref], self.addresses[ref] = node, held
        self._outside = {node: node_addresses(other) for node, other in zip(NODES, reversed(NODES))}
        self._places = places
        self._serving = serving
        self._image = agnhost()
        self._current: dict[str, Object] = {}  # what the cluster was told, by kind and name

    # --- pods --------------------------------------------------------------------------------------------------------

    @property
    def spaces(self) -> list[str]:
        """The namespaces that are made, as the cluster calls them."""
        return [self.name(space) for space in dict.fromkeys(ref.partition("/")[0] for ref in self._own)]

    def name(self, space: str) -> str:
        """What the cluster calls a namespace of the cases."""
        return space if any(ref.startswith(f"{space}/") for ref in self._borrowed) else f"{self.prefix}{space}"

    def build(self) -> None:
        """All pods, ready, without labels."""
        self._tell([namespace(name) for name in self.spaces])
        self._tell([self._pod(ref, {}) for ref in self._own])
        self._wait()

    def replace(self, *refs: str) -> None:
        """Pods that go and come again as they were, but for their addresses."""
        pods = [self._current.pop(self._key(self._pod(ref, {}))) for ref in refs]
        kubectl("delete", "-f", "-", text=_listed(pods))
        self._tell(pods)
        self._wait()

    def come_back(self) -> None:
        """Pods that somebody else has taken away come again, as they were."""
        kubectl("apply", "-f", "-", text=_listed(one for one in self._current.values() if one["kind"] == "Pod"))
        self._wait()

    def _wait(self) -> None:
        """Until all pods are ready; what their addresses are."""
        for name in self.spaces:
            kubectl("-n", name, "wait", "--for=condition=Ready", "pods", "--all", "--timeout=120s")
            for pod in json.loads(kubectl("-n", name, "get", "pods", "-o", "json"))["items"]:
                held = [one["ip"] for one in pod["status"]["podIPs"]]
                ref = f"{name.removeprefix(self.prefix)}/{pod['metadata']['name']}"
                self.addresses[ref] = sorted(held, key=lambda address: ":" in address)
        self._places.open(*(held[0] for held in (*self.addresses.values(), *self._outside.values())))

    def outside_answers(self) -> AbstractContextManager[None]:
        """As long as this lasts, the nodes answer on the UDP ports that are asked of the outside."""
        return echoing(self._places, self._outside.values(), self._echoed)

    def remove(self) -> None:
        kubectl("delete", "namespace", "--ignore-not-found", *self.spaces)

    def _pod(self, ref: str, labels: dict[str, str]) -> Object:
        space, _, name = ref.partition("/")
        ports = [
            {"name": f"serve-{port}-{protocol.lower()}", "containerPort": port, "protocol": protocol}
            for port in self._ports
            for protocol in ("TCP", "UDP")
        ]
        containers: list[Object] = [
            {"name": f"netexec-{tcp}", "args": ["netexec", f"--http-port={tcp}", f"--udp-port={udp}"]}
            for tcp, udp in self._serving.pairs
        ]
        if self._serving.more:
            environment = [{"name": f"SERVE_PORT_{port}", "value": name} for port in self._serving.more]
            containers.append({"name": "porter", "args": ["porter"], "env": environment})
        containers[0]["ports"] = ports
        for container in containers:
            container |= {"image": self._image, "imagePullPolicy": "IfNotPresent"}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": self.name(space), "name": name, "labels": {WHO: name, **labels}},
            "spec": {
                "nodeName": self._nodes[ref],
                "terminationGracePeriodSeconds": 0,
                "enableServiceLinks": False,
                "automountServiceAccountToken": False,
                "dnsConfig": {"options": [{"name": "timeout", "value": "1"}, {"name": "attempts", "value": "1"}]},
                "containers": containers,
            },
        }

    # --- steps -------------------------------------------------------------------------------------------------------

    def play(self, case: Case, more: Callable[[Step], list[Ask]] = lambda _: []) -> None:
        """A case, step by step; fails with a line for each connection that fared otherwise than written."""
        for number, step in enumerate(case.steps, 1):
            self.enact(step)
            wrong = self.settled([*self.asks(step), *more(step)])
            assert not wrong, "\n".join([f"case {case.number} ({case.title}), step {number}:", *wrong])

    def enact(self, step: Step) -> None:
        """Labels and policies become those of the step."""
        wanted = [namespace(self.name(space), dict(labels)) for space, labels in step.namespaces.items()]
        wanted += [self._pod(ref, dict(labels)) for ref, labels in step.pods.items() if ref in self._own]
        wanted = [one for one in wanted if (one["metadata"].get("namespace") or one["metadata"]["name"]) in self.spaces]
        addresses = {ref: self.addresses[ref] for ref in step.pods}
        self._tell([*wanted, *(self._renamed(one) for one in policies(step, {**addresses, OUTSIDE: []}))], whole=True)

    def end(self) -> None:
        """No policies any more."""
        self._tell([], whole=True)

    def _tell(self, wanted: Sequence[Object], *, whole: bool = False) -> None:
        """Have the cluster hold these objects; when they are the `whole`, no other policies."""
        named = {self._key(one): one for one in wanted}
        gone = [key for key in self._current if key.startswith("NetworkPolicy ") and key not in named] if whole else []
        changed = [one for key, one in named.items() if self._current.get(key) != one]
        if gone:
            kubectl("delete", "-f", "-", text=_listed(self._current.pop(key) for key in gone))
        if changed:
            kubectl("apply", "-f", "-", text=_listed(changed))
        self._current |= named

    @staticmethod
    def _key(one: Object) -> str:
        return f"{one['kind']} {one['metadata'].get('namespace')} {one['metadata']['name']}"

    def _renamed(self, value: Any, key: str = "") -> Any:
        """A policy as for the namespaces' names here."""
        if isinstance(value, list):
            return [self._renamed(item) for item in value]
        if not isinstance(value, dict):
            return self.name(value) if key in (NAME, "namespace") else value
        if value.get("key") == NAME:
            return {**value, "values": [self.name(one) for one in value["values"]]}
        return {one: self._renamed(item, one) for one, item in value.items()}

    # --- probes ------------------------------------------------------------------------------------------------------

    def asks(self, step: Step) -> list[Ask]:
        """All probes of a step, in each family."""
        return [
            Ask(src, dst, address, one.protocol, one.port or 0, expected)
            for one in step.probes
            for src, dst, expected in one.expected.pairs()
            for address in (self._outside[self._nodes[src]] if dst == OUTSIDE else self.addresses[dst])
        ]

    def settled(self, asks: Sequence[Ask]) -> list[str]:
        """A line for each that does not become as written, or does not stay so."""
        deadline = monotonic() + PATIENCE
        while self.wrong(asks) and monotonic() < deadline:
            pass
        return self.wrong(asks)

    def wrong(self, asks: Sequence[Ask]) -> list[str]:
        """A line for each that is not as written now."""
        found = probe(self._places, [self._question(ask) for ask in asks])
        return [
            f"{ask}: expected {_word(ask.expected)}, found {_word(reached)}"
            for ask, reached in zip(asks, found)
            if reached != ask.expected
        ]

    def _question(self, ask: Ask) -> Question:
        if ask.source == OUTSIDE:
            place = self._outside[self._nodes[ask.destination]][0]
        else:
            place = self.addresses[ask.source][0]
        return Question(place, ask.address, ask.protocol, ask.port, ask.expected)


@contextmanager
def staged(stage: Stage) -> Iterator[Stage]:
    """Its pods, as long as they are needed."""
    try:
        stage.build()
        with stage.outside_answers():
            yield stage
    finally:
        stage.remove()


def _listed(items: Iterable[Object]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)})


def _word(reached: bool) -> str:
    return "connected" if reached else "denied"
