"""The upstream end-to-end cases 1-48 of `semantics.md` as data: objects, and reachability written by hand.

The expectations follow the words of the Kubernetes suite (ExpectPeer, Expect, ExpectAllIngress): the default
is "connected", later expectations replace earlier ones, and a pod's way to itself is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

Object = dict[str, Any]
Addresses = Mapping[str, Sequence[str]]
"""Addresses by `namespace/pod`. All pods of a case need the same families; a family's lie in one /4."""

PROTOCOLS = ("TCP", "UDP", "SCTP")


# ---------------------------------------------------------------- objects


def namespace(name: str, labels: Mapping[str, str] | None = None) -> Object:
    """A Namespace; its name label is left to whoever reads it."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}


def serving(*ports: int) -> list[Object]:
    """One container for each port, all protocols, with names like `serve-80-tcp`."""
    return [
        {
            "name": f"cont-{port}-{protocol.lower()}",
            "ports": [{"name": f"serve-{port}-{protocol.lower()}", "containerPort": port, "protocol": protocol}],
        }
        for port in ports
        for protocol in PROTOCOLS
    ]


def pod(
    ref: str,
    labels: Mapping[str, str] | None = None,
    addresses: Sequence[str] = (),
    *,
    node: str = "node-1",
    containers: Sequence[Object] = (),
    phase: str = "Running",
) -> Object:
    """A Pod `namespace/name`."""
    space, _, name = ref.partition("/")
    status: Object = {"phase": phase}
    if addresses:
        status |= {"podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": space, "name": name, "labels": dict(labels or {})},
        "spec": {"nodeName": node, "containers": list(containers)},
        "status": status,
    }


def policy(ref: str, spec: Any = None) -> Object:
    """A NetworkPolicy `namespace/name`; without a spec it has none."""
    space, _, name = ref.partition("/")
    obj: Object = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": space, "name": name},
    }
    return obj if spec is None else {**obj, "spec": spec}


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Reachability:
    """Who is expected to reach whom; patterns: `*` is everyone, `x/*` a namespace."""

    endpoints: tuple[str, ...]
    table: Mapping[tuple[str, str], bool] = field(default_factory=dict)

    def expect(self, src: str, dst: str, connected: bool) -> Reachability:
        """A copy where every pair that matches the patterns is (not) connected."""
        pairs = [(s, d) for s in self.endpoints for d in self.endpoints]
        hits = {(s, d): connected for s, d in pairs if fnmatchcase(s, src) and fnmatchcase(d, dst)}
        if not hits:
            raise ValueError(f"{src} -> {dst} matches nothing")
        return replace(self, table={**self.table, **hits})

    def expect_all_ingress(self, endpoint: str, connected: bool) -> Reachability:
        """Everything that goes to the endpoint."""
        return self.expect("*", endpoint, connected)

    def expect_all_egress(self, endpoint: str, connected: bool) -> Reachability:
        """Everything that comes from the endpoint."""
        return self.expect(endpoint, "*", connected)

    def pairs(self) -> Iterator[tuple[str, str, bool]]:
        """Source, destination, connected: every ordered pair but those of an endpoint with itself."""
        for src in self.endpoints:
            for dst in self.endpoints:
                if src != dst:
                    yield src, dst, self.table.get((src, dst), True)


@dataclass(frozen=True)
class Probe:
    """A protocol and port with what is expected of them; ICMP stands for ICMPv6 too."""

    protocol: str
    port: int | None
    expected: Reachability


PolicySource = Object | Callable[[Addresses], Object]


@dataclass(frozen=True)
class Step:
    """The state of the cluster at one moment, and the probes made of it."""

    policies: tuple[PolicySource, ...]
    probes: tuple[Probe, ...]
    namespaces: Mapping[str, Mapping[str, str]]
    pods: Mapping[str, Mapping[str, str]]
    """Labels by `namespace/pod`."""
    ports: tuple[int, ...] = (80, 81)
    """What every pod serves, on TCP, UDP and SCTP."""


@dataclass(frozen=True)
class Case:
    """A case and its steps, which follow each other on the same pods."""

    number: int
    title: str
    protocol: str
    steps: tuple[Step, ...]


def policies(step: Step, addresses: Addresses) -> list[Object]:
    """The policies of a step; those that speak of pod addresses are made here."""
    return [source(addresses) if callable(source) else source for source in step.policies]


def objects(step: Step, addresses: Addresses) -> list[Object]:
    """All objects of a step, the pods with the given addresses."""
    return [
        *(namespace(name, labels) for name, labels in step.namespaces.items()),
        *(pod(ref, labels, addresses[ref], containers=serving(*step.ports)) for ref, labels in step.pods.items()),
        *policies(step, addresses),
    ]


# ---------------------------------------------------------------- the suite's own cluster

PODS = tuple(f"{space}/{name}" for space in "xyz" for name in "abc")
OPEN = Reachability(PODS)


def _step(
    given: Sequence[PolicySource],
    *probes: tuple[str, int, Reachability],
    labels: Mapping[str, Mapping[str, str]] | None = None,
) -> Step:
    """A step; `labels` adds to those of a namespace (`y`) or a pod (`x/b`)."""
    more = labels or {}
    return Step(
        policies=tuple(given),
        probes=tuple(Probe(*probe) for probe in probes),
        namespaces={space: dict(more.get(space, {})) for space in "xyz"},
        pods={ref: {"pod": ref[-1], **more.get(ref, {})} for ref in PODS},
    )


def _np(
    ref: str,
    selector: Object,
    *,
    ingress: Sequence[Object] | None = None,
    egress: Sequence[Object] | None = None,
) -> Object:
    """A policy with `policyTypes` set by what it has, as the suite's helpers do."""
    spec: Object = {"podSelector": selector, "policyTypes": []}
    if ingress is not None:
        spec["policyTypes"].append("Ingress")
        spec["ingress"] = list(ingress)
    if egress is not None:
        spec["policyTypes"].append("Egress")
        spec["egress"] = list(egress)
    return policy(ref, spec)


