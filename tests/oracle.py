"""A naive evaluator of NetworkPolicies, written from `semantics.md` alone: the judge of everything else.

It reads the whole world anew at every question, caches nothing and is not clever. Numbers in brackets are
lines of `semantics.md`. It judges a new, forwarded packet: replies (7), traffic of the node itself (36) and
neighbour discovery (38) are not its business.

Where the law is silent: an unknown field directly in `spec` isolates both directions and allows nothing; an
address held by several live pods is judged by the policies of all of them, is a peer when any holder is,
and a named port resolves on every holder (in egress: on each that is the peer); a faulty egress rule still
counts for the default of `policyTypes`;
an unknown field is a fault even if its value is null; a null item of a list is a fault of what holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Object = Mapping[str, Any]
Labels = Mapping[str, str]

NAME_LABEL = "kubernetes.io/metadata.name"
BITS = {4: 32, 6: 128}


class Verdict(NamedTuple):
    """Whether each end lets the packet pass."""

    egress: bool
    ingress: bool

    @property
    def allowed(self) -> bool:
        """Both must hold (6)."""
        return self.egress and self.ingress


class Fault(Exception):
    """Bad input in some part of a policy (48-50)."""


# ---------------------------------------------------------------- addresses and blocks


class Address(NamedTuple):
    """An IP address as a number of its family."""

    family: int
    value: int


class Block(NamedTuple):
    """A CIDR with its host bits masked."""

    family: int
    value: int
    prefix: int

    def contains(self, address: Address) -> bool:
        """Same family, same leading bits (21)."""
        shift = BITS[self.family] - self.prefix
        return self.family == address.family and self.value >> shift == address.value >> shift

    def strictly_contains(self, other: Block) -> bool:
        """The other block is a smaller part of this one."""
        return self.prefix < other.prefix and self.contains(Address(other.family, other.value))


def _v4(text: str) -> int | None:
    """Four decimal numbers; leading zeros mean nothing (19)."""
    parts = text.split(".")
    if len(parts) != 4 or not all(re.fullmatch("[0-9]+", p) and int(p) <= 255 for p in parts):
        return None
    a, b, c, d = (int(p) for p in parts)
    return a << 24 | b << 16 | c << 8 | d


def _groups(text: str, *, last: bool) -> list[int] | None:
    """The 16-bit groups of a part of an IPv6 address; only the `last` part may end in dotted decimals."""
    groups: list[int] = []
    parts = text.split(":") if text else []
    for i, part in enumerate(parts):
        if last and i == len(parts) - 1 and "." in part:
            embedded = _v4(part)
            if embedded is None:
                return None
            groups += [embedded >> 16, embedded & 0xFFFF]
        elif re.fullmatch("[0-9a-fA-F]+", part) and int(part, 16) <= 0xFFFF:
            groups.append(int(part, 16))
        else:
            return None
    return groups


def _v6(text: str) -> int | None:
    """Eight groups, or fewer with one `::`; no zone."""
    head_text, gap, tail_text = text.partition("::")
    head = _groups(head_text, last=not gap)
    tail = _groups(tail_text, last=True)
    if head is None or tail is None:
        return None
    missing = 8 - len(head) - len(tail)
    if (gap and missing < 1) or (not gap and missing != 0):
        return None
    value = 0
    for group in [*head, *[0] * missing, *tail]:
        value = value << 16 | group
    return value


def _is_mapped(value: int) -> bool:
    return value >> 32 == 0xFFFF


def parse_address(text: str) -> Address | None:
    """An address as the API server reads it; IPv4-mapped IPv6 is IPv4."""
    v4 = _v4(text)
    if v4 is not None:
        return Address(4, v4)
    v6 = _v6(text)
    if v6 is None:
        return None
    return Address(4, v6 & 0xFFFFFFFF) if _is_mapped(v6) else Address(6, v6)


def parse_cidr(text: str) -> Block | None:
    """A block as the API server reads it (19), or None."""
    address, slash, digits = text.partition("/")
    if not slash or not re.fullmatch("[0-9]+", digits):
        return None
    prefix = int(digits)
    v4, v6 = _v4(address), _v6(address)
    if v4 is not None:
        family, value = 4, v4
    elif v6 is not None and _is_mapped(v6) and 96 <= prefix <= 128:
        family, value, prefix = 4, v6 & 0xFFFFFFFF, prefix - 96
    elif v6 is not None:
        family, value = 6, v6
    else:
        return None
    if prefix > BITS[family]:
        return None
    shift = BITS[family] - prefix
    return Block(family, value >> shift << shift, prefix)


# ---------------------------------------------------------------- selectors


def _fields(holder: Any, *known: str) -> dict[str, Any]:
    """The fields that are not null (52); an unknown one is a fault of the holder (50)."""
    if not isinstance(holder, Mapping):
        raise Fault("not an object")
    if set(holder) - set(known):
        raise Fault("unknown field")
    return {key: value for key, value in holder.items() if value is not None}


def _is_label_key(key: object) -> bool:
    if not isinstance(key, str):
        return False
    prefix, slash, name = key.rpartition("/")
    part = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    if slash and (len(prefix) > 253 or not re.fullmatch(rf"{part}(\.{part})*", prefix)):
        return False
    return len(name) <= 63 and bool(re.fullmatch("[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", name))


def _labels(labels: Mapping[str, str | None] | None) -> dict[str, str]:
    return {key: value or "" for key, value in (labels or {}).items()}


class Requirement(NamedTuple):
    """One condition on a label."""

    key: str
    operator: str
    values: Sequence[str]

    def holds(self, labels: Labels) -> bool:
        """NotIn and DoesNotExist hold where the key is missing (13)."""
        match self.operator:
            case "In":
                return self.key in labels and labels[self.key] in self.values
            case "NotIn":
                return self.key not in labels or labels[self.key] not in self.values
            case "Exists":
                return self.key in labels
            case _:
                return self.key not in labels


Selector = list[Requirement]


def _selector(value: Any) -> Selector:
    """Every condition of a label selector; none selects all."""
    fields = _fields(value, "matchLabels", "matchExpressions")
    selector = [Requirement(k, "In", [v]) for k, v in _labels(fields.get("matchLabels")).items()]
    for item in fields.get("matchExpressions", []):
        expression = _fields(item, "key", "operator", "values")
        operator, values = expression.get("operator"), expression.get("values", [])
        if operator in ("In", "NotIn"):
            if not values:
                raise Fault("no values")
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                raise Fault("values are not for this operator")
        else:
            raise Fault("unknown operator")
        selector.append(Requirement(expression.get("key", ""), operator, values))
    if not all(_is_label_key(requirement.key) for requirement in selector):
        raise Fault("invalid label key")
    return selector


def _matches(selector: Selector, labels: Labels) -> bool:
    return all(requirement.holds(labels) for requirement in selector)


# ---------------------------------------------------------------- the world


@dataclass(frozen=True)
class Pod:
    """A live pod with addresses of its own."""

    namespace: str
    labels: Labels
    node: str | None
    addresses: Sequence[Address]
    ports: Sequence[tuple[str, str, int]]
    """Name, protocol and number, in the order of search (30)."""

    def resolve(self, name: str, protocol: str) -> int | None:
        """The first port that fits name and protocol (29, 30)."""
        for port in self.ports:
            if port[:2] == (name, protocol):
                return port[2]
        return None


@dataclass(frozen=True)
class Peer:
    """Either a block with its exceptions, or selectors."""

    block: Block | None = None
    excepts: Sequence[Block] = ()
    namespaces: Selector | None = None
    pods: Selector | None = None


class Port(NamedTuple):
    """A port entry; `first` is a number, a name or None for all."""

    protocol: str
    first: int | str | None
    last: int | None


class Rule(NamedTuple):
    """Peers and ports; an empty list is everyone, or everything (9, 27)."""

    peers: Sequence[Peer]
    ports: Sequence[Port]


@dataclass
class Policy:
    """What a policy asks for; faulty rules are left out."""

    namespace: str
    name: str
    selector: Selector = field(default_factory=list)
    directions: set[str] = field(default_factory=set)
    rules: dict[str, list[Rule]] = field(default_factory=dict)
    faults: set[str] = field(default_factory=set)

    def selects(self, pod: Pod) -> bool:
        """Pods of the policy's own namespace (1)."""
        return pod.namespace == self.namespace and _matches(self.selector, pod.labels)


