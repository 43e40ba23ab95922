"""A real Prometheus with the chart's scrape configuration: targets, alerts that fire when the fault is made, and the
queries of the dashboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chart.dashboard import queries
from tests.cluster.kube import NODES, kubectl, needs_cluster, on_node
from tests.cluster.live import until
from tests.e2e.monitoring import Prometheus, prometheus, rules
from tests.e2e.release import METRICS, NAME, SPACE, Release

pytestmark = needs_cluster
FAULTY = {  # tests/cluster/test_run_life.py says why the API server takes it
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "faulty", "namespace": "default"},
    "spec": {
        "podSelector": {"matchLabels": {"nobody": "has-this"}},
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["::ffff:10.0.0.0/104"]}}]}],
    },
}
QUIET_WITHOUT = {"NetpolAgentRestarts"}
"""Alerts that what other tests do may set off: they start the agents anew."""


@pytest.fixture(scope="module")
def monitor(release: Release) -> Iterator[Prometheus]:
    assert release.is_there()
    with prometheus() as made:
        until(
            lambda: len(made.query('up{job="netpol-agent"} == 1')) >= len(NODES), 60, "all targets are up", made.state
        )
        yield made


def test_every_node_is_a_target(monitor: Prometheus, release: Release) -> None:
    targets = monitor.ask("targets")["activeTargets"]
    assert {one["labels"]["node"] for one in targets} == set(release.pods())
    assert all(one["health"] == "up" for one in targets), targets
    assert all(one["scrapePool"] == NAME for one in targets)
    (ready,) = monitor.query("sum(netpol_agent_ready)")
    assert float(ready["value"][1]) == len(targets)


def test_rules_load(monitor: Prometheus) -> None:
    loaded = {one["name"] for group in monitor.ask("rules")["groups"] for one in group["rules"]}
    assert loaded == {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}
    until(
        lambda: all(one["health"] == "ok" for group in monitor.ask("rules")["groups"] for one in group["rules"]),
        30,
        "ok",
    )


def test_a_healthy_cluster_is_quiet(monitor: Prometheus) -> None:
    until(lambda: monitor.firing() <= QUIET_WITHOUT, 60, "nothing fires")


def test_a_policy_with_a_fault(monitor: Prometheus) -> None:
    with broken_policy():
        monitor.fires("NetpolAgentInvalidPolicies")
    monitor.is_silent("NetpolAgentInvalidPolicies")


def test_an_agent_that_does_not_answer(monitor: Prometheus) -> None:
    with firewalled(NODES[1]):
        monitor.fires("NetpolAgentDown")
    monitor.is_silent("NetpolAgentDown")


def test_rules_that_somebody_changes(monitor: Prometheus, release: Release) -> None:
    """Again and again; and each time they are put right."""
    node = NODES[0]
    for _ in range(5):
        before = release.metric(node, "drift_repaired_total")
        assert on_node(node, "iptables", "-F", "NPA-INGRESS").returncode == 0
        until(lambda before=before: release.metric(node, "drift_repaired_total") > before, 30, "repaired")
    monitor.fires("NetpolAgentDrift")


def test_a_host_whose_traffic_passes_by(monitor: Prometheus, release: Release) -> None:
    """The interface of kube-proxy in IPVS mode appears. An agent looks for it when it starts, and once a minute."""
    node = NODES[1]
    assert on_node(node, "ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "npa-test").returncode == 0
    try:
        kubectl("-n", SPACE, "delete", "pod", release.pods()[node])
        monitor.fires("NetpolAgentUnenforceable")
    finally:
        on_node(node, "ip", "link", "del", "kube-ipvs0")
    kubectl("-n", SPACE, "delete", "pod", release.pods()[node])
    monitor.is_silent("NetpolAgentUnenforceable")
    release.rolled_out()


def test_permissions_that_are_missing(monitor: Prometheus, release: Release) -> None:
    """New agents do not get to know the cluster; what the old ones enforced stays. It ends when they may again."""
    kubectl("delete", "clusterrolebinding", NAME)
    try:
        kubectl("-n", SPACE, "delete", "pod", *release.pods().values())
        monitor.fires("NetpolAgentNotInSync", seconds=90)
    finally:
        release.install()
    monitor.is_silent("NetpolAgentNotInSync", "NetpolAgentNotReady", seconds=90)


def test_no_agent_at_all(monitor: Prometheus, release: Release) -> None:
    release.install("nodeSelector.nobody=has-this")
    try:
        monitor.fires("NetpolAgentAbsent")
    finally:
        release.install()
    monitor.is_silent("NetpolAgentAbsent", "NetpolAgentDown")


def test_every_query_of_the_dashboard_has_data(monitor: Prometheus) -> None:
    with broken_policy():
        monitor.fires("NetpolAgentInvalidPolicies")
        empty = {title: query for title, query in queries() if not monitor.query(query)}
    assert not empty


@contextmanager
def broken_policy() -> Iterator[None]:
    """A policy that the API server accepts and that cannot be enforced as written."""
    kubectl("apply", "-f", "-", text=json.dumps(FAULTY))
    try:
        yield
    finally:
        kubectl("delete", "-f", "-", text=json.dumps(FAULTY))


@contextmanager
def firewalled(node: str) -> Iterator[None]:
    """Nobody reaches the agent's metrics on this node."""
    rule = ("-p", "tcp", "--dport", str(METRICS), "-j", "DROP")
    assert on_node(node, "iptables", "-I", "INPUT", *rule).returncode == 0
    try:
        yield
    finally:
        on_node(node, "iptables", "-D", "INPUT", *rule)
