"""From manifests to who stands where in the lab: nodes, pods with addresses, Services, and the host outside."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from agent.core.addresses import family, format_address, parse_address
from agent.core.inventory import Inventory
from agent.core.objects import PROTOCOLS, Pod, Service
from agent.core.policy import PortRange
from agent.lab import addressing
from agent.lab.services import ServicePort, ServiceSpec
from agent.lab.spec import FabricSpec, Listen, Mode, NodeSpec, PodSpec

Port = tuple[str, int]
"""(protocol, number); protocol ICMP has number 0."""

DEFAULT_PORT: Port = ("TCP", 80)
_OUTSIDE = {4: "203.0.113.5", 6: "2001:db8::5"}
_NODE_LINKS = {
    4: ("192.168.0.0/24", "172.31.255.0/24", "198.18.0.0/24"),
    6: ("fd00:1::/64", "fd00:ffff::/64", "2001:2::/64"),
}
"""Where nodes get their addresses: the first that holds none of the files' own."""


@dataclass(frozen=True)
class Wishes:
    """How the lab is to be. `nodes` is the least number of nodes; `families` those that addresses are given in;
    `replicas` the most pods of one workload that has none of its own in the files."""

    nodes: int = 2
    mode: Mode = "routed"
    families: tuple[int, ...] = (4, 6)
    replicas: int = 2
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Who is there. `pods` are all live pods, on a node and with addresses; `ports` what each destination is asked."""

    pods: dict[str, Pod]
    fabric: FabricSpec
    services: tuple[ServiceSpec, ...]
    ports: dict[str, tuple[Port, ...]]


def stage(inventory: Inventory, wishes: Wishes, known: Mapping[str, PodSpec] | None = None) -> Stage:
    """Put every pod of the files on a node, and give addresses to those that have none.

    Pods that are real keep node and addresses, so that verdicts about ipBlocks are the cluster's own, and a node has
    the addresses of its hostNetwork pods; `known` pods keep what an earlier stage gave them. Workloads without pods get
    those that they would create. Raises ValueError for what cannot stand beside each other (two pods with one
    address)."""
    names = sorted({pod.node for pod in inventory.pods.values() if pod.node})
    spare = (f"node{number}" for number in range(1, wishes.nodes + 1))
    names += [name for name, _ in zip((n for n in spare if n not in names), range(wishes.nodes - len(names)))]
    taken = _taken(inventory, wishes) | {parse_address(a) for pod in (known or {}).values() for a in pod.addresses}
    nodes = dict(_nodes(names, inventory, wishes.families, taken))
    free = {name: _free(number, wishes.families) for number, name in enumerate(names, 1)}
    pods: dict[str, Pod] = {}
    for number, pod in enumerate(_all_pods(inventory, names, wishes.replicas)):
        before = (known or {}).get(pod.key)
        name = before.node if before else pod.node or names[number % len(names)]
        if pod.host_network:
            addresses = tuple(map(parse_address, nodes[name].addresses))
        elif before is not None:
            addresses = tuple(map(parse_address, before.addresses))
        else:
            addresses = pod.addresses or tuple(_take(free[name], taken))
        pods[pod.key] = msgspec.structs.replace(pod, node=name, addresses=addresses)
    listens = {pod.key: _listens(pod, inventory) for pod in pods.values()}
    fabric = FabricSpec(
        nodes=tuple(nodes.values()),
        pods=tuple(_pod_spec(pod, listens[pod.key]) for pod in pods.values()),
        outside=wishes.outside or tuple(_OUTSIDE[version] for version in wishes.families),
        mode=wishes.mode,
    )
    fabric.check()
    fabric = addressing.with_gateways(fabric)
    ports = {pod.key: _asked(pod, listens[pod.key], inventory) for pod in pods.values()}
    services = tuple(_services(inventory, pods, wishes.families, taken))
    return Stage(pods, fabric, services, ports)


def _all_pods(inventory: Inventory, nodes: list[str], replicas: int) -> Iterator[Pod]:
    yield from (pod for _, pod in sorted(inventory.pods.items()) if not pod.finished)
    seen = set(inventory.pods)
    for workload in inventory.workloads.values():
        if any(workload.created(pod) for pod in inventory.pods.values()):
            continue
        count = len(nodes) if workload.per_node else min(workload.replicas, replicas)
        for number in range(count):
            pod = workload.pod(number)
            if pod.key in seen:  # a workload of another kind has the same name
                pod = msgspec.structs.replace(pod, name=f"{workload.name}-{workload.kind.lower()}-{number}")
            seen.add(pod.key)
            yield msgspec.structs.replace(pod, node=nodes[number]) if workload.per_node else pod


def _taken(inventory: Inventory, wishes: Wishes) -> set[bytes]:
    """The addresses that are somebody's already."""
    taken = {address for pod in inventory.pods.values() for address in pod.addresses}
    taken |= {address for service in inventory.services.values() for address in service.addresses}
    return taken | set(map(parse_address, wishes.outside or _OUTSIDE.values()))