@dataclass
class World:
    """Everything that was in the list of objects."""

    namespaces: dict[str, Labels] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)

    def holders(self, address: Address) -> list[Pod]:
        """The live pods that hold an address (24)."""
        return [pod for pod in self.pods if address in pod.addresses]


def _read(objects: Iterable[Object]) -> World:
    """Decode; of two objects of one kind and name the last wins (53)."""
    world = World()
    latest = {_identity(obj): obj for obj in objects}
    for (kind, namespace, name), obj in latest.items():
        if kind == "Namespace":
            world.namespaces[name] = {**_labels(obj["metadata"].get("labels")), NAME_LABEL: name}  # 14
        elif kind == "Pod":
            pod = _pod(namespace, obj)
            if pod is not None:
                world.pods.append(pod)
        elif kind == "NetworkPolicy":
            if obj.get("apiVersion") != "networking.k8s.io/v1":
                raise ValueError(f"NetworkPolicy {namespace}/{name} of another apiVersion")
            world.policies.append(_policy(namespace, name, obj.get("spec")))
    return world


def _identity(obj: Object) -> tuple[str, str, str]:
    namespace = "" if obj["kind"] == "Namespace" else obj["metadata"].get("namespace") or "default"
    return obj["kind"], namespace, obj["metadata"]["name"]


