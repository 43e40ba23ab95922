"""The order of change: every plan, checked after each single kernel operation against the worlds before and after."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from agent.dataplane.plan import AddMembers, CreateSet, DeleteMembers, DestroySet, Operation, Transaction
from tests import oracle, worlds
from tests.nodes import Kernel, change, key_of, node_of

SEEDS = range(120)
Objects = list[dict[str, Any]]


def a_node(objects: Objects, rng: random.Random) -> str:
    nodes = sorted({o["spec"].get("nodeName") or "" for o in objects if o["kind"] == "Pod"} - {""})
    return rng.choice(nodes) if nodes else "node-0"


def mixtures(before: Objects, after: Objects) -> list[Objects]:
    """Every mixture of old and new objects (semantics.md line 44), or both ends alone where only policies changed."""
    old, new = {key_of(o): o for o in before}, {key_of(o): o for o in after}
    changed = sorted(k for k in old | new if old.get(k) != new.get(k))
    if all(kind == "NetworkPolicy" for kind, _ in changed):
        return [before, after]
    kept = [o for k, o in new.items() if k not in changed]
    found = []
    for choice in product((old, new), repeat=len(changed)):
        found.append(kept + [side[k] for k, side in zip(changed, choice) if k in side])
    return found


def batch(objects: Objects, rng: random.Random, events: int) -> Objects:
    for _ in range(events):
        _, objects = worlds.random_event(rng, objects, faults=0.1)
    return objects


def violations(before: Objects, after: Objects, name: str, rng: random.Random, reorder: Any = None) -> list[str]:
    """What a packet sees that it must not, while one node goes from one world to another in one batch."""
    worlds_between = mixtures(before, after)
    node = node_of(before, name)
    kernel = Kernel()
    kernel.sync(node, everything=True)
    probes = dict.fromkeys(p for w in (before, after) for p in worlds.interesting_probes(w, rng, 15))
    addresses = [a for a in worlds.pod_addresses([*before, *after]) if "." in a]
    probes |= dict.fromkeys((a, b, "TCP", 8080) for a in ["10.9.9.9", *addresses] for b in addresses)
    promise = {}
    for probe in probes:
        source, destination, protocol, port = probe
        seen = [
            oracle.allowed(world, src=source, dst=destination, protocol=protocol, port=port, node=name)
            for world in worlds_between
        ]
        promise[probe] = [
            (all(getattr(v, side) for v in seen), not any(getattr(v, side) for v in seen))
            for side in ("egress", "ingress")
        ]
    change(node, before, after)
    operations = kernel.operations(node)
    found = []
    for step in kernel.steps(reorder(operations) if reorder else operations):
        for probe, ((egress_open, egress_shut), (ingress_open, ingress_shut)) in promise.items():
            passes = kernel.passes(*probe)
            if passes and (egress_shut or ingress_shut):
                found.append(f"{probe} leaks after {step}")
            if not passes and egress_open and ingress_open:
                found.append(f"{probe} is lost after {step}")
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_no_window_after_any_operation(seed: int) -> None:
    rng = random.Random(seed)
    before = worlds.random_world(rng, pods=6, nodes=2, policies=4, faults=0.1)
    name = a_node(before, rng)
    after = batch(before, rng, rng.choice((1, 1, 2, 3)))
    while len(mixtures(before, after)) > 32:
        after = batch(before, rng, 1)
    assert violations(before, after, name, rng) == []


# --- the same, shown to fail when two steps are swapped --------------------------------------------------------------


def pod(name: str, address: str, labels: dict[str, str], node: str = "node-0") -> dict[str, Any]:
    port = {"name": "web", "containerPort": 8080}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "x", "labels": labels},
        "spec": {"nodeName": node, "containers": [{"ports": [port]}]},
        "status": {"phase": "Running", "podIP": address},
    }


def ingress(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    spec = {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": list(rules)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "x"},
        "spec": spec,
    }


NAMESPACE: dict[str, Any] = {"kind": "Namespace", "metadata": {"name": "x", "labels": {}}}
NAMED = [NAMESPACE, pod("one", "10.0.0.1", {"app": "server"}), ingress("named", {"ports": [{"port": "web"}]})]
BY_LABEL = ingress("peers", *({"from": [{"podSelector": {"matchLabels": {"role": r}}}]} for r in ("a", "b")))
PEERS = [NAMESPACE, pod("one", "10.0.0.1", {"app": "server"}), BY_LABEL]

CHANGES: dict[str, tuple[Objects, Objects]] = {
    "a pod with a named port starts": (NAMED, [*NAMED, pod("two", "10.0.0.2", {"app": "server"})]),
    "a pod with a named port stops": ([*NAMED, pod("two", "10.0.0.2", {"app": "server"})], NAMED),
    "a peer moves between selectors": (
        [*PEERS, pod("peer", "10.0.0.9", {"role": "a"}, "node-1")],
        [*PEERS, pod("peer", "10.0.0.9", {"role": "b"}, "node-1")],
    ),
    "a policy gains a peer": (
        [*PEERS, pod("peer", "10.0.0.9", {"role": "c"}, "node-1")],
        [
            NAMESPACE,
            pod("one", "10.0.0.1", {"app": "server"}),
            ingress("peers", {"from": [{"podSelector": {"matchLabels": {"role": "c"}}}]}),
            pod("peer", "10.0.0.9", {"role": "c"}, "node-1"),
        ],
    ),
}


def adds_last(operations: Sequence[Operation]) -> list[Operation]:
    """Add to sets that are there already only after the transaction."""
    new = {o.name for o in operations if isinstance(o, CreateSet)}
    late = [o for o in operations if isinstance(o, AddMembers) and o.name not in new]
    return [o for o in operations if o not in late] + late


def deletes_before_rules(operations: Sequence[Operation]) -> list[Operation]:
    """Delete from sets before the transaction."""
    early = [o for o in operations if isinstance(o, DeleteMembers)]
    rules = [o for o in operations if isinstance(o, Transaction | DestroySet)]
    return [o for o in operations if o not in early and o not in rules] + early + rules


def deletes_before_adds(operations: Sequence[Operation]) -> list[Operation]:
    """Delete first of all."""
    early = [o for o in operations if isinstance(o, DeleteMembers)]
    return early + [o for o in operations if o not in early]


@pytest.mark.parametrize("title", CHANGES)
def test_no_window_in_the_changes_that_are_swapped_below(title: str) -> None:
    assert violations(*CHANGES[title], "node-0", random.Random(1)) == []


@pytest.mark.parametrize(
    "reorder, title",
    [
        (adds_last, "a pod with a named port starts"),
        (deletes_before_rules, "a pod with a named port stops"),
        (deletes_before_adds, "a peer moves between selectors"),
    ],
)
def test_the_model_finds_the_window_when_two_steps_are_swapped(reorder: Any, title: str) -> None:
    assert violations(*CHANGES[title], "node-0", random.Random(1), reorder)