def _labelled(**labels: str) -> Object:
    return {"matchLabels": labels}


def _name_is(space: str) -> Object:
    return {"matchLabels": {"kubernetes.io/metadata.name": space}}


def _expr(key: str, operator: str, *values: str) -> Object:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


def _name(operator: str, *values: str) -> Object:
    return _expr("kubernetes.io/metadata.name", operator, *values)


A, B = _labelled(pod="a"), _labelled(pod="b")


def _deny_ingress(protocol: str) -> tuple[Step, ...]:
    """Nothing comes into x, from x neither."""
    return (_step([_np("x/deny-ingress", {}, ingress=[])], (protocol, 80, OPEN.expect("*", "x/*", False))),)


def _from_one_pod(protocol: str) -> tuple[Step, ...]:
    """Of all pods only y/a reaches x/a."""
    rule = {"from": [{"namespaceSelector": _name_is("y"), "podSelector": A}]}
    return (
        _step(
            [_np("x/allow-ns-y-pod-a-via-namespace-pod-selector", A, ingress=[rule])],
            (protocol, 80, OPEN.expect_all_ingress("x/a", False).expect("y/a", "x/a", True)),
        ),
    )


def _y_on_port(number: int, protocol: str) -> Object:
    """x/a open to the pods of y on one port."""
    rule = {
        "from": [{"namespaceSelector": _name_is("y")}],
        "ports": [{"port": number, "protocol": protocol}],
    }
    return _np(f"x/allow-client-a-via-ns-selector-{number}", A, ingress=[rule])


ONLY_Y_TO_A = OPEN.expect("x/*", "x/a", False).expect("y/*", "x/a", True).expect("z/*", "x/a", False)


