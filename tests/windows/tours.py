"""Small worlds that follow each other in turn, each tour a kind of change, with probes to whom the order matters.

The pod `web` of this node is isolated. `peer` may always reach it on UDP 80, by one rule or another;
`stranger` never may.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.dataplane.scenes import Object, namespace, pod, policy
from tests.windows.frames import Probe
from tests.windows.promise import Objects

WEB, OTHER, PEER, STRANGER, FRIEND = 1, 2, 1, 2, 3


class Tour(NamedTuple):
    worlds: Sequence[Objects]
    probes: Sequence[Probe]


def _of_both(source: tuple[int, int], destination: tuple[int, int], port: int = 80) -> list[Probe]:
    """The probe between two (node, number) in both families."""
    v4, v6 = ("10.0.{}.{}", "fd00::{}:{:x}")
    return [(text.format(*source), text.format(*destination), "UDP", port) for text in (v4, v6)]


PROBES = [
    *_of_both((2, PEER), (1, WEB)),
    *_of_both((2, STRANGER), (1, WEB)),
    *_of_both((2, FRIEND), (1, WEB)),
    *_of_both((2, STRANGER), (1, WEB), 81),
]


def _peer(**labels: str) -> Object:
    return pod("peer", 2, PEER, **labels)


def _base(*objects: Object, web: dict[str, str] | None = None) -> Objects:
    """Two namespaces, the pods, and what else is given; a pod of the same name replaces the usual one."""
    usual = [
        namespace("x"),
        namespace("y", team="a"),
        pod("web", 1, WEB, {"http": 80}, **(web or {"app": "web"})),
        _peer(role="a"),
        pod("stranger", 2, STRANGER, role="none"),
        pod("y/friend", 2, FRIEND, role="a"),
    ]
    for one in usual:  # named ports are of protocol UDP here
        for container in one.get("spec", {}).get("containers", ()):
            container["ports"] = [{**port, "protocol": "UDP"} for port in container["ports"]]
    own = {(o["kind"], o["metadata"]["name"]) for o in objects}
    return [*(o for o in usual if (o["kind"], o["metadata"]["name"]) not in own), *objects]


def _roles(*roles: str, ports: Sequence[Any] = (80,)) -> list[Object]:
    """One rule for each role."""
    return [{"from": [{"podSelector": {"matchLabels": {"role": role}}}], "ports": _udp(*ports)} for role in roles]


def _udp(*ports: Any) -> list[Object]:
    return [{"protocol": "UDP", "port": port} for port in ports]


def _blocks(*blocks: Object, ports: Sequence[Any] = (80,)) -> list[Object]:
    return [{"from": [{"ipBlock": block} for block in blocks], "ports": _udp(*ports)}]


def _web(*rules: Object, name: str = "web", selects: dict[str, str] | None = None) -> Object:
    return policy(name, selects or {"app": "web"}, ingress=list(rules))


def _many(skip: int) -> list[Object]:
    """More blocks than are matched natively, and the peer's; IPv4 and IPv6."""
    v4 = [{"cidr": f"10.7.{number}.0/24"} for number in range(0, 40, 2) if number != skip]
    v6 = [{"cidr": f"fd07:{number:x}::/32"} for number in range(0, 40, 2) if number != skip]
    return [*v4, *v6, {"cidr": "10.0.2.1/32"}, {"cidr": "fd00::2:1/128"}]


def _spans(objects: Objects, team: str) -> Objects:
    """The namespace y gets another label."""
    changed = copy.deepcopy(objects)
    next(o for o in changed if o["kind"] == "Namespace" and o["metadata"]["name"] == "y")["metadata"]["labels"] = {
        "team": team
    }
    return changed


