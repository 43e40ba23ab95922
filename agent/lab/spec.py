"""What a lab consists of: plain data, JSON both ways."""

import functools
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

Mode = Literal["routed", "bridged"]
Protocol = Literal["TCP", "UDP", "SCTP"]
Listen = tuple[tuple[Protocol, int], ...]

OUTSIDE = "outside"
_EVERYWHERE: Listen = (("TCP", 80), ("UDP", 80), ("SCTP", 80))


def node_key(name: str) -> str:
    """How a node itself (its own network stack) is called among pods and the outside host."""
    return f"node:{name}"


@dataclass(frozen=True)
class NodeSpec:
    """A node: its addresses on the network between nodes, and what its own stack listens on."""

    name: str
    addresses: tuple[str, ...]
    listen: Listen = ()

    @property
    def key(self) -> str:
        """`node:NAME`."""
        return node_key(self.name)


@dataclass(frozen=True)
class PodSpec:
    """A pod: any addresses of either family; with `host_network` they are the node's and none is set up."""

    namespace: str
    name: str
    node: str
    addresses: tuple[str, ...] = ()
    listen: Listen = ()
    host_network: bool = False

    @property
    def key(self) -> str:
        """`NAMESPACE/NAME`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class FabricSpec:
    """Nodes, their pods, and the addresses of one host that is no part of the cluster.

    `routed`: each pod behind its own veth pair with a host route, as ptp and Calico do. `bridged`: the
    pods of a node are ports of one bridge, so that they reach each other without being routed.
    """

    nodes: tuple[NodeSpec, ...]
    pods: tuple[PodSpec, ...] = ()
    outside: tuple[str, ...] = ()
    mode: Mode = "routed"
    outside_listen: Listen = field(default=_EVERYWHERE)
    gateways: tuple[tuple[str, str], ...] = ()
    """Bridged: the address of the bridge on each link that it ever had; kept by the fabric."""

    def to_json(self) -> dict[str, Any]:
        """The spec as a JSON object."""
        made: dict[str, Any] = msgspec.to_builtins(self)
        return made

    @staticmethod
    def from_json(document: Any) -> "FabricSpec":
        """The spec from `to_json`; raises msgspec.ValidationError on anything else."""
        return msgspec.convert(document, FabricSpec)

    def check(self) -> None:
        """Raise ValueError, naming the culprit, for what cannot be built."""
        nodes = {node.name for node in self.nodes}
        if len(nodes) != len(self.nodes):
            raise ValueError("two nodes have the same name")
        seen: set[str] = set()
        holders: dict[str, str] = {}
        for pod in self.pods:
            if pod.key in seen:
                raise ValueError(f"pod {pod.key} is there twice")
            seen.add(pod.key)
            if pod.node not in nodes:
                raise ValueError(f"pod {pod.key} is on node {pod.node!r}, which is not in the lab")
        for key, address in self.held():
            usual = plain(address)
            if holders.setdefault(usual, key) != key:
                raise ValueError(f"{holders[usual]} and {key} have the same address {usual}")

    def held(self) -> Iterator[tuple[str, str]]:
        """Every address with the key of its holder, hostNetwork pods left out."""
        for node in self.nodes:
            yield from ((node.key, address) for address in node.addresses)
        yield from ((OUTSIDE, address) for address in self.outside)
        for pod in self.pods:
            if not pod.host_network:
                yield from ((pod.key, address) for address in pod.addresses)


@functools.lru_cache(maxsize=65536)
def family(address: str) -> int:
    """4 or 6."""
    return ipaddress.ip_address(address).version


@functools.lru_cache(maxsize=65536)
def plain(address: str) -> str:
    """The address in its usual spelling. Raises ValueError for what is none."""
    return str(ipaddress.ip_address(address))


def first(addresses: Iterable[str], version: int) -> str | None:
    """The first address of a family (4 or 6), if there is one."""
    return next((address for address in addresses if family(address) == version), None)
