"""A pod's isolation is in force no later than its allowances (semantics.md line 45), after each step of a plan.

What a pod is allowed by its own policies, and what others' policies allow it, are both its allowances: so what neither
the state without it nor the state with it lets pass does not pass in between, whichever end denies it."""

from __future__ import annotations

import random

import pytest

from agent.core.addresses import Address, format_address
from agent.core.node import Node
from agent.dataplane.plan import Operation, plan
from agent.dataplane.render import OPTIONS
from tests import oracle, test_model, worlds
from tests.dataplane.scenes import namespace, pod, pods_with, policy
from tests.nodes import Kernel, change, node_of
from tests.windows.promise import Objects

NODE = "node-1"


def early(before: Objects, after: Objects, rng: random.Random) -> list[str]:
    """What passes to and from addresses new on the node that must not, while a node goes from one to the other."""
    node, kernel = node_of(before, NODE), Kernel()
    kernel.sync(node, everything=True)
    known = frozenset(node.cluster.judged)
    change(node, before, after)
    started = [format_address(a) for a in node.cluster.judged - known]
    others = [a for a in (*worlds.pod_addresses(after), "192.0.2.1", "2001:db8::1") if a not in started]
    ends = [(a, b) for a in started for b in others if (":" in a) == (":" in b)]
    ports = rng.sample(worlds.interesting_ports(after), 3)
    probes = [(*pair, "TCP", port) for a, b in ends for pair in ((a, b), (b, a)) for port in ports]
    shut = []
    for src, dst, protocol, port in probes:
        verdicts = [
            oracle.allowed(world, src=src, dst=dst, protocol=protocol, port=port, node=NODE).allowed
            for world in (before, after)
        ]
        if not any(verdicts):
            shut.append((src, dst, protocol, port))
    operations = plan(node, node.journal(), kernel.mirror, OPTIONS, everything=False, known=known)
    return [
        f"{probe} passes after {step}" for step in kernel.steps(operations) for probe in shut if kernel.passes(*probe)
    ]


class Knowing(Kernel):
    """A kernel whose agent knows which addresses its pods had before, as the dataplane does."""

    def __init__(self) -> None:
        super().__init__()
        self.known: frozenset[Address] | None = None

    def operations(self, node: Node, *, everything: bool = False) -> list[Operation]:
        known, self.known = self.known, frozenset(node.cluster.judged)
        return plan(node, node.journal(), self.mirror, OPTIONS, everything=everything, known=known)


@pytest.mark.parametrize("seed", range(30))
def test_no_window_where_pods_start(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put off until a pod is isolated closes nothing that old and new allow (line 44)."""
    monkeypatch.setattr(test_model, "Kernel", Knowing)
    rng = random.Random(f"starts {seed}")
    while True:
        before = worlds.random_world(rng, pods=5, nodes=1, policies=4, faults=0.1)
        title, after = worlds.random_event(rng, before)
        if title in ("pod added", "pod given an address", "pod moved", "address handed on"):
            break
    after = test_model.batch(after, rng, rng.choice((0, 1)))
    if len(test_model.mixtures(before, after)) <= 32:
        assert test_model.violations(before, after, NODE, rng) == []


@pytest.mark.parametrize("seed", range(60))
def test_a_pod_starts(seed: int) -> None:
    rng = random.Random(seed)
    while True:
        before = worlds.random_world(rng, pods=7, nodes=1, policies=5)
        title, after = worlds.random_event(rng, before)
        if title in ("pod added", "pod given an address"):
            break
    assert early(before, after, rng) == []


def test_a_pod_that_others_allow_starts() -> None:
    before = [
        namespace("x"),
        pod("web", 1, 1, {"http": 80}, app="web"),
        policy(
            "web", {"app": "web"}, ingress=[{"from": [pods_with(app="new")]}], egress=[{"to": [pods_with(app="new")]}]
        ),
        policy("new", {"app": "new"}, ingress=[], egress=[]),
    ]
    assert early(before, [*before, pod("new", 1, 2, {"http": 80}, app="new")], random.Random(1)) == []
