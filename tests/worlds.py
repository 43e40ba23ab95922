"""Random worlds, events and probes: small, dense and unkind.

Everything is drawn through a `Chooser`, whose one source is a function that gives a whole number of a range.
With `random.Random` behind it this makes `random_world` and `random_event`; with Hypothesis behind it the
strategies at the end, which shrink towards the first and simplest choice.

Three namespaces; pods at 10.0.NODE.N and fd00::NODE:N; two label keys. A world holds type-correct objects
only, with a fault of section 6 of `semantics.md` in a policy with the probability `faults`.
"""

from __future__ import annotations

import copy
import ipaddress
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from hypothesis import strategies as st

from tests.oracle import BITS, NAME_LABEL, Address, Block, parse_address, parse_cidr

Object = dict[str, Any]
Probe = tuple[str, str, str, int | None]
"""Source and destination address, protocol, port."""
T = TypeVar("T")

NAMESPACES = ("x", "y", "z")
KEYS = ("app", "tier")
VALUES = ("a", "b", "")
PORT_NAMES = ("http", "dns", "metrics")
PORTS = (80, 81, 53, 8080)
PROTOCOLS = ("TCP", "UDP", "SCTP")
OUTSIDE = ("192.0.2.1", "192.0.2.130", "2001:db8::1", "2001:db8:0:1::1")
OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")
BLOCKS = (
    "10.0.1.0/24",
    "10.0.0.0/8",
    "10.0.1.2/31",
    "10.0.1.2/32",
    "10.0.2.0/30",
    "0.0.0.0/0",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "fd00::1:0/112",
    "fd00::/16",
    "fd00::1:2/127",
    "fd00::1:2/128",
    "::/0",
    "2001:db8::/32",
    "2001:db8:0:1::/64",
    # Read in their own way: leading zeros, host bits, IPv4 in IPv6.
    "010.000.001.000/024",
    "10.0.1.77/25",
    "::ffff:10.0.1.0/120",
    "::ffff:0:0/96",
    "FD00:0:0:0:0:0:0001:0077/112",
    "fd00::0.1.0.0/112",
)


class Chooser:
    """Every choice of the generators, made of whole numbers."""

    def __init__(self, number: Callable[[int, int], int]) -> None:
        self.number = number

    def pick(self, items: Sequence[T]) -> T:
        """One of the items; the first is the simplest."""
        return items[self.number(0, len(items) - 1)]

    def chance(self, probability: float) -> bool:
        """True with the probability; False is simpler."""
        return probability > 0 and self.number(0, 999) >= 1000 - round(1000 * probability)

    def several(self, least: int, most: int, make: Callable[[], T]) -> list[T]:
        """A list of things made anew."""
        return [make() for _ in range(self.number(least, most))]

    def subset(self, items: Sequence[T], probability: float = 0.5) -> list[T]:
        """Some of the items, in their order."""
        return [item for item in items if self.chance(probability)]


# ---------------------------------------------------------------- namespaces and pods


def make_labels(c: Chooser) -> dict[str, str]:
    """Few keys, few values, the empty one too."""
    return {key: c.pick(VALUES) for key in c.subset(KEYS, 0.6)}


def make_namespace(c: Chooser, name: str) -> Object:
    """With the name label as the server sets it, or without or wrong as a file may have it."""
    own = c.pick([{NAME_LABEL: name}, {}, {NAME_LABEL: c.pick(NAMESPACES)}])
    labels = {**make_labels(c), **own}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or None}}


def _container(c: Chooser, name: str) -> Object:
    def port() -> Object:
        made: Object = {"containerPort": c.pick(PORTS)}
        if not c.chance(0.2):
            made["name"] = c.pick(PORT_NAMES)
        protocol = c.pick(("TCP", "UDP", "SCTP", None))
        return made if protocol is None else {**made, "protocol": protocol}

    return {"name": name, "ports": c.several(0, 3, port) or None}


