"""What the kernel holds is what was rendered, whatever the history that led there."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from agent.dataplane.render import OPTIONS, ipset_text, iptables_text
from tests.dataplane.kernel import FAMILIES, Kernel, run
from tests.dataplane.scenes import Agent, applied, cluster, desired, pod
from tests.tracer import Tables
from tests.worlds import random_event, random_world

pytestmark = pytest.mark.root


def test_saved_is_rendered(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """From a kernel with another world's state in it; the tables hold nothing else."""
    for _ in many(20):
        with Agent(backend, random_world(rng, pods=12, policies=8, faults=0.1)) as agent:
            agent.sync()
            assert kernel.ours() == desired(agent.node)
            for version in FAMILIES:
                rendered = Tables.parse(iptables_text(agent.node, version, OPTIONS))
                assert Tables.parse(kernel.save(version)) == rendered


def test_rendered_text_loads(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """What `render` prints, loaded by hand, is what `apply` programs: an apply after it writes nothing."""
    for _ in many(8):
        with Agent(backend, random_world(rng, pods=12, policies=8)) as agent:
            run("ipset", "restore", text=ipset_text(agent.node))
            for version in FAMILIES:
                kernel.restore(version, iptables_text(agent.node, version, OPTIONS), "--noflush")
            assert kernel.ours() == desired(agent.node)
            assert agent.sync().writes == 0
            agent.dataplane.clean()


def test_histories(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """Random events one by one and in batches, with restarts: no chain, rule, set or member differs, none is left."""
    for _ in many(6):
        world = random_world(rng, pods=10, policies=6)
        agent = Agent(backend, world)
        agent.sync()
        for _ in range(12):
            for _ in range(rng.choice((1, 1, 1, 4))):
                _, world = random_event(rng, world, faults=0.1)
            if rng.random() < 0.15:
                agent.dataplane.close()
                agent = Agent(backend, world)
                agent.sync()
            else:
                agent.change(world)
            assert kernel.ours() == desired(world)
        assert agent.sync().writes == agent.resync().writes == 0
        agent.dataplane.close()


def test_worlds_in_turn(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """Each process finds another's world in the kernel, as after a long time away."""
    for _ in many(10):
        world = random_world(rng, faults=0.2)
        applied(backend, world)
        assert kernel.ours() == desired(world)


def test_one_bucket(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """Pods whose rules stand in the same chain start and stop, several at a time, between each other."""
    pods = [pod(f"db-{n}", 1, 1 + 16 * (n % 15), app="db") for n in range(15)]
    pods += [pod(f"web-{n}", 3 + n, 1, app="web") for n in range(15)]
    for one in pods:
        one["spec"]["nodeName"] = "node-1"
    here: set[int] = set()
    with Agent(backend, cluster()) as agent:
        agent.sync()
        for _ in many(15):
            here ^= {*rng.sample(range(len(pods)), rng.choice((1, 2, 5, 12)))}
            agent.change([*cluster(), *(pods[n] for n in sorted(here))])
            assert kernel.ours() == desired(agent.node)
        assert agent.resync().writes == 0
