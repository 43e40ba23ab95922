"""Incremental equals from scratch, in any order; the kernel's rules, walked by the tracer, agree with the oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.core.addresses import parse_address
from agent.core.judge import Connection, Judgement, judge
from agent.core.node import Node
from agent.core.rules import Rule, Verdict
from tests import oracle, worlds
from tests.nodes import Kernel, change, node_of, snapshot

Objects = list[dict[str, Any]]
NODE = "node-0"


def node_name(objects: Objects) -> str:
    names = [o["spec"].get("nodeName") for o in objects if o["kind"] == "Pod"]
    return min((n for n in names if n), default=NODE)


class Events(RuleBasedStateMachine):
    """A watched cluster: events come one by one or in batches, the node is synced in between."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: Objects = []
        self.synced: Objects = []

    @initialize(objects=worlds.worlds(faults=0.2))
    def start(self, objects: Objects) -> None:
        self.objects = self.synced = objects
        self.name = node_name(objects)
        self.node = node_of(objects, self.name)
        self.kernel = Kernel()
        self.kernel.sync(self.node, everything=True)

    @rule(data=st.data())
    def event(self, data: st.DataObject) -> None:
        _, self.objects = data.draw(worlds.events(self.objects, faults=0.2))

    @precondition(lambda self: self.objects is not self.synced)
    @rule()
    def sync(self) -> None:
        change(self.node, self.synced, self.objects)
        self.kernel.sync(self.node)
        self.synced = self.objects

    @rule()
    def restart(self) -> None:
        """A new process reads the kernel and writes nothing."""
        node = node_of(self.synced, self.name)
        assert self.kernel.sync(node, everything=True) == []
        self.node = node

    @invariant()
    def same_as_from_scratch(self) -> None:
        if self.objects is not self.synced:
            return
        shuffled = random.Random(len(self.objects)).sample(self.objects, len(self.objects))
        scratch = node_of(shuffled, self.name)
        assert snapshot(self.node) == snapshot(scratch)
        kernel = Kernel()
        kernel.sync(scratch, everything=True)
        assert self.kernel.sets == kernel.sets
        assert self.kernel.tables == kernel.tables

    @rule(data=st.data())
    def probe(self, data: st.DataObject) -> None:
        source, destination, protocol, port = data.draw(worlds.probes(self.synced))
        verdict = oracle.allowed(self.synced, src=source, dst=destination, protocol=protocol, port=port, node=self.name)
        assert self.kernel.passes(source, destination, protocol, port) == verdict.allowed


Events.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEvents = Events.TestCase


def allows(decided: Rule | None) -> bool:
    return decided is None or decided.verdict is Verdict.ALLOW


def judged(node: Node, probe: tuple[str, str, str, int | None]) -> Judgement:
    source, destination, protocol, port = probe
    return judge(node, Connection(parse_address(source), parse_address(destination), protocol, port or 0))


@pytest.mark.parametrize("seed", range(60))
def test_judge_and_tracer_agree_with_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    objects = worlds.random_world(rng, pods=10, nodes=2, policies=6, faults=0.3)
    everywhere = node_of(objects, None)
    kernel = Kernel()
    kernel.sync(everywhere, everything=True)
    for probe in worlds.interesting_probes(objects, rng, 60):
        source, destination, protocol, port = probe
        verdict = oracle.allowed(objects, src=source, dst=destination, protocol=protocol, port=port)
        decided = judged(everywhere, probe)
        assert (allows(decided.egress), allows(decided.ingress)) == (verdict.egress, verdict.ingress), probe
        assert kernel.passes(*probe) == verdict.allowed, probe


@pytest.mark.parametrize("seed", range(60))
def test_findings_name_what_the_oracle_finds(seed: int) -> None:
    objects = worlds.random_world(random.Random(seed), policies=8, faults=0.7)
    node = node_of(objects, None)
    tolerated = {"label-value-invalid"}  # compared as it is, and reported (semantics.md line 51)
    found = {p.key for p in node.policies.policies.values() if any(f.id not in tolerated for f in p.findings)}
    assert found == {key for key, _ in oracle.findings(objects)}


def test_every_selector_is_found_by_the_index_as_by_looking_at_each() -> None:
    """The obviously right way beside the fast one: every set's members from every group, one by one."""
    for seed in range(40):
        rng = random.Random(seed)
        objects = worlds.random_world(rng, pods=10, nodes=2, policies=6)
        node = node_of(objects, node_name(objects))
        for _ in range(15):
            _, after = worlds.random_event(rng, objects)
            change(node, objects, after)
            objects = after
        for active in node.sets.active.values():
            for selection in active.selections:
                peer = selection.peer
                wanted = set()
                for group in node.cluster.groups():
                    seen = node.cluster.namespaces.get(group.namespace)
                    where = peer.namespace in (None, group.namespace)
                    if peer.namespaces is not None:
                        where = seen is not None and peer.namespaces.matches(seen.labels)
                    if where and peer.pods.matches(group.labels):
                        wanted.add(group)
                assert selection.groups == wanted
