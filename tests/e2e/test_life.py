"""Upgrades, restarts, drained nodes and another backend under a flood of connections: nothing leaks or is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chart.helm import CHART
from tests.cluster.home import FRIEND, GUEST, LIFE, PODS, SERVER, STEP, STRANGER, Home
from tests.cluster.kube import NODES, kubectl, left_on, needs_cluster, on_node
from tests.cluster.live import until
from tests.cluster.places import Places
from tests.cluster.stage import Serving, staged
from tests.e2e.release import NAME, SPACE, Release, helm

pytestmark = needs_cluster
CANNOT_WORK = [
    "apiServer.host=192.0.2.1,apiServer.port=6443",
    "image.tag=nowhere",
    "agent.extraArgs={--no-such-option}",
    "metrics.port=10250",  # the kubelet's
]
FEW = 100
"""Connections that a flood makes at least."""


@pytest.fixture(scope="module")
def pods(release: Release, places: Places) -> Iterator[Home]:
    assert release.is_there()
    with staged(Home("release-", [LIFE], places, Serving(((80, 80),)))) as stage:
        stage.enact(STEP)
        yield stage


@pytest.fixture
def home(pods: Home) -> Iterator[Home]:
    """Labels and policies as written, before each test and after it."""
    pods.enact(STEP)
    pods.is_as_written()
    yield pods
    pods.is_as_written()


@contextmanager
def flood(home: Home) -> Iterator[None]:
    """Who may connect does all the time and never fails; who may not never gets through."""
    with home.load(FRIEND) as friend, home.load(STRANGER) as stranger, home.load(GUEST) as guest:
        time.sleep(0.5)
        yield
        time.sleep(0.5)
    print(f"friend: {friend}; stranger: {stranger}; guest: {guest}")
    assert friend.made > FEW
    assert not friend.silent
    assert not friend.refused
    for denied in (stranger, guest):
        assert denied.silent > FEW
        assert not denied.made
        assert not denied.refused


def test_upgrade(home: Home, release: Release) -> None:
    """The new pods start beside the old ones, take over, and write nothing: what is enforced is right."""
    before = release.pods()
    with flood(home):
        release.install("agent.resync=11")
    after = release.pods()
    assert not set(before.values()) & set(after.values())
    for node in NODES:
        said = [line["message"] for line in release.lines(node)]
        assert any("waiting for another netpol-agent to end" in line for line in said)
        assert any("enforcing:" in line and "0 kernel writes" in line for line in said), said


def test_policies_change_during_an_upgrade(home: Home, release: Release) -> None:
    """While one agent follows another, what is edited is enforced within seconds: there is no time without one."""
    began = time.monotonic()
    slowest = 0.0
    release_pods = release.pods()
    kubectl("-n", SPACE, "rollout", "restart", "daemonset/netpol-agent")
    rounds = 0
    while time.monotonic() - began < 60 and (rounds < 5 or set(release.pods().values()) & set(release_pods.values())):
        for label, wanted in (("friend=yes", {True}), ("friend-", {False})):
            kubectl("-n", "release-home", "label", "--overwrite", "pod", "stranger", label)
            took = until(
                lambda wanted=wanted: home.reaches(STRANGER, patience=0.1) == wanted, 10, f"{label} is enforced"
            )
            slowest = max(slowest, took)
        rounds += 1
    release.rolled_out()
    print(f"{rounds} times a label came and went during the update; the slowest was enforced after {slowest:.2f} s")
    assert slowest < 5


@pytest.mark.parametrize("value", CANNOT_WORK)
def test_an_upgrade_that_cannot_work_replaces_nobody(home: Home, release: Release, value: str) -> None:
    """No API server, no image, no start, no port: the old agents enforce what changes, until it is put right."""
    release.rolled_out()
    before = release.ready()
    told = [word for one in (*release.values, value) for word in ("--set", one)]
    try:
        with flood(home):
            done = helm("upgrade", NAME, str(CHART), "--wait", "--timeout", "25s", *told)
            assert done.code != 0
        assert release.ready() == before
        for label, wanted in (("friend=yes", {True}), ("friend-", {False})):
            kubectl("-n", "release-home", "label", "--overwrite", "pod", "stranger", label)
            until(lambda wanted=wanted: home.reaches(STRANGER, patience=0.1) == wanted, 10, f"{label} is enforced")
    finally:
        done = helm("rollback", NAME, "--wait", "--timeout", "60s")
        assert done.code == 0, f"{done.said}\n{release.troubles()}"


def test_where_it_listens_can_be_changed(home: Home, release: Release) -> None:
    with flood(home):
        release.install("health.port=10094", "metrics.port=10095")
        release.install()
    release.rolled_out()


@pytest.mark.parametrize("how", ["--grace-period=1", "--force"])
def test_agents_are_killed(home: Home, release: Release, how: str) -> None:
    """With --force each is killed at once."""
    before = release.pods()
    with flood(home):
        kubectl("-n", SPACE, "delete", "pod", how, *before.values())
        release.rolled_out()
    for node in NODES:
        assert release.pods()[node] != before[node]
        assert any("0 kernel writes" in line["message"] for line in release.lines(node))


def test_a_node_is_drained_and_comes_back(home: Home, release: Release) -> None:
    """Its pods go and come again with other addresses; the agent stays on it. Nobody else notices."""
    node = NODES[1]
    before = release.pods()[node]
    with home.load(STRANGER) as stranger:
        kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s")
        try:
            assert release.pods()[node] == before
            until(lambda: release.metric(node, "pods_local") == 0, 30, "the agent has seen them go")
            assert release.metric(node, "ready") == 1
        finally:
            kubectl("uncordon", node)
        home.come_back()
    assert stranger.silent > FEW
    assert not stranger.made
    kubectl("-n", SPACE, "rollout", "status", "deployment", "--timeout=120s")
    assert set(home.addresses) == set(PODS)
    assert home.reaches(FRIEND, SERVER) == {True}


@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_backends(home: Home, release: Release, backend: str) -> None:
    """An upgrade moves what is enforced from one iptables to the other; nothing leaks, nothing is left behind."""
    assert left_on(NODES[0])
    with flood(home):
        release.install(f"agent.backend={backend}")
        home.is_as_written()
    for node in NODES:
        assert f"backend {backend}:" in release.run(node, "netpol-agent", "status")
        for other in {"legacy", "nft"} - {backend}:
            for family in ("iptables", "ip6tables"):
                assert "NPA-" not in on_node(node, f"{family}-{other}-save").stdout
    release.install()
    home.is_as_written()
