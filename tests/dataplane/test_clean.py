"""`clean` leaves what others have, exactly; after a kill at any moment it does, and so does the next apply."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from agent.dataplane.dataplane import Dataplane
from agent.dataplane.errors import KernelError
from agent.dataplane.iptables import Backend
from agent.dataplane.render import OPTIONS, ipset_text, iptables_text
from tests.dataplane.kernel import BACKENDS, FAMILIES, Kernel, run
from tests.dataplane.scenes import Agent, applied, cluster, desired, pod
from tests.nodes import node_of
from tests.worlds import random_event, random_world

pytestmark = pytest.mark.root


def others(kernel: Kernel) -> None:
    """What kube-proxy, a CNI plugin and an administrator have, some of it with names like ours."""
    for version in FAMILIES:
        kernel.rules(
            version,
            ":KUBE-FORWARD - [0:0]",
            ":KUBE-SERVICES - [0:0]",
            ":FLANNEL-FWD - [0:0]",
            ":npa-lower - [0:0]",
            ":EMPTY - [0:0]",
            '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
            '-A FORWARD -m conntrack --ctstate NEW -m comment --comment "service portals" -j KUBE-SERVICES',
            '-A FORWARD -m comment --comment "below NPA-FORWARD" -j FLANNEL-FWD',
            '-A FORWARD -m comment --comment "do not -j NPA-FORWARD"',
            "-A FORWARD -m comment --comment NPA-FORWARD -j npa-lower",
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
            '-A KUBE-FORWARD -m comment --comment "in front of NPA-INGRESS \\" -g NPA-EGRESS" -j RETURN',
            "-A INPUT -m comment --comment -j -j ACCEPT",
            "-P FORWARD DROP",
        )
        kernel.rules(
            version,
            ":KUBE-SVC-1 - [0:0]",
            ":KUBE-SEP-1 - [0:0]",
            ":NPA-NAT - [0:0]",
            "-A PREROUTING -j KUBE-SVC-1",
            "-A KUBE-SVC-1 -m statistic --mode random --probability 0.5 -j KUBE-SEP-1",
            f"-A KUBE-SEP-1 -p tcp -j DNAT --to-destination {('10.0.1.1:8080', '[fd00::1:1]:8080')[version // 6]}",
            "-A POSTROUTING -j NPA-NAT",
            table="nat",
        )
        inet = ("inet", "inet6")[version // 6]
        for name in (f"theirs{version}", f"npa-{version}", f"npath{version}", f"npa-t{version}", f"NPA{version}-p-1"):
            kernel.ipset("create", name, "hash:ip", "family", inet)
            kernel.ipset("add", name, ("192.0.2.1", "2001:db8::1")[version // 6])
        kernel.rules(version, f"-I INPUT -m set --match-set npa-{version} src -j DROP")


def clean(backend: str) -> int:
    dataplane = Dataplane(Backend(backend))
    try:
        report = dataplane.clean()
        assert dataplane.clean().writes == 0
    finally:
        dataplane.close()
    return report.writes


def test_after_apply(backend: str, kernel: Kernel) -> None:
    others(kernel)
    before = kernel.everything()
    assert clean(backend) == 0
    assert kernel.everything() == before
    applied(backend, cluster())
    assert kernel.ours() == desired(cluster())
    assert clean(backend) > 0
    assert kernel.everything() == before


def test_changes_leave_others_alone(
    backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]
) -> None:
    others(kernel)
    before = kernel.everything()
    world = random_world(rng)
    with Agent(backend, world) as agent:
        agent.sync()
        for _ in many(15):
            _, world = random_event(rng, world)
            agent.change(world)
            agent.resync()
        agent.dataplane.clean()
    assert kernel.everything() == before


def rendered(version: int) -> str:
    return iptables_text(node_of(cluster(), "node-1"), version, OPTIONS)


def only_sets(kernel: Kernel) -> None:
    run("ipset", "restore", text=ipset_text(node_of(cluster(), "node-1")))
    kernel.ipset("create", "npa-t-4-p-00000000000000000000", "hash:ip")


def only_chains(kernel: Kernel) -> None:
    """Without the sets that they name, and without a jump to them."""
    for version in FAMILIES:
        lines = [line for line in rendered(version).splitlines() if "set" not in line and "FORWARD 1" not in line]
        kernel.restore(version, "\n".join([*lines, ""]), "--noflush")


def unused_chains(kernel: Kernel) -> None:
    """Of older versions, and such as hold each other."""
    applied(kernel.backend, cluster())
    for version in FAMILIES:
        kernel.rules(
            version,
            ":NPA-OLD - [0:0]",
            ":NPA-I-00000000000000000000 - [0:0]",
            "-A NPA-OLD -j NPA-FORWARD",
            "-A NPA-I-00000000000000000000 -j NPA-OLD",
            "-A NPA-I-00000000000000000000 -j DROP",
        )


def jump_to_nothing(kernel: Kernel) -> None:
    for version in FAMILIES:
        kernel.rules(version, ":NPA-FORWARD - [0:0]", "-I FORWARD -j NPA-FORWARD", "-A FORWARD -g NPA-FORWARD")


def one_family(kernel: Kernel) -> None:
    only_sets(kernel)
    kernel.restore(6, rendered(6), "--noflush")


def foreign_content(kernel: Kernel) -> None:
    """Somebody's own rules in our chains, and entries in our sets."""
    applied(kernel.backend, cluster())
    for version in FAMILIES:
        kernel.rules(version, "-A NPA-INGRESS -j KUBE-FORWARD", "-I FORWARD -i lo -j NPA-INGRESS")
    name = next(name for name in kernel.sets() if name.startswith("npa4-b-"))
    kernel.ipset("add", name, "198.51.100.0/24", "nomatch")


