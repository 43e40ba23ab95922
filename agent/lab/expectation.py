"""What the policies say of a probe, before any packet is sent: the core's own rules, and where they apply.

semantics.md lines 34 to 37: only what is forwarded is judged, after the node's DNAT; traffic that begins or ends in
the network stack of the pod's own node always passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.addresses import parse_address
from agent.core.judge import Connection, judge
from agent.core.node import Node
from agent.core.rules import Rule, Verdict
from agent.lab.services import ServiceSpec
from agent.lab.spec import FabricSpec, first, plain


@dataclass(frozen=True)
class Expected:
    """Whether a connection passes; None where it depends on the endpoint that a Service picks. `why` is one clause."""

    reaches: bool | None
    why: str


class Expectation:
    """Judges connections between the ends of one lab. `cluster` holds every pod (a Node of no name)."""

    def __init__(self, cluster: Node, fabric: FabricSpec, services: tuple[ServiceSpec, ...]) -> None:
        self._cluster = cluster
        self._nodes = {node.name: {plain(a) for a in node.addresses} for node in fabric.nodes}
        self._node_addresses = {node.name: node.addresses for node in fabric.nodes}
        self._node_of = {
            plain(address): pod.node for pod in fabric.pods if not pod.host_network for address in pod.addresses
        }
        self._services = services

    def expect(self, source: str, destination: str, protocol: str, port: int) -> Expected:
        """From one address to another; either may be a pod's, a node's or any other; the destination a Service's."""
        endpoints = self._translated(destination, protocol, port)
        if endpoints is None:
            return self._direct(source, destination, protocol, port)
        version = 6 if ":" in destination else 4
        own = [(address, number) for address, number in endpoints if (6 if ":" in address else 4) == version]
        if not own:
            return Expected(False, "the Service has no endpoint")
        found = [self._behind(source, destination, address, protocol, number) for address, number in own]
        if len({one.reaches for one in found}) > 1:
            return Expected(None, "depends on the endpoint that is picked")
        return found[0]

    def _translated(self, destination: str, protocol: str, port: int) -> tuple[tuple[str, int], ...] | None:
        """The endpoints of the Service port that has this address, or this node port; None when none has."""
        usual = plain(destination)
        on_node = any(usual in addresses for addresses in self._nodes.values())
        for service in self._services:
            for served in service.ports:
                if served.protocol != protocol:
                    continue
                if served.port == port and usual in map(plain, service.cluster_ips):
                    return served.endpoints
                if on_node and served.node_port == port:
                    return served.endpoints
        return None

    def _behind(self, source: str, asked: str, endpoint: str, protocol: str, port: int) -> Expected:
        """An endpoint of a Service. Through a NodePort of another node the pod's node sees that node (line 35)."""
        via = self._home(asked)
        home = self._node_of.get(plain(endpoint))
        if via is not None and via != home and via != self._home(source):
            own = first(self._node_addresses[via], 6 if ":" in endpoint else 4)
            if own is not None:
                return self._direct(own, endpoint, protocol, port)
        return self._direct(source, endpoint, protocol, port)

    def _home(self, address: str) -> str | None:
        """The node in whose own network stack the address is."""
        return next((name for name, own in self._nodes.items() if plain(address) in own), None)

    def _direct(self, source: str, destination: str, protocol: str, port: int) -> Expected:
        home = self._node_of.get(plain(source)), self._node_of.get(plain(destination))
        if home[0] is not None and home[0] == self._home(destination):
            return Expected(True, "to the pod's own node")
        if home[1] is not None and home[1] == self._home(source):
            return Expected(True, "from the pod's own node")
        packed = parse_address(source), parse_address(destination)
        judged = judge(self._cluster, Connection(*packed, protocol, port))
        for rule, side in ((judged.egress, "egress"), (judged.ingress, "ingress")):
            if rule is not None and rule.verdict is Verdict.DENY:
                return Expected(False, f"{side}: {_denial(rule)}")
        rules = [str(rule.origin) for rule in judged if rule is not None]
        return Expected(True, "allowed by " + " and ".join(rules) if rules else "no policy isolates")


def _denial(rule: Rule) -> str:
    policies = rule.origin.policies
    names = ", ".join(policies)
    return f"{names} allow{'s' if len(policies) == 1 else ''} no such connection"