def _pod(namespace: str, obj: Object) -> Pod | None:
    """A live pod (23) with a network of its own (22), or None."""
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    addresses = _pod_addresses(status)
    if spec.get("hostNetwork") or not addresses or status.get("phase") in ("Succeeded", "Failed"):
        return None
    containers = [*(spec.get("containers") or [])]
    containers += [c for c in spec.get("initContainers") or [] if c.get("restartPolicy") == "Always"]
    return Pod(
        namespace=namespace,
        labels=_labels(obj["metadata"].get("labels")),
        node=spec.get("nodeName"),
        addresses=addresses,
        ports=[
            (port.get("name") or "", port.get("protocol") or "TCP", port["containerPort"])
            for container in containers
            for port in container.get("ports") or []
        ],
    )


def _pod_addresses(status: Object) -> list[Address]:
    """All of podIPs; podIP where there are none or where the two differ (21)."""
    one = parse_address(status.get("podIP") or "")
    many = [parse_address(item.get("ip") or "") for item in status.get("podIPs") or []]
    if one is not None and (not many or many[0] != one):
        return [one]
    return [address for address in many if address is not None]


# ---------------------------------------------------------------- policies


def _policy(namespace: str, name: str, spec: Any) -> Policy:
    policy = Policy(namespace, name)
    spec = {} if spec is None else spec  # 52
    unknown = set(spec) - {"podSelector", "policyTypes", "ingress", "egress"}
    rules: dict[str, list[Any]] = {"Ingress": spec.get("ingress") or [], "Egress": spec.get("egress") or []}

    for direction, items in rules.items():
        policy.rules[direction] = []
        for i, item in enumerate(items):
            try:
                policy.rules[direction].append(_rule(item, direction))
            except Fault:  # 48
                policy.faults.add(f"spec.{direction.lower()}[{i}]")

    types = spec.get("policyTypes") or (["Ingress", "Egress"] if rules["Egress"] else ["Ingress"])  # 3
    policy.directions = set(types)
    if policy.directions - {"Ingress", "Egress"}:  # 49
        policy.faults.add("spec.policyTypes")
        policy.directions = {"Ingress", "Egress"}

    try:
        policy.selector = _selector({} if spec.get("podSelector") is None else spec["podSelector"])
    except Fault:  # 49
        policy.faults.add("spec.podSelector")
        policy.selector = []
        policy.rules = {"Ingress": [], "Egress": []}

    if unknown:  # 50
        policy.faults.add("spec")
        policy.directions = {"Ingress", "Egress"}
        policy.rules = {"Ingress": [], "Egress": []}
    return policy


def _rule(value: Any, direction: str) -> Rule:
    who = "from" if direction == "Ingress" else "to"
    fields = _fields(value, who, "ports")
    return Rule([_peer(item) for item in fields.get(who, [])], [_port(item) for item in fields.get("ports", [])])


def _peer(value: Any) -> Peer:
    fields = _fields(value, "podSelector", "namespaceSelector", "ipBlock")
    if not fields:
        raise Fault("empty peer")
    if "ipBlock" not in fields:
        return Peer(
            pods=_selector(fields["podSelector"]) if "podSelector" in fields else None,
            namespaces=_selector(fields["namespaceSelector"]) if "namespaceSelector" in fields else None,
        )
    if len(fields) > 1:
        raise Fault("ipBlock beside a selector")
    block_fields = _fields(fields["ipBlock"], "cidr", "except")
    block = parse_cidr(block_fields.get("cidr", ""))
    if block is None:
        raise Fault("unreadable cidr")
    excepts = []
    for text in block_fields.get("except", []):
        part = None if text is None else parse_cidr(text)
        if part is None or not block.strictly_contains(part):
            raise Fault("except is no strict subset of cidr")
        excepts.append(part)
    return Peer(block=block, excepts=excepts)


def _port(value: Any) -> Port:
    fields = _fields(value, "protocol", "port", "endPort")
    protocol, first, last = fields.get("protocol", "TCP"), fields.get("port"), fields.get("endPort")  # 28
    if protocol not in ("TCP", "UDP", "SCTP"):
        raise Fault("unknown protocol")
    if isinstance(first, str) and not _is_service_name(first):
        raise Fault("no IANA service name")
    if isinstance(first, int) and not 1 <= first <= 65535:
        raise Fault("port out of range")
    if last is not None and not (isinstance(first, int) and first <= last <= 65535):
        raise Fault("endPort without a port below it, or out of range")
    return Port(protocol, first, last)