def _status(addresses: Sequence[str], phase: str) -> Object:
    if not addresses:
        return {"phase": phase}
    return {"phase": phase, "podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}


def make_pod(c: Chooser, namespace: str, name: str, node: int, index: int) -> Object:
    """A pod of a node: mostly running with one or two addresses, with every oddity now and then."""
    v4, v6 = f"10.0.{node}.{index}", f"fd00::{node}:{index}"
    phase = c.pick(("Running",) * 6 + ("Pending", "Unknown", "Succeeded", "Failed"))
    status = _status(c.pick([[v4], [v4, v6], [v6], [v6, v4], []]), phase)
    if "podIPs" in status and c.chance(0.1):
        status["podIPs"] = None
    elif "podIPs" in status and c.chance(0.1):
        status["podIP"] = f"10.0.{node}.{index + 100}"
    spec: Object = {"containers": c.several(1, 2, lambda: _container(c, "main"))}
    if status.get("podIP") or c.chance(0.5):
        spec["nodeName"] = f"node-{node}"
    if c.chance(0.2):
        sidecar = c.pick([{"restartPolicy": "Always"}, {}])
        spec["initContainers"] = [{**_container(c, "init"), **sidecar}]
    metadata: Object = {"namespace": namespace, "name": name, "labels": make_labels(c) or c.pick([{}, None])}
    if c.chance(0.1):
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}
    if c.chance(0.08):
        _to_host_network(pod, node)
    return pod


def _to_host_network(pod: Object, node: int) -> None:
    pod["spec"] |= {"hostNetwork": True, "nodeName": f"node-{node}"}
    pod["status"] = _status([f"172.16.0.{node}", f"fd16::{node}"], "Running")


# ---------------------------------------------------------------- policies


def _expression(c: Chooser, keys: Sequence[str], values: Sequence[str]) -> Object:
    operator, key = c.pick(OPERATORS), c.pick(keys)
    if operator in ("In", "NotIn"):
        return {"key": key, "operator": operator, "values": c.several(1, 2, lambda: c.pick(values))}
    return {"key": key, "operator": operator, **c.pick([{}, {"values": []}, {"values": None}])}


def make_selector(c: Chooser, *, of_namespaces: bool = False) -> Object:
    """A selector of few labels; an invalid value is compared as it is (line 51)."""
    keys = (*KEYS, NAME_LABEL) if of_namespaces else KEYS
    values = (*VALUES, *NAMESPACES, "-no value-") if of_namespaces else (*VALUES, "-no value-")
    form = c.pick(("empty", "labels", "expressions", "both", "nulls"))
    selector: Object = {"matchLabels": None, "matchExpressions": None} if form == "nulls" else {}
    if form in ("labels", "both"):
        value = c.pick((*values, None))
        selector["matchLabels"] = {c.pick(keys): value}
    if form in ("expressions", "both"):
        selector["matchExpressions"] = c.several(0, 2, lambda: _expression(c, keys, values))
    return selector


def _parts_of(cidr: str) -> list[str]:
    """The blocks that are a strict subset of a block."""
    whole = parse_cidr(cidr)
    parts = [(text, parse_cidr(text)) for text in BLOCKS]
    return [text for text, part in parts if whole and part and whole.strictly_contains(part)]


def make_block(c: Chooser) -> Object:
    """A block, perhaps with exceptions."""
    cidr = c.pick(BLOCKS)
    excepts: list[str] = []
    if _parts_of(cidr):
        excepts = c.several(0, 2, lambda: c.pick(_parts_of(cidr)))
    return {"cidr": cidr, "except": excepts} if excepts else {"cidr": cidr, **c.pick([{}, {"except": None}])}


def make_peer(c: Chooser) -> Object:
    """Each form of a peer, now and then with the other fields null."""
    form = c.pick(("pods", "namespaces", "both", "block"))
    peer: Object = dict.fromkeys(("podSelector", "namespaceSelector", "ipBlock")) if c.chance(0.1) else {}
    if form == "block":
        return {**peer, "ipBlock": make_block(c)}
    if form in ("pods", "both"):
        peer["podSelector"] = make_selector(c)
    if form in ("namespaces", "both"):
        peer["namespaceSelector"] = make_selector(c, of_namespaces=True)
    return peer


def make_port(c: Chooser) -> Object:
    """A number, a range, a name or all of a protocol."""
    port: Object = c.pick([{"protocol": "TCP"}, {}, {"protocol": "UDP"}, {"protocol": "SCTP"}, {"protocol": None}])
    form = c.pick(("number", "name", "range", "all", "null"))
    if form == "number":
        return {**port, "port": c.pick((*PORTS, 1, 65535))}
    if form == "name":
        return {**port, "port": c.pick((*PORT_NAMES, "nobody-has-it"))}
    if form == "range":
        first = c.pick((80, 53, 1, 8080))
        return {**port, "port": first, "endPort": c.pick((first, first + 1, 8080, 65535))}
    return port if form == "all" else {**port, "port": None, "endPort": None}