def _port_81_from_y(protocol: str) -> tuple[Step, ...]:
    return (_step([_y_on_port(81, protocol)], (protocol, 81, ONLY_Y_TO_A)),)


def _tcp(given: Sequence[PolicySource], expected: Reachability, port: int = 80) -> Step:
    return _step(given, ("TCP", port, expected))


def _pod_selector(peer: Object) -> tuple[Step, ...]:
    policies_ = [_np("x/x-a-allows-x-b", A, ingress=[{"from": [{"podSelector": peer}]}])]
    return (_tcp(policies_, OPEN.expect_all_ingress("x/a", False).expect("x/b", "x/a", True)),)


def _only_namespace_y(peer: Object) -> tuple[Step, ...]:
    policies_ = [_np("x/allow-ns-y", A, ingress=[{"from": [{"namespaceSelector": peer}]}])]
    return (_tcp(policies_, OPEN.expect("x/*", "x/a", False).expect("z/*", "x/a", False)),)


def _peers(name: str, *peers: Object) -> list[PolicySource]:
    return [_np(f"x/{name}", A, ingress=[{"from": list(peers)}])]


def _stacked() -> tuple[Step, ...]:
    port_81, port_80 = _y_on_port(81, "TCP"), _y_on_port(80, "TCP")
    return (
        _step(
            [port_81],
            ("TCP", 81, ONLY_Y_TO_A),
            ("TCP", 80, OPEN.expect_all_ingress("x/a", False)),
        ),
        _step([port_81, port_80], ("TCP", 80, ONLY_Y_TO_A)),
    )


def _named_from_y() -> tuple[Step, ...]:
    rule = {
        "from": [{"namespaceSelector": _name_is("y")}],
        "ports": [{"port": "serve-80-tcp", "protocol": "TCP"}],
    }
    return (
        _step(
            [_np("x/allow-client-a-via-ns-selector-80", A, ingress=[rule])],
            ("TCP", 80, OPEN.expect("x/*", "x/a", False).expect("z/*", "x/a", False)),
            ("TCP", 81, OPEN.expect_all_ingress("x/a", False)),
        ),
    )


def _namespace_relabelled() -> tuple[Step, ...]:
    given = _peers("allow-client-a-via-ns-selector", {"namespaceSelector": _labelled(ns2="updated")})
    closed = OPEN.expect_all_ingress("x/a", False)
    return (
        _tcp(given, closed),
        _step(given, ("TCP", 80, closed.expect("y/*", "*", True)), labels={"y": {"ns2": "updated"}}),
    )


def _peer_relabelled() -> tuple[Step, ...]:
    given = _peers("allow-client-a-via-pod-selector", {"podSelector": _labelled(pod="b", pod2="updated")})
    closed = OPEN.expect_all_ingress("x/a", False)
    return (
        _tcp(given, closed),
        _step(given, ("TCP", 80, closed.expect("x/b", "x/a", True)), labels={"x/b": {"pod2": "updated"}}),
    )


def _target_relabelled() -> tuple[Step, ...]:
    given = [_np("x/deny-ingress-via-label-selector", _labelled(target="isolated"), ingress=[])]
    return (
        _tcp(given, OPEN),
        _step(
            given,
            ("TCP", 80, OPEN.expect_all_ingress("x/a", False)),
            labels={"x/a": {"target": "isolated"}},
        ),
    )


def _both_directions() -> tuple[Step, ...]:
    given = _np("x/allow-client-a-via-pod-selector", A, ingress=[{"from": [{"podSelector": B}]}])
    given["spec"] |= {"egress": [{"ports": [{"port": 80}]}], "policyTypes": ["Egress", "Ingress"]}
    port_80 = OPEN.expect_all_ingress("x/a", False).expect("x/b", "x/a", True)
    port_81 = OPEN.expect_all_ingress("x/a", False).expect_all_egress("x/a", False).expect("x/b", "x/a", True)
    return (_step([given], ("TCP", 80, port_80), ("TCP", 81, port_81)),)