def _tours() -> dict[str, Tour]:
    by_role = _web(*_roles("a", "b"))
    by_team = _web(*({"from": [{"namespaceSelector": {"matchLabels": {"team": t}}}], "ports": _udp(80)} for t in "ab"))
    either = _web(
        {
            "from": [
                {"podSelector": {"matchExpressions": [{"key": "role", "operator": "In", "values": values}]}}
                for values in (["a"], ["b"])
            ],
            "ports": _udp(80, 8080),
        }
    )
    named = _web({"from": [{"podSelector": {"matchLabels": {"role": "a"}}}], "ports": _udp("http")})
    whole = {"cidr": "10.0.2.0/24", "except": ["10.0.2.2/32"]}
    whole6 = {"cidr": "fd00::2:0/112", "except": ["fd00::2:2/128"]}
    wide = {"cidr": "10.0.0.0/16", "except": ["10.0.2.2/31"]}
    wide6 = {"cidr": "fd00::/96", "except": ["fd00::2:2/127"]}
    api = {"app": "api"}
    base = _base(by_team)
    out = policy("out", {"app": "web"}, egress=[{"to": r["from"], "ports": r["ports"]} for r in _roles("a", "b")])
    there = _of_both((1, WEB), (2, PEER)) + _of_both((1, WEB), (2, STRANGER))
    both_classes = [_web(*_roles("a")), _web(*_roles("a", "c"), name="api", selects=api)]
    starting = _base(named, pod("second", 1, OTHER, {"http": 80}, app="web"))
    for container in starting[-1]["spec"]["containers"]:
        container["ports"][0]["protocol"] = "UDP"
    idle = copy.deepcopy(starting)
    idle[-1]["metadata"]["labels"] = {"app": "idle"}
    second = _of_both((2, PEER), (1, OTHER)) + _of_both((2, STRANGER), (1, OTHER))
    return {
        "a peer moves between two rules of a policy": Tour([_base(by_role), _base(by_role, _peer(role="b"))], PROBES),
        "a peer moves beside others": Tour(
            [_base(by_role, pod("third", 2, 9, role=role)) for role in ("a", "b")], PROBES
        ),
        "a peer moves between two peers of a rule": Tour([_base(either), _base(either, _peer(role="b"))], PROBES),
        "a peer moves between two ports' rules": Tour(
            [
                _base(_web(*_roles("a", ports=(80, 81)), *_roles("b", ports=(80, 82))), *peer)
                for peer in ((), (_peer(role="b"),))
            ],
            PROBES,
        ),
        "a namespace is relabelled": Tour([base, _spans(base, "b")], PROBES),
        "a policy gets other peers": Tour(
            [_base(_web(*_roles(*roles)), _peer(role="a", tier="c")) for roles in ("a", "ab", "ba")]
            + [
                _base(
                    _web({"from": [{"podSelector": {"matchLabels": {"tier": "c"}}}], "ports": _udp(80)}),
                    _peer(role="a", tier="c"),
                )
            ],
            PROBES,
        ),
        "a policy gets other ports": Tour(
            [_base(_web(*_roles("a", ports=ports))) for ports in ((80,), (80, 82), (443, 80))], PROBES
        ),
        "a policy gets other blocks": Tour(
            [_base(_web(*_blocks(*blocks))) for blocks in ((whole, whole6), (wide, wide6), _many(2), _many(4))], PROBES
        ),
        "a policy selects by another label": Tour(
            [
                _base(_web(*_roles("a"), selects=selects), web={"app": "web", "tier": "front"})
                for selects in ({"app": "web"}, {"tier": "front"})
            ],
            PROBES,
        ),
        "a policy takes another's place": Tour(
            [_base(_web(*_roles("a"), name=name)) for name in ("first", "second")], PROBES
        ),
        "a policy is added and deleted": Tour(
            [_base(by_role), _base(by_role, _web(*_roles("c"), name="more", selects={}))], PROBES
        ),
        "the only policy is added and deleted": Tour([_base(), _base(by_role)], PROBES),
        "a pod moves between classes": Tour([_base(*both_classes, web=w) for w in ({"app": "web"}, api)], PROBES),
        "a pod with a named port moves into isolation and out of it": Tour([starting, idle], PROBES + second),
        "a pod with a named port starts and stops": Tour([starting, starting[:-1]], PROBES + second),
        "egress: a peer moves between two rules of a policy": Tour([_base(out), _base(out, _peer(role="b"))], there),
        "a policy, a pod and a namespace at once": Tour(
            [
                _base(by_team, _web(*_roles("a"), name="more"), web={"app": "web", "tier": "front"}),
                _spans(_base(by_team, _web(*_roles("a", "b"), name="more"), _peer(role="a", tier="c")), "b"),
            ],
            PROBES,
        ),
    }


TOURS = _tours()