def other_backend(kernel: Kernel) -> None:
    [other] = {*BACKENDS} - {kernel.backend}
    applied(other, cluster())


def both_backends(_: Kernel) -> None:
    for backend in BACKENDS:
        applied(backend, cluster())


STATES = (
    only_sets,
    only_chains,
    unused_chains,
    jump_to_nothing,
    one_family,
    foreign_content,
    other_backend,
    both_backends,
)


@pytest.mark.parametrize("half_made", STATES)
def test_half_made(backend: str, kernel: Kernel, half_made: Callable[[Kernel], None]) -> None:
    """`clean`, and instead of it an apply, from a state that no apply has left."""
    kernels = [Kernel(name) for name in BACKENDS]
    for one in kernels:
        one.save(4), one.save(6)
    others(kernel)
    before = [one.everything() for one in kernels]
    half_made(kernel)
    assert [one.everything() for one in kernels] != before
    assert clean(backend) > 0
    assert [one.everything() for one in kernels] == before

    half_made(kernel)
    with Agent(backend, cluster()) as agent:
        agent.sync()
        agent.dataplane.leave_other_backend()
        assert agent.resync().writes == 0
    assert kernel.ours() == desired(cluster())
    [other] = [one for one in kernels if one is not kernel and one.backend != backend]
    assert not [key for key in other.ours() if " NPA-" in key]
    clean(backend)
    assert [one.everything() for one in kernels] == before