def _who(direction: str) -> str:
    return "from" if direction == "ingress" else "to"


def make_rule(c: Chooser, direction: str) -> Object:
    """Peers and ports, each perhaps empty, null or absent: all that is everyone or everything."""
    rule: Object = {}
    for field, items in (
        (_who(direction), c.several(0, 2, lambda: make_peer(c))),
        ("ports", c.several(0, 2, lambda: make_port(c))),
    ):
        if items:
            rule[field] = items
        else:
            rule |= c.pick([{}, {field: []}, {field: None}])
    return rule


def make_policy(c: Chooser, namespace: str, name: str, faults: float = 0.0) -> Object:
    """A policy; with a fault of section 6 by the given probability."""
    spec: Object = {"podSelector": make_selector(c)}
    if c.chance(0.3):
        spec = c.pick([{"podSelector": {}}, {}, {"podSelector": None}])
    for direction in ("ingress", "egress"):
        rules = c.several(0, 2, partial(make_rule, c, direction))
        spec |= {direction: rules} if rules else c.pick([{}, {direction: []}, {direction: None}])
    spec |= _types(c)
    policy: Object = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    }
    if c.chance(faults):
        FAULTS[c.pick(sorted(FAULTS))](c, spec)
    elif c.chance(0.03):
        policy["spec"] = None
    return policy


def _types(c: Chooser) -> Object:
    both = ["Ingress", "Egress"]
    return {**c.pick([{}, {"policyTypes": c.pick([["Ingress"], ["Egress"], both, [], None, both[::-1]])}])}


# ---------------------------------------------------------------- faults

Fault = Callable[[Chooser, Object], None]


def _some_rule(c: Chooser, spec: Object) -> tuple[str, Object]:
    """A rule of the policy, made where there is none; its list is replaced, not shared."""
    direction = c.pick([d for d in ("ingress", "egress") if spec.get(d)] or ["ingress", "egress"])
    spec[direction] = spec.get(direction) or [{}]
    return _who(direction), c.pick(spec[direction])


def _insert(rule: Object, field: str, c: Chooser, item: Object) -> None:
    """The item beside what the rule has."""
    items = list(rule.get(field) or [])
    items.insert(c.number(0, len(items)), item)
    rule[field] = items


def _peer_fault(*peers: Object) -> Fault:
    def apply(c: Chooser, spec: Object) -> None:
        who, rule = _some_rule(c, spec)
        _insert(rule, who, c, copy.deepcopy(c.pick(peers)))

    return apply


def _port_fault(*ports: Object) -> Fault:
    def apply(c: Chooser, spec: Object) -> None:
        _, rule = _some_rule(c, spec)
        _insert(rule, "ports", c, copy.deepcopy(c.pick(ports)))

    return apply


def _block_fault(cidr: str, *excepts: str) -> Fault:
    return _peer_fault(*({"ipBlock": {"cidr": cidr, "except": [part]}} for part in excepts))


def _selector_fault(selector: Object) -> Mapping[str, Fault]:
    """The same fault in a peer and in `spec.podSelector`."""

    def select(_: Chooser, spec: Object) -> None:
        spec["podSelector"] = copy.deepcopy(selector)

    return {"peer": _peer_fault({"podSelector": selector}, {"namespaceSelector": selector}), "target": select}


def _unknown_in_rule(c: Chooser, spec: Object) -> None:
    who, rule = _some_rule(c, spec)
    rule[c.pick(("form", "To", "to" if who == "from" else "from", "except"))] = []


def _unknown_in_spec(c: Chooser, spec: Object) -> None:
    spec[c.pick(("Egress", "ingres", "tier"))] = c.pick([[], {}, "Pass"])


def _types_fault(c: Chooser, spec: Object) -> None:
    spec["policyTypes"] = c.pick([["ingress"], ["Ingress", "egress"], [""], ["Both"]])


