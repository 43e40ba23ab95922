"""Another program reads and writes the same tables all the time, as kube-proxy does: neither side loses an update."""

from __future__ import annotations

import json
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest

from tests.dataplane.kernel import FAMILIES, Kernel
from tests.dataplane.scenes import Agent, cluster, desired
from tests.worlds import random_event, random_world

pytestmark = pytest.mark.root


class Other:
    """A process that does its work again and again until it is told to stop, and then says how it went."""

    def __init__(self, turn: Callable[[int], None]) -> None:
        stop, self._stop = os.pipe()
        self._answer, answer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._stop)
            said: dict[str, Any] = {"turns": 0, "failed": "it ended early"}
            try:
                for number in count():
                    if select.select([stop], [], [], 0)[0]:
                        said["failed"] = ""
                        break
                    turn(number)
                    said["turns"] = number + 1
            except BaseException as error:
                said["failed"] = str(error)
            os.write(answer, json.dumps(said).encode())
            os._exit(0)
        os.close(stop)
        os.close(answer)

    def stop(self) -> int:
        """How many turns it took; what went wrong is the test's failure."""
        with suppress(BrokenPipeError):
            os.write(self._stop, b"!")
        with open(self._answer, "rb") as answer:
            said = json.loads(answer.read())
        os.waitpid(self._child, 0)
        assert not said["failed"], said
        return int(said["turns"])


@contextmanager
def beside(*turns: Callable[[int], None]) -> Iterator[list[int]]:
    """Run a block while other processes do their work; yields how many turns each took, once they have stopped."""
    others = [Other(turn) for turn in turns]
    taken: list[int] = []
    try:
        yield taken
    finally:
        taken += [other.stop() for other in others]


def proxy(kernel: Kernel) -> Callable[[int], None]:
    """What kube-proxy does: its chains written whole, others made and removed; each turn it reads what it wrote."""

    def turn(number: int) -> None:
        version = FAMILIES[number % 2]
        service = f"KUBE-SVC-{number // 2}"
        old = f"KUBE-SVC-{number // 2 - 1}"
        address = ("192.0.2", "2001:db8:")[version // 6]
        lines = [
            ":KUBE-SERVICES - [0:0]",
            f":{service} - [0:0]",
            f"-A KUBE-SERVICES -s {address}{'.' if version == 4 else ':'}{number % 200} -j {service}",
            *(f"-A {service} -p tcp -m tcp --dport {1000 + n} -j ACCEPT" for n in range(20)),
        ]
        if number > 1:
            lines += [f":{old} - [0:0]", f"-X {old}"]
        kernel.rules(version, *lines)
        chains = kernel.iptables(version, "-S")
        assert f"-N {service}\n" in chains
        assert number < 2 or f"-N {old}\n" not in chains
        assert chains.count(f"-A {service} ") == 20, chains

    return turn


def administrator(kernel: Kernel) -> Callable[[int], None]:
    """Rules put above all others, looked for, and deleted; now and then a policy changed."""

    def turn(number: int) -> None:
        version = FAMILIES[number % 2]
        rule = ("FORWARD", "-i", f"eth{number % 9}", "-m", "comment", "--comment", "mine", "-j", "ACCEPT")
        kernel.iptables(version, "-I", *rule)
        kernel.iptables(version, "-C", *rule)
        if number % 5 == 0:
            kernel.iptables(version, "-P", "FORWARD", random.choice(("ACCEPT", "DROP")))
        kernel.iptables(version, "-D", *rule)
        assert "mine" not in kernel.save(version)

    return turn


def test_neither_side_loses(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """300 syncs of random events, every fifth with a look for drift; no error comes out, on either side."""
    for version in FAMILIES:
        kernel.rules(version, ":KUBE-SERVICES - [0:0]", "-A FORWARD -j KUBE-SERVICES", "-I FORWARD -j ACCEPT")
    world = random_world(rng, pods=10, policies=6)
    attempts = 0
    with Agent(backend, world, linger=0.5) as agent, beside(proxy(kernel), administrator(kernel)) as turns:
        agent.sync()
        for number in many(300):
            _, world = random_event(rng, world)
            attempts = max(attempts, agent.change(world).attempts)
            if number % 5 == 0:
                attempts = max(attempts, agent.resync().attempts)
    assert min(turns) > 10
    with Agent(backend, world) as agent:
        agent.sync()
        assert kernel.ours() == desired(world)
        agent.dataplane.clean()
    for version in FAMILIES:
        saved = kernel.save(version)
        assert saved.count("-A KUBE-SVC-") == 20
        assert saved.count(":KUBE-SVC-") == 1
        assert saved.count("-A FORWARD") == 2
        assert "mine" not in saved


def test_sets_linger(backend: str, kernel: Kernel) -> None:
    """A set is there for a while after its last rule, unless it is wanted again; then it goes, with the next sync."""
    bare = [o for o in cluster() if o["metadata"]["name"] != "web"]
    with Agent(backend, cluster(), linger=0.3) as agent:
        agent.sync()
        before = set(kernel.sets())
        assert agent.change(bare).sets_destroyed == 0
        assert agent.sync().writes == 0
        assert set(kernel.sets()) == before
        assert agent.change(cluster()).sets_created == 0
        time.sleep(0.4)
        assert agent.sync().writes == 0

        assert agent.resync().writes == 0
        agent.change(bare)
        assert agent.resync().writes == 0
        time.sleep(0.4)
        assert agent.sync().sets_destroyed > 0
        assert kernel.ours() == desired(bare)

        agent.change(cluster())
        name = next(name for name in kernel.sets() if name.startswith("npa4-p-"))
        agent.dataplane.clean()
        assert not kernel.sets()
        kernel.ipset("create", name, "hash:net")
        agent.sync()
        assert kernel.ours() == desired(cluster()), "what has its name and another type does not linger"
