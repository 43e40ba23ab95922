"""Which routes and neighbours each namespace of the fabric gets: iproute2 commands, worked out without I/O.

Every line is for `ip -batch`. All addresses are host routes on the nodes, so that any address works on
any node. Pods of the bridged mode see their /24 or /64 as on the link, with host routes for what lies in
it but not on their bridge.
"""

import functools
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import replace

from agent.lab.spec import FabricSpec, NodeSpec, PodSpec, family, first

# The pod's gateway in the routed mode, and the node's address on every link that it shares with a pod.
POD_GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
# The outside host answers for all that nobody has (and drops it), so nodes can have a default route.
_DEFAULT_HOP = {4: "169.254.128.1", 6: "fe80::ff"}
_LINK = {4: 24, 6: 64}
_NEIGHBOURS = 200
_HOST = {4: 32, 6: 128}


def pod_mac(index: int) -> str:
    """The pod's hardware address, by the number of its interface."""
    return f"02:00:00:00:{index >> 8 & 255:02x}:{index & 255:02x}"


def _hop(node: NodeSpec, position: int, version: int) -> str:
    """The address by which other nodes know this one as a next hop, also when it has none of the family."""
    if version == 6:
        return f"fe80::100:{position + 1:x}"
    return first(node.addresses, 4) or str(ipaddress.ip_address("169.254.128.2") + position)


def _source(addresses: tuple[str, ...], version: int) -> str:
    """Has the first address be the usual one of a host with several: IPv6 would choose the last."""
    own = first(addresses, version)
    return f" src {own}" if own else ""


def fabric_lines(node_files: list[str], outside_file: str) -> list[str]:
    """The bridge between the nodes and the outside host; the other ends of its ports are each an eth0."""
    lines = [
        "link set dev lo up",
        "link add name br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        "link set dev br0 up",
    ]
    for position, file in enumerate([*node_files, outside_file]):
        port = f"node{position}"
        lines += [
            f"link add name {port} type veth peer name eth0 netns {file}",
            f"link set dev {port} master br0 up",
        ]
    return lines


def outside_lines(spec: FabricSpec) -> list[str]:
    """The host outside: everything but its own addresses is behind a node."""
    lines = ["link set dev lo up", "link set dev eth0 up"]
    lines.append(f"addr add {_DEFAULT_HOP[4]}/32 dev eth0 scope link")
    lines.append(f"addr add {_DEFAULT_HOP[6]}/64 dev eth0 nodad")
    lines += [_address(address, "eth0") for address in spec.outside]
    for position, node in enumerate(spec.nodes):
        lines += _to_node(node, position, {version: _source(spec.outside, version) for version in (4, 6)})
    for pod in spec.pods:
        lines += remote_pod_lines(spec, pod, None)
    return lines


def node_lines(spec: FabricSpec, node: NodeSpec) -> list[str]:
    """A node without its pods: its uplink, its bridge, the ways to the other nodes and their pods."""
    position = spec.nodes.index(node)
    sources = {version: _source(node.addresses, version) for version in (4, 6)}
    lines = ["link set dev lo up", "link set dev eth0 up"]
    lines += [_address(address, "eth0") for address in node.addresses]
    lines.append(f"addr add {_hop(node, position, 6)}/64 dev eth0 nodad")
    if first(node.addresses, 4) is None:
        lines.append(f"addr add {_hop(node, position, 4)}/32 dev eth0 scope link")
    for version, hop in _DEFAULT_HOP.items():
        lines.append(f"route add default via {hop} dev eth0 onlink{sources[version]}")
    lines += [
        f"route add {address}/{_HOST[family(address)]} dev eth0{sources[family(address)]}" for address in spec.outside
    ]
    for other_position, other in enumerate(spec.nodes):
        if other is not node:
            lines += _to_node(other, other_position, sources)
    for pod in spec.pods:
        if pod.node != node.name:
            lines += remote_pod_lines(spec, pod, node)
    if spec.mode == "bridged":
        lines += [
            "link add name cbr0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            f"link set dev cbr0 address {GATEWAY_MAC} up",
            f"addr add {POD_GATEWAY[6]}/64 dev cbr0 nodad",
        ]
        lines += [bridge_address(spec, prefix) for prefix in prefixes(local_pods(spec, node.name))]
    return lines


