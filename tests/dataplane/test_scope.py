"""A change writes what it changes, and nothing beside."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from agent.dataplane.report import Report
from tests.dataplane.kernel import Kernel, generation
from tests.dataplane.scenes import Agent, Object, cluster, desired, edited, pod, pods_with, policy, without
from tests.worlds import random_event, random_world

pytestmark = pytest.mark.root
SETS_ONLY = {"transactions": 0, "chains_written": 0, "chains_removed": 0, "sets_created": 0, "sets_destroyed": 0}


def changed(kernel: Kernel, agent: Agent, objects: list[Object]) -> tuple[Report, set[str]]:
    """What a change did by its own report, and the chains of which the kernel has new rules."""
    kernel.mark()
    transactions = generation()
    report = agent.change(objects)
    if kernel.backend == "nft":
        assert generation() - transactions == report.transactions
    assert kernel.ours() == desired(objects)
    return report, kernel.rewritten()


def classes(kernel: Kernel) -> set[str]:
    return {key for key in kernel.ours() if "NPA-E-" in key or "NPA-I-" in key}


def test_policy_edited(backend: str, kernel: Kernel) -> None:
    """New class chains beside the old, the buckets of the pods that move over; neither the other pod's nor the other
    direction's."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        before = classes(kernel)
        rules = [{"from": [pods_with(app="friend")], "ports": [{"port": 81}]}]
        report, written = changed(kernel, agent, edited(cluster(), "NetworkPolicy/web", ingress=rules))
        new = classes(kernel) - before
        assert len(new) == 2
        assert written == {"4 NPA-IB-1", "6 NPA-IB-1", *(key.removeprefix("IPv") for key in new)}
        assert (report.transactions, report.chains_written, report.chains_removed) == (2, 4, 2)
        assert report.members_added == 0


def test_peer_list_edited(backend: str, kernel: Kernel) -> None:
    """The peers of a rule are one set: the edited rule's is made beside the old one, which goes."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        rules = [{"from": [pods_with(app=a) for a in ("web", "friend", "stranger")], "ports": [{"port": 5432}]}]
        report, written = changed(kernel, agent, edited(cluster(), "NetworkPolicy/db", ingress=rules))
        assert {key for key in written if "NPA-I-" not in key} == {"4 NPA-IB-2", "6 NPA-IB-2"}
        assert (report.sets_created, report.members_added, report.sets_destroyed) == (2, 6, 2)


@pytest.mark.parametrize(
    "event, sets",
    [
        pytest.param(lambda objects: [*objects, pod("new", 2, 9, app="friend")], 2, id="added"),
        pytest.param(lambda objects: without(objects, "Pod/friend"), 2, id="deleted"),
        pytest.param(lambda objects: edited(objects, "friend", labels={"app": "stranger"}), 2, id="no-peer-now"),
        pytest.param(lambda objects: edited(objects, "stranger", labels={"app": "friend"}), 2, id="a-peer-now"),
        pytest.param(lambda objects: edited(objects, "Namespace/y", labels={}), 1, id="namespace-relabelled"),
    ],
)
def test_peer_elsewhere(backend: str, kernel: Kernel, event: Callable[[list[Object]], list[Object]], sets: int) -> None:
    """A pod elsewhere that comes, goes or is relabelled is one member, in each family, of the sets of those rules that
    name it; no rule is written."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        report, written = changed(kernel, agent, event(cluster()))
        assert {name: getattr(report, name) for name in SETS_ONLY} == SETS_ONLY
        assert report.writes == report.members_added + report.members_deleted == 2 * sets
        assert written == set()


def test_local_pod(backend: str, kernel: Kernel) -> None:
    """One that starts, changes its class, or stops is one transaction for each family."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        started = [*cluster(), pod("db-2", 1, 6, {"http": 8080}, app="db")]
        report, written = changed(kernel, agent, started)
        assert (report.transactions, report.chains_written, report.chains_removed) == (2, 2, 0)
        assert written == {"4 NPA-IB-6", "6 NPA-IB-6"}
        assert report.members_added == 2, "a named port"

        moved = edited(started, "db-2", labels={"app": "web"})
        report, written = changed(kernel, agent, moved)
        assert report.transactions == 2
        assert written == {f"{version} NPA-{side}B-6" for version in (4, 6) for side in "IE"}
        assert report.members_added == 2, "a peer of db"

        report, written = changed(kernel, agent, without(moved, "Pod/db-2"))
        assert (report.transactions, written) == (2, set())
        assert (report.members_added, report.members_deleted) == (0, 4)

        report, written = changed(kernel, agent, without(cluster(), "Pod/db"))
        assert report.transactions == 2
        assert (report.chains_removed, report.sets_destroyed) == (2, 2), "nobody else is of its class"
        assert written == set()


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(lambda objects: [*objects, policy("new", {"app": "nobody"}, ingress=[], egress=[])], id="added"),
        pytest.param(lambda objects: [*objects, policy("new", {"app": "friend"}, ingress=[{}])], id="not-here"),
        pytest.param(lambda objects: without(objects, "NetworkPolicy/elsewhere"), id="deleted"),
        pytest.param(lambda objects: edited(objects, "elsewhere", egress=[]), id="edited"),
        pytest.param(lambda objects: [*objects, pod("new", 1, 9, app="idle")], id="local-pod-not-isolated"),
        pytest.param(lambda objects: [*objects, pod("y/new", 2, 9, app="friend")], id="peer-of-nobody"),
        pytest.param(lambda objects: edited(objects, "idle", labels={"app": "idle", "more": "so"}), id="relabelled"),
    ],
)
def test_nothing_to_write(backend: str, kernel: Kernel, event: Callable[[list[Object]], list[Object]]) -> None:
    with Agent(backend, cluster()) as agent:
        agent.sync()
        report, written = changed(kernel, agent, event(cluster()))
        assert (report.writes, written) == (0, set())


def test_first_and_last_isolation(backend: str, kernel: Kernel) -> None:
    """The chain that every packet enters changes with the first isolated pod of the node, and with the last."""
    bare = without(cluster(), "NetworkPolicy/web", "NetworkPolicy/db")
    with Agent(backend, bare) as agent:
        agent.sync()
        _, written = changed(kernel, agent, [*bare, policy("db", {"app": "db"}, ingress=[])])
        assert {key for key in written if "NPA-I-" not in key} == {
            "4 NPA-FORWARD", "6 NPA-FORWARD", "4 NPA-IB-2", "6 NPA-IB-2"
        }  # fmt: skip
        report, written = changed(kernel, agent, bare)
        assert written == {"4 NPA-FORWARD", "6 NPA-FORWARD"}
        assert report.transactions == 2


def test_random_events(backend: str, kernel: Kernel, rng: random.Random, many: Callable[[int], range]) -> None:
    """Whatever happens is at most one transaction for each family, and writes no chain that stays the same."""
    for _ in many(3):
        world = random_world(rng, pods=10, policies=6)
        with Agent(backend, world) as agent:
            agent.sync()
            for _ in range(10):
                before = kernel.ours()
                name, world = random_event(rng, world)
                report, written = changed(kernel, agent, world)
                after = kernel.ours()
                same = {key for key in after if key in before and after[key] == before[key] and " NPA-" in key}
                assert not written & {key.removeprefix("IPv") for key in same}, name
                assert report.transactions <= 2
                if before == after:
                    assert report.writes == report.connections_forgotten == 0, name
