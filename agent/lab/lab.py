"""A lab that runs: fabric, servers, Services, and the real dataplane in each node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

from agent.core.inventory import Inventory
from agent.core.node import Node
from agent.core.objects import Pod
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.environment import problems
from agent.dataplane.iptables import Backend
from agent.dataplane.render import OPTIONS, Options
from agent.dataplane.report import Report
from agent.lab import services
from agent.lab.expectation import Expectation
from agent.lab.fabric import Fabric, attach, build
from agent.lab.servers import Servers
from agent.lab.spec import PodSpec
from agent.lab.staging import Stage


@dataclass
class Enforced:
    """What one change of the objects cost, by node. `seconds` is from the objects to the last node's kernel."""

    reports: dict[str, Report]
    seconds: float
    problems: tuple[str, ...] = ()

    @property
    def writes(self) -> int:
        return sum(report.writes for report in self.reports.values())


@dataclass
class Objects:
    """The objects that the nodes have seen, by key, to find what changed."""

    namespaces: dict[str, object] = field(default_factory=dict)
    pods: dict[str, object] = field(default_factory=dict)
    policies: dict[str, object] = field(default_factory=dict)


class Lab:
    """One lab, to be used inside an enclosure. Not for several threads."""

    def __init__(self, fabric: Fabric, backend: Backend, options: Options = OPTIONS) -> None:
        self.fabric = fabric
        self.backend = backend
        self.cluster = Node(None)
        self._nodes = {node.name: Node(node.name) for node in fabric.spec.nodes}
        self._dataplanes: dict[str, Dataplane] = {}
        for node in fabric.spec.nodes:
            with fabric.inside(node.key):
                self._dataplanes[node.name] = Dataplane(backend, options=options)
        self._seen = Objects()
        self._servers: Servers | None = None

    @classmethod
    def start(cls, stage: Stage, backend: Backend, options: Options = OPTIONS) -> Lab:
        """Build what is on stage, and let every pod serve. Raises LabUnavailable."""
        fabric = build(stage.fabric)
        lab = cls(fabric, backend, options)
        lab._servers = Servers(fabric).start()
        lab.load_services(stage)
        return lab

    @classmethod
    def join(cls, topology: dict[str, object], backend: Backend, options: Options = OPTIONS) -> Lab:
        """The lab that another process of the same enclosure has started; its servers run there."""
        return cls(attach(topology), backend, options)

    def close(self) -> None:
        """Stop serving and take the network away."""
        if self._servers is not None:
            self._servers.stop()
            self.fabric.close()
        for dataplane in self._dataplanes.values():
            dataplane.close()

    def load_services(self, stage: Stage) -> None:
        """Program the Services, as kube-proxy would."""
        if stage.services:
            services.load(self.fabric, stage.services, self.backend.name)  # type: ignore[arg-type]

    def enforce(self, inventory: Inventory, pods: Mapping[str, Pod]) -> Enforced:
        """Tell every node what changed since the last time, and sync it. Raises KernelError."""
        begin = perf_counter()
        for node in (self.cluster, *self._nodes.values()):
            _tell(node, self._seen, inventory, pods)
        self._seen = Objects(dict(inventory.namespaces), dict(pods), dict(inventory.policies))
        reports = {}
        found: list[str] = []
        for name, node in self._nodes.items():
            with self.fabric.inside(f"node:{name}"):
                reports[name] = self._dataplanes[name].sync(node)
        seconds = perf_counter() - begin
        for name, node in self._nodes.items():
            with self.fabric.inside(f"node:{name}"):
                found += [f"{name}: {problem}" for problem in problems(node)]
        return Enforced(reports, seconds, tuple(found))

    def observe(self, inventory: Inventory, pods: Mapping[str, Pod]) -> None:
        """Know the objects without writing: another process has enforced them."""
        _tell(self.cluster, self._seen, inventory, pods)
        self._seen = Objects(dict(inventory.namespaces), dict(pods), dict(inventory.policies))

    def expectation(self, stage: Stage) -> Expectation:
        """What the policies say, of the objects last enforced."""
        return Expectation(self.cluster, self.fabric.spec, stage.services)

    def pods(self) -> dict[str, PodSpec]:
        """The pods of the fabric by key."""
        return {pod.key: pod for pod in self.fabric.spec.pods}


def _tell(node: Node, seen: Objects, inventory: Inventory, pods: Mapping[str, Pod]) -> None:
    """The watch events that lead from what was seen to what is."""
    for name in _gone(seen.policies, inventory.policies):
        node.delete_policy(name)
    for name in _gone(seen.pods, pods):
        node.delete_pod(name)
    for name in _gone(seen.namespaces, inventory.namespaces):
        node.delete_namespace(name)
    for namespace in inventory.namespaces.values():
        node.apply_namespace(namespace)
    for pod in pods.values():
        node.apply_pod(pod)
    for policy in inventory.policies.values():
        node.apply_policy(policy)
    node.compile()


def _gone(before: Iterable[str], after: Mapping[str, object]) -> list[str]:
    return [key for key in before if key not in after]