def test_host_changes_sides(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """The rules of another world on the other backend go, and with them the sets that only they used."""
    [other] = {*BACKENDS} - {backend}
    for _ in many(3):
        applied(other, random_world(rng, pods=12, policies=8))
        world = random_world(rng, pods=12, policies=8)
        with Agent(backend, world) as agent:
            agent.sync()
            agent.dataplane.leave_other_backend()
            assert kernel.ours() == desired(world)
            assert not [key for key in Kernel(other).ours() if " NPA-" in key]
            assert agent.resync().writes == agent.dataplane.leave_other_backend().writes == 0
            agent.dataplane.clean()


@pytest.mark.parametrize("backend", ["nft"])
def test_makes_no_table(kernel: Kernel) -> None:
    """Looking for our rules among legacy's does not make its filter table, which would warn every user of nft."""
    Kernel("legacy").save(4, table="nat")
    with Agent(kernel.backend, cluster()) as agent:
        agent.sync()
        agent.dataplane.leave_other_backend()
        agent.dataplane.clean()
    assert Path("/proc/net/ip_tables_names").read_text().split() == ["nat"]
    assert Path("/proc/net/ip6_tables_names").read_text() == ""


def test_in_use_for_a_moment(backend: str, kernel: Kernel) -> None:
    """A set that is still referenced is waited for."""
    applied(backend, cluster())
    name = next(name for name in kernel.sets() if name.startswith("npa4-p-"))
    kernel.rules(4, ":THEIRS - [0:0]", f"-A THEIRS -m set --match-set {name} src -j ACCEPT")
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        kernel.rules(4, "-F THEIRS")
        os._exit(0)
    clean(backend)
    os.waitpid(child, 0)
    assert not kernel.sets()


def test_in_use_by_others(backend: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else uses is named, with what to do; all else is gone, and it goes when it can."""
    monkeypatch.setattr("agent.dataplane.dataplane.PATIENCE", 0.2)
    applied(backend, cluster())
    name = next(name for name in kernel.sets() if name.startswith("npa4-p-"))
    kernel.rules(4, ":THEIRS - [0:0]", f"-A THEIRS -m set --match-set {name} src -j ACCEPT")
    dataplane = Dataplane(Backend(backend))
    with pytest.raises(KernelError, match=rf"{name}.*in use.*[Dd]elete that rule"):
        dataplane.clean()
    assert set(kernel.sets()) == {name}
    kernel.rules(4, "-F THEIRS")
    assert dataplane.clean().sets_destroyed == 1
    dataplane.close()


def test_a_stray_rule(backend: str, kernel: Kernel) -> None:
    """A rule of others that leads into a chain of ours keeps us from taking it away; nothing is half removed."""
    applied(backend, cluster())
    kernel.rules(4, ":THEIRS - [0:0]", "-A THEIRS -s 192.0.2.1 -j NPA-INGRESS")
    before = kernel.everything()
    dataplane = Dataplane(Backend(backend))
    with pytest.raises(KernelError, match=r"-A THEIRS -s 192.0.2.1/32 -j NPA-INGRESS.*[Dd]elete that rule"):
        dataplane.clean()
    assert kernel.everything() == before
    kernel.rules(4, "-F THEIRS", "-X THEIRS")
    dataplane.clean()
    dataplane.close()
    assert not kernel.sets()


def test_set_in_use_is_destroyed_later(backend: str, kernel: Kernel) -> None:
    """By the next sync, without a look for drift."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        friends = [o for o in cluster() if o["kind"] != "NetworkPolicy"]
        for name in [name for name in kernel.sets() if name.startswith("npa4-")]:
            sides = "dst,dst" if "-n-" in name else "src"
            kernel.rules(4, ":THEIRS - [0:0]", f"-A THEIRS -m set --match-set {name} {sides} -j ACCEPT")
        agent.change(friends)
        assert len(kernel.sets()) == 1, "the last one that THEIRS names"
        assert agent.sync().writes == 0
        kernel.rules(4, "-F THEIRS")
        assert agent.sync().writes == 1
        assert not kernel.sets()
        assert agent.sync().writes == 0


# --- killed ----------------------------------------------------------------------------------------------------------


def kill_in_the_middle(work: Callable[[], object], after: float) -> Callable[[], None]:
    """Kill a process in the middle of its work; what is returned waits for the tools that it had started."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with suppress(BaseException):
            work()
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    def wait() -> None:
        while True:
            try:
                os.killpg(child, 0)
            except ProcessLookupError:
                return
            time.sleep(0.001)

    return wait


def worker(backend: str, seed: int) -> Callable[[], None]:
    """A process of the agent that is given one world and change after the other."""

    def work() -> None:
        rng = random.Random(seed)
        for _ in count():
            world = random_world(rng, pods=10, policies=6)
            with Agent(backend, world) as agent:
                agent.sync()
                for _ in range(3):
                    _, world = random_event(rng, world)
                    agent.change(world)

    return work


def test_killed_at_any_moment(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """100 times: the next process takes all away, or brings it to what it should be; it does so too while the tools
    of the dead one still run, and what these do later it finds when it looks for drift."""
    others(kernel)
    before = kernel.everything()
    found = 0
    for turn in many(100):
        wait = kill_in_the_middle(worker(backend, turn), rng.uniform(0.002, 0.08))
        if turn % 3 == 0:
            wait()
            found += clean(backend) > 0
            assert kernel.everything() == before
        elif turn % 3 == 1:
            wait()
            world = random_world(rng)
            found += applied(backend, world).writes > 0
            assert kernel.ours() == desired(world)
        else:
            world = random_world(rng)
            with Agent(backend, world) as agent:
                found += agent.sync().writes > 0
                wait()
                agent.resync()
            assert kernel.ours() == desired(world)
    assert found > turn / 2
    clean(backend)
    assert kernel.everything() == before


def test_killed_while_it_fills_a_set(
    backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]
) -> None:
    """A line that is cut in the middle is another address: none gets in that does not belong."""
    friends = [pod(f"friend-{n}", 2, 1, app="friend") for n in range(8000)]
    for number, one in enumerate(friends):
        address = f"10.{128 + number % 100}.{number // 100 + 100}.{number % 150 + 100}"
        one["status"] |= {"podIP": address, "podIPs": [{"ip": address}]}
    with Agent(backend, [*cluster(), *friends]) as agent:
        name, wanted = max(desired(agent.node).items(), key=lambda item: len(item[1][1]) if "npa4-p" in item[0] else 0)
        begin = time.perf_counter()
        agent.resync()
        whole = time.perf_counter() - begin
        for _ in many(10):
            agent.dataplane.clean()
            kill_in_the_middle(agent.resync, rng.uniform(0, whole))()
            members = kernel.sets()[name].members if name in kernel.sets() else frozenset()
            assert members <= wanted[1]