def _nodes(
    names: Iterable[str], inventory: Inventory, families: Iterable[int], taken: set[bytes]
) -> Iterator[tuple[str, NodeSpec]]:
    """Each node with the addresses of its hostNetwork pods, and one of its own in a family that those have not."""
    real: dict[str, dict[int, bytes]] = {}
    for _, pod in sorted(inventory.pods.items()):
        for address in pod.addresses if pod.host_network and not pod.finished else ():
            real.setdefault(pod.node, {}).setdefault(family(address), address)
    links = {version: _link(version, taken) for version in families}
    for number, name in enumerate(names, 1):
        own = {version: str(link.network_address + number) for version, link in links.items()}
        own |= {version: format_address(address) for version, address in real.get(name, {}).items()}
        yield name, NodeSpec(name, tuple(own.values()))


def _link(version: int, taken: Iterable[bytes]) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    addresses = [ipaddress.ip_address(format_address(address)) for address in taken]
    links = [ipaddress.ip_network(text) for text in _NODE_LINKS[version]]
    return next((link for link in links if not any(address in link for address in addresses)), links[0])


def _free(number: int, families: Iterable[int]) -> dict[int, Iterator[str]]:
    networks = {4: f"10.244.{number}.0/24", 6: f"fd44:{number:x}::/120"}
    return {version: map(str, ipaddress.ip_network(networks[version]).hosts()) for version in families}


def _take(free: Mapping[int, Iterator[str]], taken: set[bytes]) -> Iterator[bytes]:
    for addresses in free.values():
        for text in addresses:
            address = parse_address(text)
            if address[-1] > 1 and address not in taken:  # .1 is a bridge's gateway
                taken.add(address)
                yield address
                break


def _pod_spec(pod: Pod, listens: tuple[Port, ...]) -> PodSpec:
    listen: Listen = tuple((protocol, port) for protocol, port in listens)  # type: ignore[misc]
    addresses = tuple(map(format_address, pod.addresses))
    return PodSpec(pod.namespace, pod.name, pod.node, addresses, listen, pod.host_network)


def _selected(service: Service, pod: Pod) -> bool:
    wanted = service.selector
    return wanted is not None and service.namespace == pod.namespace and wanted.items() <= pod.labels.items()


def _target(pod: Pod, target: int | str, protocol: str) -> int | None:
    if isinstance(target, int):
        return target
    return next((p.number for p in pod.ports if p.name == target and p.protocol == protocol), None)


def _listens(pod: Pod, inventory: Inventory) -> tuple[Port, ...]:
    """What the pod serves: its declared ports, and those that Services send to it."""
    ports = dict.fromkeys((p, n) for p, n in pod.listens if p in PROTOCOLS)
    for service in inventory.services.values():
        if _selected(service, pod):
            for port in service.ports:
                number = _target(pod, port.target, port.protocol)
                if number is not None:
                    ports[port.protocol, number] = None
    return tuple(ports)


def _asked(pod: Pod, listens: tuple[Port, ...], inventory: Inventory) -> tuple[Port, ...]:
    """What a matrix asks of the pod: what it serves, else what policies that select it name, else TCP 80."""
    if listens:
        return listens
    named = {
        (port.protocol, port.low)
        for policy in inventory.policies.values()
        if policy.namespace == pod.namespace and policy.selector.matches(pod.labels)
        for rule in policy.ingress or ()
        for port in rule.ports or ()
        if isinstance(port, PortRange) and port.low
    }
    return tuple(sorted(named)) or (DEFAULT_PORT,)


def _services(
    inventory: Inventory, pods: Mapping[str, Pod], families: tuple[int, ...], taken: set[bytes]
) -> Iterator[ServiceSpec]:
    """Each Service with its endpoints; a cluster address and node ports that the files lack are given."""
    numbers = iter(range(10, 65000))
    used = {port.node_port for service in inventory.services.values() for port in service.ports}
    node_ports = (number for number in range(30000, 32768) if number not in used)
    for key, service in sorted(inventory.services.items()):
        if service.type == "ExternalName":
            continue
        addresses = tuple(map(format_address, service.addresses))
        if not addresses and not service.headless:
            spare = (_cluster_addresses(number, families) for number in numbers)
            addresses = next(given for given in spare if taken.isdisjoint(map(parse_address, given)))
        own = [pod for _, pod in sorted(pods.items()) if _selected(service, pod)]
        ports = []
        for port in service.ports:
            if port.protocol not in PROTOCOLS:
                continue
            endpoints = [
                (format_address(address), number)
                for pod in own
                if (number := _target(pod, port.target, port.protocol)) is not None
                for address in pod.addresses
                if not addresses or family(address) in {6 if ":" in a else 4 for a in addresses}
            ]
            node_port = port.node_port or None
            if node_port is None and service.type in ("NodePort", "LoadBalancer"):
                node_port = next(node_ports)
            ports.append(ServicePort(port.protocol, port.port, node_port, tuple(endpoints)))  # type: ignore[arg-type]
        namespace, _, name = key.partition("/")
        yield ServiceSpec(namespace, name, addresses, tuple(ports))


def _cluster_addresses(number: int, families: Iterable[int]) -> tuple[str, ...]:
    given = {4: f"10.96.{number >> 8}.{number & 255}", 6: f"fd96::{number:x}"}
    return tuple(given[version] for version in families)