def _is_service_name(text: str) -> bool:
    return (
        bool(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", text))
        and len(text) <= 15
        and "--" not in text
        and bool(re.search("[a-z]", text))
    )


# ---------------------------------------------------------------- judging


class Packet(NamedTuple):
    """A new, forwarded packet."""

    src: Address
    dst: Address
    protocol: str
    port: int | None


def _peer_matches(world: World, policy: Policy, peer: Peer, other: Address) -> bool:
    if peer.block is not None:  # 17, 18
        return peer.block.contains(other) and not any(part.contains(other) for part in peer.excepts)
    return any(_selectors_match(world, policy, peer, pod) for pod in world.holders(other))  # 12, 15


def _selectors_match(world: World, policy: Policy, peer: Peer, pod: Pod) -> bool:
    if peer.namespaces is None:  # 10
        if pod.namespace != policy.namespace:
            return False
    elif pod.namespace not in world.namespaces or not _matches(peer.namespaces, world.namespaces[pod.namespace]):
        return False  # 26
    return peer.pods is None or _matches(peer.pods, pod.labels)  # 11


def _port_matches(world: World, port: Port, packet: Packet) -> bool:
    if packet.protocol != port.protocol:  # 27, 28, 33
        return False
    if port.first is None:
        return True
    if packet.port is None:
        return False
    if isinstance(port.first, str):  # 29, 31
        return packet.port in [pod.resolve(port.first, port.protocol) for pod in world.holders(packet.dst)]
    return port.first <= packet.port <= (port.first if port.last is None else port.last)  # 32


def _rule_allows(world: World, policy: Policy, rule: Rule, packet: Packet, other: Address) -> bool:
    return any(
        _alternative_allows(world, policy, peer, port, packet, other)
        for peer in rule.peers or [None]
        for port in rule.ports or [None]
    )


def _alternative_allows(
    world: World, policy: Policy, peer: Peer | None, port: Port | None, packet: Packet, other: Address
) -> bool:
    if peer is not None and not _peer_matches(world, policy, peer, other):
        return False
    if port is None:
        return True
    if not _port_matches(world, port, packet):
        return False
    if peer is None or peer.block is not None or not isinstance(port.first, str) or other == packet.src:
        return True
    return any(  # 29: an egress rule's named port resolves on the destination pod that is the peer
        _selectors_match(world, policy, peer, pod) and pod.resolve(port.first, port.protocol) == packet.port
        for pod in world.holders(other)
    )


def _isolating(world: World, address: Address, direction: str) -> list[Policy]:
    holders = world.holders(address)
    return [p for p in world.policies if direction in p.directions and any(p.selects(pod) for pod in holders)]


def _passes(world: World, packet: Packet, direction: str, node: str | None) -> bool:
    own, other = (packet.src, packet.dst) if direction == "Egress" else (packet.dst, packet.src)
    if node is not None and node not in [pod.node for pod in world.holders(own)]:
        return True
    policies = _isolating(world, own, direction)
    return not policies or any(  # 5
        _rule_allows(world, policy, rule, packet, other) for policy in policies for rule in policy.rules[direction]
    )


def _address(text: str) -> Address:
    address = parse_address(text)
    if address is None:
        raise ValueError(f"no IP address: {text!r}")
    return address


def allowed(
    objects: Iterable[Object], *, src: str, dst: str, protocol: str, port: int | None, node: str | None = None
) -> Verdict:
    """The verdict on a new packet; with `node`, of that node's pods only."""
    packet = Packet(_address(src), _address(dst), protocol, port)
    if packet.src == packet.dst:  # 37
        return Verdict(egress=True, ingress=True)
    world = _read(objects)
    return Verdict(egress=_passes(world, packet, "Egress", node), ingress=_passes(world, packet, "Ingress", node))


def isolated(objects: Iterable[Object], address: str, direction: str) -> bool:
    """Whether a policy isolates the address in the direction, `ingress` or `egress`."""
    return bool(_isolating(_read(objects), _address(address), direction.capitalize()))


def findings(objects: Iterable[Object]) -> set[tuple[str, str]]:
    """Every faulty part: the policy's namespace/name, and `spec.ingress[0]`, `spec.podSelector`, ..."""
    return {(f"{p.namespace}/{p.name}", fault) for p in _read(objects).policies for fault in p.faults}


def as_file(objects: Iterable[Object]) -> list[Object]:
    """The objects with the namespaces added that a file of them would leave to be assumed (26)."""
    objects = list(objects)
    identities = [_identity(obj) for obj in objects]
    seen = {name for kind, _, name in identities if kind == "Namespace"}
    used = {namespace for kind, namespace, _ in identities if kind in ("Pod", "NetworkPolicy")}
    missing = sorted(used - seen)
    return [*objects, *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": n}} for n in missing)]