def remote_pod_lines(spec: FabricSpec, pod: PodSpec, here: NodeSpec | None, verb: str = "add") -> list[str]:
    """The way to a pod of another node, from a node or (None) from the host outside."""
    if pod.host_network:
        return []
    position = next(number for number, node in enumerate(spec.nodes) if node.name == pod.node)
    home = spec.nodes[position]
    return [
        f"route {verb} {address}/{_HOST[version]} via {_hop(home, position, version)} dev eth0 onlink"
        + _source(here.addresses if here else spec.outside, version)
        for address, version in ((address, family(address)) for address in pod.addresses)
    ]


def local_pod_lines(spec: FabricSpec, pod: PodSpec, index: int, file: str) -> list[str]:
    """In the pod's node: its veth pair, and the way to it."""
    node = next(node for node in spec.nodes if node.name == pod.node)
    port = f"pod{index}"
    peer = f"peer name eth0 address {pod_mac(index)} netns {file}"
    if spec.mode == "bridged":
        return [
            f"link add name {port} type veth {peer}",
            f"link set dev {port} master cbr0 up",
            f"link set dev {port} type bridge_slave hairpin on",
        ]
    lines = [
        f"link add name {port} address {GATEWAY_MAC} type veth {peer}",
        f"link set dev {port} up",
        f"addr add {POD_GATEWAY[6]}/64 dev {port} nodad",
    ]
    for address in pod.addresses:
        version = family(address)
        lines += [
            f"route add {address}/{_HOST[version]} dev {port}{_source(node.addresses, version)}",
            # Permanent neighbours do not count towards the kernel's one limit for all namespaces.
            f"neigh replace {address} lladdr {pod_mac(index)} dev {port} nud permanent",
        ]
    return lines


def pod_lines(spec: FabricSpec, pod: PodSpec) -> list[str]:
    """In the pod: its addresses and its way out; further on-link routes are `pod_routes`."""
    lines = ["link set dev lo up", "link set dev eth0 up"]
    for version in (4, 6):
        addresses = [address for address in pod.addresses if family(address) == version]
        if spec.mode == "bridged":
            lines += [
                f"addr add {address}/{_LINK[version]} dev eth0{' brd +' if version == 4 else _nodad(6)}"
                for address in addresses
            ]
            gateway = bridge_gateway(spec, prefix_of(addresses[0])) if addresses else None
        else:
            lines += [_address(address, "eth0") for address in addresses]
            gateway = POD_GATEWAY[version]
            lines.append(f"neigh add {gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent")
        if addresses:
            lines.append(f"route add default via {gateway} dev eth0 onlink{_source(pod.addresses, version)}")
    return lines


def pod_routes(spec: FabricSpec, pod: PodSpec) -> frozenset[str]:
    """Bridged: the routes a pod needs beside its own links and its default route (each without the verb).

    Other links of the same bridge are reached directly; what has an address of this bridge's links but is
    elsewhere is reached through the gateway.
    """
    if spec.mode != "bridged":
        return frozenset()
    local = list(local_pods(spec, pod.node))
    links = set(prefixes(local))
    own = {prefix_of(address) for address in pod.addresses}
    # A family that the pod has no address of has no route either.
    spoken = {family(address) for address in pod.addresses}
    routes = {f"{prefix} dev eth0" for prefix in links - own if prefix.version in spoken}
    here = {address for other in local for address in other.addresses}
    for address in _all_addresses(spec):
        prefix = _link_of(address)
        if prefix in links and address not in here and prefix.version in spoken:
            mine = sorted((p for p in own if p.version == prefix.version), key=str)
            home = prefix if prefix in own else mine[0]
            routes.add(f"{address}/{_HOST[prefix.version]} via {bridge_gateway(spec, home)} dev eth0 onlink")
    return frozenset(routes)


def is_crowded(spec: FabricSpec) -> bool:
    """Whether bridged neighbours would be more than the kernel keeps: by default 1,024 for all namespaces together,
    permanent ones not counted."""
    if spec.mode != "bridged":
        return False
    return sum(len(list(local_pods(spec, node.name))) ** 2 for node in spec.nodes) > _NEIGHBOURS


