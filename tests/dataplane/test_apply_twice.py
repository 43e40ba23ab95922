"""What was enforced once is not written again: not by the same process, and not by the next one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataplane.kernel import Kernel, generation, watched
from tests.dataplane.scenes import Agent, cluster
from tests.worlds import random_world

pytestmark = pytest.mark.root
LOCK = Path("/run/xtables.lock")


def test_random_worlds(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """By counter, and by what else tells: the generation of nf_tables, legacy's lock file, programs and sockets."""
    for _ in many(30):
        world = random_world(rng, pods=12, policies=8, faults=0.1)
        with Agent(backend, world) as first, Agent(backend, world) as restarted:
            first.sync()
            before, transactions = kernel.everything(), generation()
            LOCK.unlink(missing_ok=True)
            with watched() as doings:
                again = first.sync()
                assert not doings.programs, "nothing changed, and the kernel need not even be read"
                first.dataplane.close()  # the next write would have to open a netlink socket
                for report in (again, first.sync(), first.resync(), restarted.sync(), restarted.sync()):
                    assert report.writes == 0
            assert not doings.writes
            assert not doings.sockets
            assert generation() == transactions
            assert not LOCK.exists()
            assert kernel.everything() == before


def test_rules_stay_the_same_rules(backend: str, kernel: Kernel) -> None:
    """Their handles (nft) and counters (legacy) outlive a look for drift and a restart."""
    with Agent(backend, cluster()) as agent, Agent(backend, cluster()) as restarted:
        agent.sync()
        kernel.mark()
        assert agent.resync().writes == restarted.sync().writes == 0
        assert kernel.rewritten() == set()


def test_witnesses_see_a_write(backend: str, kernel: Kernel) -> None:
    """What the tests above rely on tells one added member, one added rule and one rewritten chain."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        kernel.mark()
        name = next(name for name in agent.node.sets.active if name.startswith("npa4-p-"))

        kernel.ipset("add", name, "192.0.2.77")
        agent.dataplane.close()
        with watched() as doings:
            assert agent.resync().writes == 1
        assert doings.sockets
        assert not doings.writes

        transactions = generation()
        kernel.iptables(6, "-A", "NPA-INGRESS", "-j", "RETURN")
        assert generation() > transactions if backend == "nft" else LOCK.exists()
        assert kernel.rewritten() == {"6 NPA-INGRESS"}

        transactions = generation()
        LOCK.unlink(missing_ok=True)
        kernel.mark()
        with watched() as doings:
            assert agent.resync().writes == 1
        assert len(doings.writes) == 1
        assert generation() == transactions + 1 if backend == "nft" else LOCK.exists()
        assert kernel.rewritten() == {"6 NPA-INGRESS"}
