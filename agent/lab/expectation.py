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
from agent.lab.addressing import gateways
from agent.lab.services import ServiceSpec
from agent.lab.spec import FabricSpec, family, first, plain


@dataclass(frozen=True)
class Expected:
    """Whether a connection passes; None where it depends on the endpoint that a Service picks: `ways` says which of
    their addresses are reached. `why` is one clause."""

    reaches: bool | None
    why: str
    ways: tuple[tuple[str, bool], ...] = ()


End = tuple[str, int]
"""An address and a port."""


class Expectation:
    """Judges connections between the ends of one lab. `cluster` holds every pod (a Node of no name)."""

    def __init__(self, cluster: Node, fabric: FabricSpec, services: tuple[ServiceSpec, ...]) -> None:
        self._cluster = cluster
        self._addresses = {node.name: node.addresses for node in fabric.nodes}
        self._own = {node.name: {plain(a) for a in (*node.addresses, *gateways(fabric, node))} for node in fabric.nodes}
        self._node_of_pod = {
            plain(address): pod.node for pod in fabric.pods if not pod.host_network for address in pod.addresses
        }
        self._services = services

    def expect(self, source: str, destination: str, protocol: str, port: int) -> Expected:
        """From one address to another; either may be a pod's, a node's or any other; the destination a Service's."""
        asked = destination, port
        found = self._translated(destination, protocol, port)
        if found is None:
            return self._judged(source, asked, source, asked, protocol)
        endpoints, via = found
        own = [end for end in endpoints if family(end[0]) == family(destination)]
        if not own:
            return Expected(False, "the Service has no endpoint")
        ways = [self._way(source, asked, end, via, protocol) for end in own]
        if len({one.reaches for one in ways}) > 1:
            by_endpoint = tuple((end[0], one.reaches is True) for end, one in zip(own, ways))
            return Expected(None, "depends on the endpoint that is picked", by_endpoint)
        return ways[0]

    def _translated(self, destination: str, protocol: str, port: int) -> tuple[tuple[End, ...], str | None] | None:
        """The endpoints of the Service port that has this address, or of this node port and the node that translates
        it; None when no Service has it."""
        usual = plain(destination)
        via = next((name for name, addresses in self._addresses.items() if usual in map(plain, addresses)), None)
        for service in self._services:
            for served in service.ports:
                if served.protocol != protocol:
                    continue
                if served.port == port and usual in map(plain, service.cluster_ips):
                    return served.endpoints, None
                if via is not None and served.node_port == port:
                    return served.endpoints, via
        return None

    def _way(self, source: str, asked: End, endpoint: End, via: str | None, protocol: str) -> Expected:
        """To one endpoint. A cluster address is translated by the source's own node, a node port by the node that was
        asked, which stands in for the source when it sends on to another node (semantics.md line 35)."""
        there, seen = endpoint, source
        if via is not None and via != self._node(source):
            there = asked
        if via is not None and via != self._node(endpoint[0]):
            seen = first(self._addresses[via], family(endpoint[0])) or source
        return self._judged(source, there, seen, endpoint, protocol)

    def _node(self, address: str) -> str | None:
        """The node that a pod is on, or in whose own network stack the address is."""
        usual = plain(address)
        own = (name for name, addresses in self._own.items() if usual in addresses)
        return self._node_of_pod.get(usual) or next(own, None)

    def _judged(self, source: str, there: End, seen: str, endpoint: End, protocol: str) -> Expected:
        """Egress as the source's node sees it, to `there`; ingress as the endpoint's node sees it, from `seen`."""
        if plain(source) == plain(seen) == plain(endpoint[0]):
            return Expected(True, "a pod reaches itself")
        own = []
        decided = []
        for direction, pod, peer, sender, target in (
            ("egress", source, there[0], source, there),
            ("ingress", endpoint[0], seen, seen, endpoint),
        ):
            home = self._node_of_pod.get(plain(pod))
            if home is not None and plain(peer) in self._own[home]:
                own.append(f"{'to' if direction == 'egress' else 'from'} the pod's own node")
                continue
            packet = Connection(parse_address(sender), parse_address(target[0]), protocol, target[1])
            rule = getattr(judge(self._cluster, packet), direction)
            if rule is not None and rule.verdict is Verdict.DENY:
                return Expected(False, f"{direction}: {_denial(rule)}")
            if rule is not None:
                decided.append(str(rule.origin))
        if decided:
            return Expected(True, "allowed by " + " and ".join(decided))
        return Expected(True, own[0] if own else "no policy isolates")


def _denial(rule: Rule) -> str:
    policies = rule.origin.policies
    names = ", ".join(policies)
    return f"{names} allow{'s' if len(policies) == 1 else ''} no such connection"
