"""Sets that hold more than the 65,536 members at which an ipset made without thought is full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

import msgspec
import pytest

from agent.core.node import Node
from agent.core.objects import decode_pod
from tests.dataplane.kernel import Kernel
from tests.dataplane.scenes import Agent, Object, namespace, pod, policy

pytestmark = pytest.mark.root
PODS = 70_000
FIRST4, FIRST6 = int(IPv4Address("10.128.0.1")), int(IPv6Address("fd00::128:0:1"))


def addresses(number: int) -> list[str]:
    return [str(IPv4Address(FIRST4 + number)), str(IPv6Address(FIRST6 + number))]


def apply(node: Node, numbers: Iterable[int]) -> None:
    template = pod("friend", 2, 1, {"http": 8080}, app="friend")
    for number in numbers:
        v4, v6 = addresses(number)
        template["metadata"] |= {"name": f"friend-{number}", "uid": str(number)}
        template["status"] |= {"podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]}
        node.apply_pod(decode_pod(msgspec.json.encode(template)))
    node.compile()


def expected(numbers: Iterable[int]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"4-p": set(), "6-p": set(), "4-n": set(), "6-n": set()}
    for number in numbers:
        for version, text in zip("46", addresses(number)):
            found[f"{version}-p"].add(text)
            found[f"{version}-n"].add(f"{text},tcp:8080")
    return found


def held(kernel: Kernel) -> dict[str, set[str]]:
    found = defaultdict(set)
    for line in kernel.saved_sets().splitlines():
        verb, name, member = line.split(" ", 2)
        if verb == "add":
            found[name[3:6]].add(member)
    return dict(found)


@pytest.mark.parametrize("backend", ["nft"])  # a set is the same to both
def test_more_than_65536_members(backend: str, kernel: Kernel) -> None:
    """Peers and named ports of both families: filled at once, grown over the mark one by one and in bulk, shrunk."""
    everyone: Object = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "friend"}}}
    out = policy("out", {"app": "web"}, egress=[{"to": [everyone]}, {"to": [everyone], "ports": [{"port": "http"}]}])
    with Agent(backend, [namespace("x"), pod("web", 1, 1, app="web"), out]) as agent:
        apply(agent.node, range(65_530))
        report = agent.sync()
        assert report.members_added == 4 * 65_530
        assert held(kernel) == expected(range(65_530))

        for number in range(65_530, 65_540):
            apply(agent.node, [number])
            assert agent.sync().members_added == 4
        apply(agent.node, range(65_540, PODS))
        assert agent.sync().members_added == 4 * (PODS - 65_540)
        assert held(kernel) == expected(range(PODS))

        assert agent.resync().writes == 0

        for number in range(10, 20):
            agent.node.delete_pod(f"x/friend-{number}")
        agent.node.compile()
        assert agent.sync().members_deleted == 40
        for number in range(1000, PODS):
            agent.node.delete_pod(f"x/friend-{number}")
        agent.node.compile()
        assert agent.sync().members_deleted == 4 * (PODS - 1000)
        assert held(kernel) == expected({*range(1000)} - {*range(10, 20)})