SELECTOR_FAULTS: Mapping[str, Object] = {
    "in-without-values": {"matchExpressions": [{"key": "app", "operator": "In"}]},
    "not-in-without-values": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": []}]},
    "exists-with-values": {"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["a"]}]},
    "does-not-exist-with-values": {"matchExpressions": [{"key": "app", "operator": "DoesNotExist", "values": ["a"]}]},
    "unknown-operator": {"matchExpressions": [{"key": "app", "operator": "in", "values": ["a"]}]},
    "no-operator": {"matchExpressions": [{"key": "app", "values": ["a"]}]},
    "no-key": {"matchExpressions": [{"operator": "Exists"}]},
    "bad-label-key": {"matchLabels": {"-app": "a"}},
    "bad-expression-key": {"matchExpressions": [{"key": "a/b/c", "operator": "DoesNotExist"}]},
    "unknown-in-selector": {"matchLabel": {"app": "a"}},
    "unknown-in-expression": {"matchExpressions": [{"key": "app", "operator": "Exists", "value": "a"}]},
}

FAULTS: Mapping[str, Fault] = {
    "empty-peer": _peer_fault({}, {"podSelector": None}, {"ipBlock": None, "namespaceSelector": None}),
    "block-beside-selector": _peer_fault(
        {"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}},
        {"ipBlock": {"cidr": "10.0.0.0/8"}, "namespaceSelector": {"matchLabels": {"app": "a"}}},
    ),
    "no-cidr": _peer_fault({"ipBlock": {}}, {"ipBlock": {"cidr": ""}}, {"ipBlock": {"cidr": None}}),
    "bad-cidr": _peer_fault(
        *(
            {"ipBlock": {"cidr": cidr}}
            for cidr in (
                "10.0.1.2",
                "10.0.0.0/255.0.0.0",
                "10.0.0.0/33",
                "fe80::%eth0/64",
                " 10.0.0.0/8",
                "10.0.0.0/+8",
                "10.0.0/8",
                "0x0a.0.0.0/8",
                "fd00::/129",
                "1:2:3:4:5:6:7::8/64",
                "10.0.0.256/24",
                "10.0.0.0/",
                "all",
            )
        )
    ),
    "except-equal": _block_fault("10.0.0.0/8", "10.0.0.0/8", "010.1.2.3/8"),
    "except-outside": _block_fault("10.0.1.0/24", "10.0.2.0/25"),
    "except-wider": _block_fault("10.0.1.0/24", "10.0.0.0/8", "0.0.0.0/0"),
    "except-other-family": _block_fault("::/0", "10.0.1.0/24", "::ffff:10.0.1.0/120"),
    "bad-except": _block_fault("0.0.0.0/0", "10.0.1.2", "", "10.0.1.0/255.255.255.0"),
    "port-out-of-range": _port_fault({"port": 0}, {"port": 65536}, {"port": -1}, {"port": 70000, "endPort": 80}),
    "port-as-text": _port_fault({"port": "80"}, {"port": "0"}),
    "bad-port-name": _port_fault(
        *({"port": name} for name in ("", "HTTP", "a--b", "-a", "a-", "a_b", "sixteen-letters-", "a b"))
    ),
    "bad-end-port": _port_fault(
        {"endPort": 90},
        {"port": "http", "endPort": 90},
        {"port": 80, "endPort": 79},
        {"port": 80, "endPort": 65536},
        {"port": 80, "endPort": 0},
    ),
    "bad-protocol": _port_fault(*({"protocol": name, "port": 80} for name in ("tcp", "", "ICMP", "ANY"))),
    "unknown-in-port": _port_fault({"port": 80, "endport": 90}, {"ports": 80}),
    "unknown-in-peer": _peer_fault({"podselector": {}}, {"podSelector": {}, "namespaceselector": {}}),
    "unknown-in-block": _peer_fault({"ipBlock": {"cidr": "10.0.0.0/8", "excepts": ["10.0.1.0/24"]}}),
    "unknown-in-rule": _unknown_in_rule,
    "unknown-in-spec": _unknown_in_spec,
    "bad-policy-type": _types_fault,
    **{
        f"{where}-{name}": fault
        for name, selector in SELECTOR_FAULTS.items()
        for where, fault in _selector_fault(selector).items()
    },
}


# ---------------------------------------------------------------- worlds and events


def make_world(c: Chooser, *, pods: int = 8, nodes: int = 2, policies: int = 5, faults: float = 0.0) -> list[Object]:
    """A whole world; a namespace is not seen now and then, an address is held twice."""
    world = [make_namespace(c, name) for name in NAMESPACES if not c.chance(0.08)]
    for i in range(pods):
        node = c.number(1, nodes)
        world.append(make_pod(c, c.pick(NAMESPACES), f"pod-{i}", node, i + 1))
    if c.chance(0.3):
        _share(c, world)
    world += [make_policy(c, c.pick(NAMESPACES), f"policy-{i}", faults) for i in range(policies)]
    return world


def _of_kind(world: Iterable[Object], kind: str) -> list[Object]:
    return [obj for obj in world if obj["kind"] == kind]


def _with_addresses(world: Iterable[Object]) -> list[Object]:
    """Pods that have addresses of their own."""
    return [pod for pod in _of_kind(world, "Pod") if pod["status"].get("podIP") and not pod["spec"].get("hostNetwork")]


def _new_name(world: Iterable[Object], prefix: str) -> tuple[str, int]:
    names = {obj["metadata"]["name"] for obj in world}
    index = next(i for i in range(len(names) + 1) if f"{prefix}-{i}" not in names)
    return f"{prefix}-{index}", index


def _nodes(world: Iterable[Object]) -> list[int]:
    names = {pod["spec"].get("nodeName") for pod in _of_kind(world, "Pod")}
    return sorted(int(name.removeprefix("node-")) for name in names if name) or [1]


def _share(c: Chooser, world: list[Object]) -> bool:
    """Two live pods hold the same addresses."""
    pods = _with_addresses(world)
    if len(pods) < 2:
        return False
    one = c.pick(pods)
    other = c.pick([pod for pod in pods if pod is not one])
    other["status"] = {**copy.deepcopy(one["status"]), "phase": "Running"}
    return True


Event = Callable[[Chooser, list[Object], float], bool]
"""Changes the list in place; False where there is nothing to change."""


def _pod_added(c: Chooser, world: list[Object], _: float) -> bool:
    name, index = _new_name(world, "pod")
    world.append(make_pod(c, c.pick(NAMESPACES), name, c.pick(_nodes(world)), index + 1))
    return True


def _removed(kind: str) -> Event:
    def event(c: Chooser, world: list[Object], _: float) -> bool:
        objects = _of_kind(world, kind)
        if objects:
            gone = c.pick(objects)
            world[:] = [obj for obj in world if obj is not gone]
        return bool(objects)

    return event


def _pod_relabelled(c: Chooser, world: list[Object], _: float) -> bool:
    pods = _of_kind(world, "Pod")
    if pods:
        c.pick(pods)["metadata"]["labels"] = make_labels(c)
    return bool(pods)


def _pod_finished(c: Chooser, world: list[Object], _: float) -> bool:
    pods = [p for p in _with_addresses(world) if p["status"]["phase"] not in ("Succeeded", "Failed")]
    if pods:
        c.pick(pods)["status"]["phase"] = c.pick(("Succeeded", "Failed"))
    return bool(pods)


def _pod_addressed(c: Chooser, world: list[Object], _: float) -> bool:
    pods = [pod for pod in _of_kind(world, "Pod") if not pod["status"].get("podIP")]
    if not pods:
        return False
    pod = c.pick(pods)
    index = int(pod["metadata"]["name"].removeprefix("pod-")) + 1
    node = int(pod["spec"].setdefault("nodeName", f"node-{c.pick(_nodes(world))}").removeprefix("node-"))
    v4, v6 = f"10.0.{node}.{index}", f"fd00::{node}:{index}"
    pod["status"] = _status(c.pick([[v4], [v4, v6], [v6]]), c.pick(("Running", "Pending")))
    return True


def _address_handed_on(c: Chooser, world: list[Object], _: float) -> bool:
    """The addresses of a pod that is gone or finished are given to another pod."""
    pods = _with_addresses(world)
    if len(pods) < 2:
        return False
    giver = c.pick(pods)
    taker = c.pick([pod for pod in pods if pod is not giver])
    taker["status"] = {**copy.deepcopy(giver["status"]), "phase": "Running"}
    taker["spec"]["nodeName"] = giver["spec"].get("nodeName", "node-1")
    if c.chance(0.5):
        giver["status"]["phase"] = "Succeeded"
    else:
        world[:] = [obj for obj in world if obj is not giver]
    return True


def _address_shared(c: Chooser, world: list[Object], _: float) -> bool:
    return _share(c, world)


def _host_network(c: Chooser, world: list[Object], _: float) -> bool:
    """A pod is made anew in the network of its node."""
    pods = _with_addresses(world)
    if pods:
        pod = c.pick(pods)
        _to_host_network(pod, int(pod["spec"].get("nodeName", "node-1").removeprefix("node-")))
    return bool(pods)


def _pod_moved(c: Chooser, world: list[Object], _: float) -> bool:
    """A pod is made anew, perhaps elsewhere, with other addresses."""
    pods = _with_addresses(world)
    if pods:
        pod = c.pick(pods)
        meta = pod["metadata"]
        index = int(meta["name"].removeprefix("pod-")) + 1
        made = make_pod(c, meta["namespace"], meta["name"], c.pick(_nodes(world)), index)
        world[:] = [made if obj is pod else obj for obj in world]
    return bool(pods)


def _namespace_added(c: Chooser, world: list[Object], _: float) -> bool:
    seen = {obj["metadata"]["name"] for obj in _of_kind(world, "Namespace")}
    missing = [name for name in NAMESPACES if name not in seen]
    if missing:
        world.append(make_namespace(c, c.pick(missing)))
    return bool(missing)


def _namespace_relabelled(c: Chooser, world: list[Object], _: float) -> bool:
    namespaces = _of_kind(world, "Namespace")
    if namespaces:
        namespace = c.pick(namespaces)
        namespace["metadata"]["labels"] = {**make_labels(c), NAME_LABEL: namespace["metadata"]["name"]}
    return bool(namespaces)


def _policy_added(c: Chooser, world: list[Object], faults: float) -> bool:
    world.append(make_policy(c, c.pick(NAMESPACES), _new_name(world, "policy")[0], faults))
    return True


def _policy_replaced(c: Chooser, world: list[Object], faults: float) -> bool:
    policies = _of_kind(world, "NetworkPolicy")
    if policies:
        policy = c.pick(policies)
        meta = policy["metadata"]
        policy["spec"] = make_policy(c, meta["namespace"], meta["name"], faults)["spec"]
    return bool(policies)


def _edited(edit: Callable[[Chooser, Object], None]) -> Event:
    def event(c: Chooser, world: list[Object], faults: float) -> bool:
        policies = _of_kind(world, "NetworkPolicy")
        if policies:
            policy = c.pick(policies)
            policy["spec"] = policy.get("spec") or {}
            edit(c, policy["spec"])
            if c.chance(faults):
                FAULTS[c.pick(sorted(FAULTS))](c, policy["spec"])
        return bool(policies)

    return event


def _edit_selector(c: Chooser, spec: Object) -> None:
    spec["podSelector"] = make_selector(c)


def _edit_rules(c: Chooser, spec: Object) -> None:
    direction = c.pick(("ingress", "egress"))
    spec[direction] = c.several(0, 2, lambda: make_rule(c, direction))


def _edit_peers(c: Chooser, spec: Object) -> None:
    who, rule = _some_rule(c, spec)
    rule[who] = c.several(0, 3, lambda: make_peer(c))


def _edit_ports(c: Chooser, spec: Object) -> None:
    rule = _some_rule(c, spec)[1]
    rule["ports"] = c.several(0, 3, lambda: make_port(c))


def _edit_block(c: Chooser, spec: Object) -> None:
    who, rule = _some_rule(c, spec)
    rule[who] = [*(rule.get(who) or [])[:2], {"ipBlock": make_block(c)}]


def _edit_except(c: Chooser, spec: Object) -> None:
    """Another set of exceptions of a block that is there, else of a new one."""
    who, rule = _some_rule(c, spec)
    blocks = [peer["ipBlock"] for peer in rule.get(who) or [] if peer.get("ipBlock")]
    parts = [block for block in blocks if _parts_of(block.get("cidr") or "")]
    if not parts:
        rule[who] = [{"ipBlock": {"cidr": "0.0.0.0/0", "except": [c.pick(_parts_of("0.0.0.0/0"))]}}]
        return
    block = c.pick(parts)
    block["except"] = c.several(0, 2, lambda: c.pick(_parts_of(block["cidr"])))


def _edit_types(c: Chooser, spec: Object) -> None:
    spec.pop("policyTypes", None)
    spec |= _types(c)


EVENTS: Mapping[str, Event] = {
    "pod added": _pod_added,
    "pod removed": _removed("Pod"),
    "pod relabelled": _pod_relabelled,
    "pod finished": _pod_finished,
    "pod given an address": _pod_addressed,
    "pod moved": _pod_moved,
    "pod to host network": _host_network,
    "address handed on": _address_handed_on,
    "address shared": _address_shared,
    "namespace added": _namespace_added,
    "namespace removed": _removed("Namespace"),
    "namespace relabelled": _namespace_relabelled,
    "policy added": _policy_added,
    "policy removed": _removed("NetworkPolicy"),
    "policy replaced": _policy_replaced,
    "policy selector edited": _edited(_edit_selector),
    "policy rules edited": _edited(_edit_rules),
    "policy peers edited": _edited(_edit_peers),
    "policy ports edited": _edited(_edit_ports),
    "policy block edited": _edited(_edit_block),
    "policy except edited": _edited(_edit_except),
    "policy types edited": _edited(_edit_types),
}


def make_event(c: Chooser, world: Sequence[Object], faults: float = 0.0) -> tuple[str, list[Object]]:
    """The name of what happened, and the world after it; the given one is left as it is."""
    changed = copy.deepcopy(list(world))
    for _ in range(5):
        name = c.pick(sorted(EVENTS))
        if EVENTS[name](c, changed, faults):
            return name, changed
    name = "policy added"
    EVENTS[name](c, changed, faults)
    return name, changed


def random_world(
    rng: random.Random, *, pods: int = 8, nodes: int = 2, policies: int = 5, faults: float = 0.0
) -> list[Object]:
    """A world out of a random generator."""
    return make_world(Chooser(rng.randint), pods=pods, nodes=nodes, policies=policies, faults=faults)


def random_event(rng: random.Random, objects: Sequence[Object], *, faults: float = 0.0) -> tuple[str, list[Object]]:
    """A change out of a random generator: its name and the new list of objects."""
    return make_event(Chooser(rng.randint), objects, faults)


# ---------------------------------------------------------------- probes


def _text(address: Address) -> str:
    kind = ipaddress.IPv4Address if address.family == 4 else ipaddress.IPv6Address
    return str(kind(address.value))


def _edges(block: Block) -> list[Address]:
    """The first and the last address of a block, and their neighbours outside it."""
    last = block.value | (1 << (BITS[block.family] - block.prefix)) - 1
    values = (block.value, last, block.value - 1, last + 1)
    return [Address(block.family, value) for value in values if 0 <= value < 1 << BITS[block.family]]


def _is_ordinary(text: str) -> bool:
    """An address that a packet can come from and go to."""
    address = ipaddress.ip_address(text)
    return not (
        address.is_multicast
        or address.is_unspecified
        or address.is_loopback
        or address.is_link_local
        or address.is_reserved
        or address == ipaddress.IPv4Address("255.255.255.255")
    )


def _rules(objects: Iterable[Object]) -> list[Object]:
    specs = [policy.get("spec") or {} for policy in _of_kind(objects, "NetworkPolicy")]
    return [rule for spec in specs for field in ("ingress", "egress") for rule in spec.get(field) or []]


def pod_addresses(objects: Iterable[Object]) -> list[str]:
    """Every address that a pod has or had, as text, sorted."""
    statuses = [pod.get("status") or {} for pod in _of_kind(objects, "Pod")]
    texts = [status.get("podIP") or "" for status in statuses]
    texts += [item["ip"] for status in statuses for item in status.get("podIPs") or []]
    found = {address for address in map(parse_address, texts) if address is not None}
    return [_text(address) for address in sorted(found)]


def edge_addresses(objects: Iterable[Object]) -> list[str]:
    """The edges of every readable block and exception, sorted."""
    peers = [peer for rule in _rules(objects) for who in ("from", "to") for peer in rule.get(who) or []]
    blocks = [peer.get("ipBlock") or {} for peer in peers]
    texts = [text for block in blocks for text in (block.get("cidr"), *(block.get("except") or [])) if text]
    parsed = [block for block in map(parse_cidr, texts) if block is not None]
    found = {_text(edge) for block in parsed for edge in _edges(block)}
    return sorted(text for text in found if _is_ordinary(text))


def interesting_ports(objects: Iterable[Object]) -> list[int]:
    """The ports of pods and policies and their neighbours, sorted."""
    objects = list(objects)
    found = {*PORTS}
    for rule in _rules(objects):
        for entry in rule.get("ports") or []:
            numbers = [entry.get("port"), entry.get("endPort")]
            found |= {n + d for n in numbers if isinstance(n, int) for d in (-1, 0, 1)}
    for pod in _of_kind(objects, "Pod"):
        for container in [*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or [])]:
            found |= {port["containerPort"] for port in container.get("ports") or []}
    return sorted(port for port in found if 1 <= port <= 65535)


def make_probe(c: Chooser, objects: Sequence[Object]) -> Probe:
    """One probe, both ends of one family; one end at least is a pod's where there is one."""
    v6 = c.chance(0.4)

    def of_family(texts: Sequence[str]) -> list[str]:
        return [text for text in texts if (":" in text) == v6]

    pods = of_family(pod_addresses(objects)) or of_family(OUTSIDE)
    others = c.pick([pods, of_family(edge_addresses(objects)) or pods, of_family(OUTSIDE)])
    ends = [c.pick(pods), c.pick(others)]
    src, dst = ends[::-1] if c.chance(0.5) else ends
    protocol = c.pick((*("TCP",) * 4, "UDP", "UDP", "SCTP", "SCTP", "ICMPv6" if v6 else "ICMP"))
    port = c.pick(interesting_ports(objects)) if protocol in PROTOCOLS else None
    return src, dst, protocol, port


def interesting_probes(objects: Sequence[Object], rng: random.Random, n: int) -> list[Probe]:
    """Probes biased to the addresses, ports and block edges of the world."""
    c = Chooser(rng.randint)
    return [make_probe(c, objects) for _ in range(n)]


# ---------------------------------------------------------------- strategies


def _chooser(draw: st.DrawFn) -> Chooser:
    return Chooser(lambda low, high: draw(st.integers(low, high)))


@st.composite
def namespaces(draw: st.DrawFn, name: str | None = None) -> Object:
    """A Namespace."""
    c = _chooser(draw)
    return make_namespace(c, name or c.pick(NAMESPACES))


@st.composite
def pods(draw: st.DrawFn, nodes: int = 2) -> Object:
    """A Pod."""
    c = _chooser(draw)
    index = c.number(0, 9)
    return make_pod(c, c.pick(NAMESPACES), f"pod-{index}", c.number(1, nodes), index + 1)


@st.composite
def policies(draw: st.DrawFn, faults: float = 0.0, name: str = "policy-0") -> Object:
    """A NetworkPolicy."""
    c = _chooser(draw)
    return make_policy(c, c.pick(NAMESPACES), name, faults)


@st.composite
def worlds(draw: st.DrawFn, *, pods: int = 6, nodes: int = 2, policies: int = 4, faults: float = 0.0) -> list[Object]:
    """A whole world of at most so many pods and policies."""
    c = _chooser(draw)
    some_pods, some_policies = c.number(1, pods), c.number(0, policies)
    return make_world(c, pods=some_pods, nodes=nodes, policies=some_policies, faults=faults)


@st.composite
def events(draw: st.DrawFn, objects: Sequence[Object], *, faults: float = 0.0) -> tuple[str, list[Object]]:
    """A change of a world: its name and the new list of objects."""
    return make_event(_chooser(draw), objects, faults)


@st.composite
def probes(draw: st.DrawFn, objects: Sequence[Object]) -> Probe:
    """A probe of a world."""
    return make_probe(_chooser(draw), objects)


@st.composite
def histories(
    draw: st.DrawFn, *, steps: int = 4, pods: int = 5, policies: int = 3, faults: float = 0.0
) -> list[tuple[str, list[Object]]]:
    """A world and what happens to it: each event's name with the world after it."""
    c = _chooser(draw)
    world = make_world(c, pods=c.number(1, pods), policies=c.number(0, policies), faults=faults)
    history = [("start", world)]
    for _ in range(c.number(1, steps)):
        history.append(make_event(c, history[-1][1], faults))
    return history