def neighbour_lines(pod: PodSpec, index: int, device: str) -> list[str]:
    """Bridged: for somebody on the pod's bridge, to know it without asking."""
    mac = pod_mac(index)
    return [f"neigh replace {address} lladdr {mac} dev {device} nud permanent" for address in pod.addresses]


def gateway_lines(spec: FabricSpec, pod: PodSpec) -> list[str]:
    """Bridged: for the pod, to know its bridge without asking."""
    gateways_ = [bridge_gateway(spec, prefix) for prefix in prefixes([pod])]
    return [f"neigh replace {gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent" for gateway in gateways_]


Prefix = ipaddress.IPv4Network | ipaddress.IPv6Network


@functools.lru_cache(maxsize=65536)
def prefix_of(address: str) -> Prefix:
    """The link (/24 or /64) that an address of the bridged mode is on.

    Raises ValueError when the address stands for the link itself or its broadcast.
    """
    prefix = _link_of(address)
    plain = ipaddress.ip_address(address)
    if plain == prefix.network_address or (prefix.version == 4 and plain == prefix.broadcast_address):
        raise ValueError(f"{address} cannot be a pod's on a bridge, it is the first or last of {prefix}: be routed")
    return prefix


def _link_of(address: str) -> Prefix:
    return ipaddress.ip_network(f"{address}/{_LINK[family(address)]}", strict=False)


def prefixes(pods: Iterable[PodSpec]) -> list[Prefix]:
    """The links of some pods, each once, in order of appearance."""
    return list(dict.fromkeys(prefix_of(address) for pod in pods for address in pod.addresses))


def local_pods(spec: FabricSpec, node: str) -> Iterator[PodSpec]:
    """The pods of a node that have a network of their own."""
    return (pod for pod in spec.pods if pod.node == node and not pod.host_network)


def with_gateways(spec: FabricSpec) -> FabricSpec:
    """Bridged: the spec with a gateway for every link of its pods; those that were given stay as they are."""
    if spec.mode != "bridged":
        return spec
    pods = [pod for node in spec.nodes for pod in local_pods(spec, node.name)]
    given = dict(spec.gateways)
    new = [(str(prefix), _free_gateway(spec, prefix)) for prefix in prefixes(pods) if str(prefix) not in given]
    return replace(spec, gateways=(*spec.gateways, *new))


def gateways(spec: FabricSpec, node: NodeSpec) -> list[str]:
    """The addresses that a node has on the links of its own pods' bridge."""
    if spec.mode != "bridged":
        return []
    given = dict(spec.gateways)
    return [given[link] for link in map(str, prefixes(local_pods(spec, node.name))) if link in given]


def bridge_gateway(spec: FabricSpec, prefix: Prefix) -> str:
    """The node's own address on a link, as `with_gateways` gave it."""
    return dict(spec.gateways)[str(prefix)]


def _free_gateway(spec: FabricSpec, prefix: Prefix) -> str:
    """The first address of a link, or else the last, that nobody else has."""
    taken = {ipaddress.ip_address(address) for address in _all_addresses(spec)}
    low = prefix.network_address + 1
    if low not in taken:
        return str(low)
    high = prefix.broadcast_address - 1
    while high in taken:
        high -= 1
    return str(high)


def bridge_address(spec: FabricSpec, prefix: Prefix) -> str:
    """In the node: its address on a link of its bridge, which may have it already."""
    return f"addr replace {bridge_gateway(spec, prefix)}/{prefix.prefixlen} dev cbr0{_nodad(prefix.version)}"


def _all_addresses(spec: FabricSpec) -> Iterator[str]:
    for node in spec.nodes:
        yield from node.addresses
    yield from spec.outside
    for pod in spec.pods:
        if not pod.host_network:
            yield from pod.addresses


def _to_node(node: NodeSpec, position: int, sources: dict[int, str]) -> list[str]:
    lines = [f"route add {a}/{_HOST[family(a)]} dev eth0{sources[family(a)]}" for a in node.addresses]
    if first(node.addresses, 4) is None:
        lines.append(f"route add {_hop(node, position, 4)}/32 dev eth0")
    return lines


def _address(address: str, device: str) -> str:
    version = family(address)
    return f"addr add {address}/{_HOST[version]} dev {device}{_nodad(version)}"


def _nodad(version: int) -> str:
    return " nodad" if version == 6 else ""