def _client_denied() -> tuple[Step, ...]:
    to_ya = {"to": [{"namespaceSelector": _name_is("y"), "podSelector": A}]}
    from_xa = {"from": [{"namespaceSelector": _name_is("x"), "podSelector": A}]}
    expected = (
        OPEN.expect("x/a", "*", False).expect("*", "y/a", False).expect("x/a", "y/a", True).expect("*", "y/b", False)
    )
    return (
        _tcp(
            [
                _np("x/allow-to-ns-y-pod-a", A, egress=[to_ya]),
                _np("y/allow-from-xa-on-ya-match-selector", A, ingress=[from_xa]),
                _np("y/allow-from-xa-on-yb-match-selector", B, ingress=[from_xa]),
            ],
            expected,
        ),
    )


def _overridden(direction: str, closed: Reachability) -> tuple[Step, ...]:
    """A policy for port 80, then another one for everything; port 81 is probed."""
    port_80 = _np(f"x/allow-{direction}-port-80", {}, **{direction: [{"ports": [{"port": 80}]}]})
    everything = _np(f"x/allow-{direction}", {}, **{direction: [{}]})
    return (_tcp([port_80], closed, 81), _tcp([port_80, everything], OPEN, 81))


def _host_block(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def _large_block(address: str) -> str:
    """The /4 that contains the address."""
    if ":" in address:
        first = int(address.split(":")[0] or "0", 16)
        return f"{first & 0xF000:x}::/4"
    return f"{int(address.split('.')[0]) & 0xF0}.0.0.0/4"


def _to_blocks(name: str, target: str, *, around: bool) -> Callable[[Addresses], Object]:
    """Egress of x/a to the addresses of the target alone, or to all `around` it without it."""

    def build(addresses: Addresses) -> Object:
        blocks: list[Object] = []
        for address in addresses[target]:
            host = _host_block(address)
            blocks.append({"cidr": _large_block(address), "except": [host]} if around else {"cidr": host})
        return _np(f"x/{name}", A, egress=[{"to": [{"ipBlock": block} for block in blocks]}])

    return build


def _allow_excepted() -> tuple[Step, ...]:
    name = "allow-client-a-via-cidr-egress-rule"
    return (
        _tcp([_to_blocks(name, "x/b", around=True)], OPEN.expect("x/a", "x/b", False)),
        _tcp(
            [_to_blocks(name, "x/b", around=False)],
            OPEN.expect_all_egress("x/a", False).expect("x/a", "x/b", True),
        ),
    )


def _independent() -> tuple[Step, ...]:
    egress = _np("x/allow-egress-for-target", A, egress=[{}])
    ingress = _np("x/deny-ingress-via-label-selector", A, ingress=[])
    return (_tcp([egress], OPEN), _tcp([egress, ingress], OPEN.expect_all_ingress("x/a", False)))


def _only_on(protocol: str, number: int) -> Object:
    rule = {"ports": [{"port": number, "protocol": protocol}]}
    return _np(f"x/allow-only-{protocol.lower()}-ingress-on-port-{number}", A, ingress=[rule])


def _cases() -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Title, protocol and steps in the order of the suite."""
    deny_all = _np("x/deny-all", {}, ingress=[], egress=[])
    closed_x = OPEN.expect("x/*", "*", False).expect("*", "x/*", False)
    a_closed = OPEN.expect_all_ingress("x/a", False)
    to_a = _np("x/allow-all-to-a", A, ingress=[{"from": [{"podSelector": {}, "namespaceSelector": {}}]}])
    not_x, b_or_c = _name("NotIn", "x"), _expr("pod", "In", "b", "c")

    yield "default deny ingress", "TCP", _deny_ingress("TCP")
    yield "default deny all", "TCP", (_tcp([deny_all], closed_x),)
    yield "podSelector in own namespace", "TCP", _pod_selector(B)
    yield (
        "deny all plus allow all to a",
        "TCP",
        (
            _tcp(
                [_np("x/deny-all", {}, ingress=[]), to_a],
                OPEN.expect_all_ingress("x/a", True).expect_all_ingress("x/b", False).expect_all_ingress("x/c", False),
            ),
        ),
    )
    yield "from all namespaces", "TCP", (_tcp(_peers("allow", {"namespaceSelector": {"matchLabels": {}}}), OPEN),)
    yield "namespaceSelector, other namespace only", "TCP", _only_namespace_y(_name_is("y"))
    yield "podSelector matchExpressions", "TCP", _pod_selector(_expr("pod", "In", "b"))
    yield "namespaceSelector matchExpressions", "TCP", _only_namespace_y(_name("In", "y"))
    yield (
        "pod OR namespace",
        "TCP",
        (
            _tcp(
                _peers("allow-or", {"namespaceSelector": not_x}, {"podSelector": B}),
                OPEN.expect("x/a", "x/a", False).expect("x/c", "x/a", False),
            ),
        ),
    )
    yield (
        "pod AND namespace",
        "TCP",
        (
            _tcp(
                _peers("allow-and", {"namespaceSelector": not_x, "podSelector": B}),
                a_closed.expect("y/b", "x/a", True).expect("z/b", "x/a", True),
            ),
        ),
    )
    yield (
        "several pod and namespace selectors",
        "TCP",
        (
            _tcp(
                _peers("allow-ns-y-z-pod-b-c", {"namespaceSelector": not_x, "podSelector": b_or_c}),
                OPEN.expect("x/*", "x/a", False).expect("y/a", "x/a", False).expect("z/a", "x/a", False),
            ),
        ),
    )
    yield (
        "any of two podSelectors",
        "TCP",
        (
            _tcp(
                _peers("allow-ns-x-pod-b-c", {"podSelector": B}, {"podSelector": _labelled(pod="c")}),
                a_closed.expect("x/b", "x/a", True).expect("x/c", "x/a", True),
            ),
        ),
    )
    yield "one pod of another namespace", "TCP", _from_one_pod("TCP")
    yield "port 81 from namespace y", "TCP", _port_81_from_y("TCP")
    yield "stacked policies, 81 then 80", "TCP", _stacked()
    yield (
        "allow all",
        "TCP",
        (_step([_np("x/allow-all", {}, ingress=[{}])], ("TCP", 80, OPEN), ("TCP", 81, OPEN)),),
    )
    yield (
        "ingress named port",
        "TCP",
        (
            _step(
                [_np("x/allow-all", {}, ingress=[{"ports": [{"port": "serve-81-tcp"}]}])],
                ("TCP", 81, OPEN),
                ("TCP", 80, OPEN.expect("*", "x/*", False)),
            ),
        ),
    )
    yield "ingress named port from a namespace", "TCP", _named_from_y()
    yield (
        "egress named port",
        "TCP",
        (
            _step(
                [_np("x/allow-egress", {}, egress=[{"ports": [{"port": "serve-80-tcp"}]}])],
                ("TCP", 80, OPEN),
                ("TCP", 81, OPEN.expect("x/*", "*", False)),
            ),
        ),
    )
    yield (
        "policy updated from allow to deny",
        "TCP",
        (
            _tcp([_np("x/allow-all-mutate-to-deny-all", {}, ingress=[{}])], OPEN, 81),
            _tcp([_np("x/allow-all-mutate-to-deny-all", {}, ingress=[])], OPEN.expect("*", "x/*", False), 81),
        ),
    )
    yield "namespace relabelled", "TCP", _namespace_relabelled()
    yield "peer pod relabelled", "TCP", _peer_relabelled()
    yield (
        "deny other namespaces",
        "TCP",
        (
            _tcp(
                [_np("x/deny-empty-policy", {}, ingress=[{"from": [{"podSelector": {"matchLabels": {}}}]}])],
                OPEN.expect("y/*", "x/*", False).expect("z/*", "x/*", False),
            ),
        ),
    )
    yield "target pod relabelled into isolation", "TCP", _target_relabelled()
    yield (
        "deny egress by podSelector",
        "TCP",
        (_tcp([_np("x/deny-egress-pod-a", A, egress=[])], OPEN.expect_all_egress("x/a", False)),),
    )
    yield (
        "deny egress of a namespace",
        "TCP",
        (_tcp([_np("x/deny-egress-ns-x", {}, egress=[])], OPEN.expect("x/*", "*", False)),),
    )
    yield "both directions in one policy", "TCP", _both_directions()
    yield "client's egress deny beats server's allow", "TCP", _client_denied()
    to_ya = {"to": [{"namespaceSelector": _name_is("y"), "podSelector": A}]}
    yield (
        "egress to namespace and pod",
        "TCP",
        (
            _tcp(
                [_np("x/allow-to-ns-y-pod-a", A, egress=[to_ya])],
                OPEN.expect_all_egress("x/a", False).expect("x/a", "y/a", True),
            ),
        ),
    )
    yield (
        "protocol-only port",
        "TCP",
        (
            _step(
                [_np("x/allow-ingress-by-proto", A, ingress=[{"ports": [{"protocol": "TCP"}]}])],
                ("TCP", 80, OPEN),
                ("UDP", 80, OPEN.expect("*", "x/a", False)),
            ),
        ),
    )
    yield "ingress allow-all overrides restrictive", "TCP", _overridden("ingress", OPEN.expect("*", "x/*", False))
    yield "egress allow-all overrides restrictive", "TCP", _overridden("egress", OPEN.expect("x/*", "*", False))
    yield "policy deleted", "TCP", (_tcp([deny_all], closed_x), _tcp([], OPEN))
    name = "allow-client-a-via-cidr-egress-rule"
    yield (
        "egress to a pod's address as CIDR",
        "TCP",
        (
            _tcp(
                [_to_blocks(name, "y/b", around=False)],
                OPEN.expect_all_egress("x/a", False).expect("x/a", "y/b", True),
            ),
        ),
    )
    yield (
        "CIDR with except",
        "TCP",
        (_tcp([_to_blocks(name, "x/b", around=True)], OPEN.expect("x/a", "x/b", False)),),
    )
    yield "except changed to allow", "TCP", _allow_excepted()
    yield "ingress and egress independent", "TCP", _independent()
    yield (
        "SCTP not taken for TCP",
        "TCP",
        (
            _tcp(
                [_np("x/deny-ingress", {}, ingress=[]), _only_on("SCTP", 81)],
                OPEN.expect("*", "x/*", False),
                81,
            ),
        ),
    )
    yield "SCTP-only rule still isolates", "TCP", (_tcp([_only_on("SCTP", 80)], a_closed, 81),)
    yield "UDP-only does not allow TCP", "TCP", (_tcp([_only_on("UDP", 81)], a_closed, 81),)
    yield "metadata.name in matchLabels", "TCP", _only_namespace_y(_name_is("y"))
    not_y = {"to": [{"namespaceSelector": _name("NotIn", "y")}]}
    yield (
        "metadata.name NotIn, egress",
        "TCP",
        (_tcp([_np("x/allow-not-y", A, egress=[not_y])], OPEN.expect("x/a", "y/*", False)),),
    )
    for protocol in ("UDP", "SCTP"):
        yield f"default deny ingress, {protocol}", protocol, _deny_ingress(protocol)
        yield f"port 81 from namespace y, {protocol}", protocol, _port_81_from_y(protocol)
        yield f"one pod of another namespace, {protocol}", protocol, _from_one_pod(protocol)


CASES = tuple(Case(number, *case) for number, case in enumerate(_cases(), start=1))
