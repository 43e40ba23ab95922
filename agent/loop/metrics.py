"""What Prometheus is told, in base units. No label holds the name of a pod, a policy or an address."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sized
from time import time
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent import __version__
from agent.core.node import Node
from agent.dataplane.applied import Applied
from agent.dataplane.report import Report

LATENCIES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of histograms, in seconds."""
WRITES = {
    "sets_created": "set_created",
    "sets_destroyed": "set_destroyed",
    "members_added": "member_added",
    "members_deleted": "member_deleted",
    "transactions": "transaction",
    "chains_written": "chain_written",
    "chains_removed": "chain_removed",
    "jumps_set": "jump_set",
    "connections_forgotten": "connection_forgotten",
}
"""Fields of a Report, and their `kind`."""


class Sizes(NamedTuple):
    """How much there is, as the writer last counted it. `invalid` counts policies by the id of a finding."""

    namespaces: int = 0
    pods: int = 0
    local_pods: int = 0
    isolated_pods: int = 0
    policies: int = 0
    enforced_policies: int = 0
    chains: int = 0
    rules: int = 0
    sets: int = 0
    members: int = 0
    invalid: Mapping[str, int] = {}
    entries: Mapping[str, int] = {}


def measure(node: Node, applied: Applied | None, invalid: Mapping[str, int]) -> Sizes:
    """Count what the node knows, and what its kernel holds of ours."""
    cluster = node.cluster
    tables = applied.tables.values() if applied else ()
    sets = applied.sets if applied else {}
    entries = {name: len(one.members) for name, one in sets.items()}
    return Sizes(
        namespaces=len(cluster.namespaces),
        pods=len(cluster.pods),
        local_pods=len(
            {holder.key for address in cluster.judged for holder in cluster.holders(address) if holder.local}
        ),
        isolated_pods=len(node.isolated_pods),
        policies=len(node.policies.policies),
        enforced_policies=len(node.enforced_policies),
        chains=sum(len(table.chains) for table in tables),
        rules=sum(len(table.jumps) + sum(map(len, table.chains.values())) for table in tables),
        sets=len(sets),
        members=sum(entries.values()),
        invalid=invalid,
        entries=entries,
    )


class Metrics(Collector):
    """All of `/metrics`. Counters are set by whoever sees what they count; sizes are the writer's last `Sizes`."""

    def __init__(self, queue: Sized) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each of ours
        self.registry = registry = CollectorRegistry()
        self.sizes = Sizes()
        self._queue = queue
        ProcessCollector(registry=registry)
        self.stage = Histogram(
            "netpol_agent_sync_duration_seconds",
            "Time that each stage of a sync took: event (waiting for the writer), state, compile, read, plan, sets, "
            "conntrack, rules, grace, deletes, destroys.",
            ["stage"],
            buckets=LATENCIES,
            registry=registry,
        )
        self.latency = Histogram(
            "netpol_agent_event_to_kernel_seconds",
            "Time from the arrival of each change to the end of its sync, where that made the kernel change.",
            buckets=LATENCIES,
            registry=registry,
        )
        self.isolation = Histogram(
            "netpol_agent_pod_isolation_seconds",
            "Time from the first sight of an address of a pod of this node to its isolation.",
            buckets=LATENCIES,
            registry=registry,
        )
        self.events = Counter(
            "netpol_agent_events",
            "Changes of objects, in what we read of them, by kind.",
            ["kind"],
            registry=registry,
        )
        self.watch_restarts = Counter(
            "netpol_agent_watch_restarts",
            "Watches and lists that ended with an error, by kind and reason.",
            ["kind", "reason"],
            registry=registry,
        )
        self.unreadable = Counter(
            "netpol_agent_unreadable_objects", "Objects that could not be read, by kind.", ["kind"], registry=registry
        )
        self.syncs = Counter("netpol_agent_syncs", "Syncs of the kernel that succeeded.", registry=registry)
        self.writes = Counter("netpol_agent_kernel_writes", "Kernel writes, by kind.", ["kind"], registry=registry)
        self.failures = Counter(
            "netpol_agent_kernel_failures",
            "Syncs that the kernel refused to the last, by stage.",
            ["stage"],
            registry=registry,
        )
        self.retries = Counter(
            "netpol_agent_kernel_retries",
            "Syncs planned anew after the kernel refused, by stage.",
            ["stage"],
            registry=registry,
        )
        self.drift_checks = Counter(
            "netpol_agent_drift_checks",
            "Times that the kernel was read to find drift, by cause.",
            ["cause"],
            registry=registry,
        )
        self.drift_found = Counter(
            "netpol_agent_drift_found",
            "Times that the kernel held something else, by cause of the check.",
            ["cause"],
            registry=registry,
        )
        self.drift_repaired = Counter(
            "netpol_agent_drift_repaired",
            "Times that drift was repaired, by cause of the check.",
            ["cause"],
            registry=registry,
        )
        self.last_sync = Gauge(
            "netpol_agent_last_successful_sync_timestamp_seconds",
            "When the kernel was last known to be as desired, in seconds since the epoch.",
            registry=registry,
        )
        self.in_sync = Gauge("netpol_agent_in_sync", "1 when all kinds have been listed.", registry=registry)
        self.ready = Gauge("netpol_agent_ready", "1 when /readyz says so.", registry=registry)
        self.unenforceable = Gauge(
            "netpol_agent_unenforceable", "Reasons why this host's traffic passes by the rules.", registry=registry
        )
        self.posted = Counter(
            "netpol_agent_events_posted", "Kubernetes Events about policies, by result.", ["result"], registry=registry
        )
        for kind in WRITES.values():
            self.writes.labels(kind)
        for cause in ("notice", "timer"):
            for counter in (self.drift_checks, self.drift_found, self.drift_repaired):
                counter.labels(cause)
        build = Gauge("netpol_agent_build_info", "Always 1; the version is a label.", ["version"], registry=registry)
        build.labels(__version__).set(1)
        registry.register(self)

    def synced(self, report: Report) -> None:
        """A sync succeeded."""
        self.syncs.inc()
        self.last_sync.set(time())
        for stage, number in report.refused.items():
            self.retries.labels(stage).inc(number)
        self.wrote(report)
        for stage, seconds in report.seconds.items():
            self.stage.labels(stage).observe(seconds)

    def wrote(self, report: Report) -> None:
        """Count kernel writes."""
        for field, kind in WRITES.items():
            number = getattr(report, field)
            if number:
                self.writes.labels(kind).inc(number)

    def collect(self) -> Iterator[Metric]:
        """The sizes."""
        sizes = self.sizes
        for name, help_text, value in (
            ("namespaces", "Namespaces that are known.", sizes.namespaces),
            ("pods_watched", "Pods of the cluster that are known.", sizes.pods),
            ("pods_local", "Addressable pods of this node, those on its own network aside.", sizes.local_pods),
            ("pods_isolated", "Pods of this node that a policy isolates.", sizes.isolated_pods),
            ("policies", "NetworkPolicies that are known.", sizes.policies),
            ("policies_enforced", "NetworkPolicies that isolate a pod of this node.", sizes.enforced_policies),
            ("chains", "Chains of ours in the kernel, of both families.", sizes.chains),
            ("rules", "Rules of ours in the kernel, of both families.", sizes.rules),
            ("sets", "Sets of ours in the kernel.", sizes.sets),
            ("set_members", "Members of all sets of ours.", sizes.members),
            ("queue_depth", "Objects that wait for the writer.", len(self._queue)),
        ):
            yield GaugeMetricFamily(f"netpol_agent_{name}", help_text, value=value)
        invalid = GaugeMetricFamily(
            "netpol_agent_invalid_policies",
            "NetworkPolicies that cannot be enforced as written, by reason (docs/findings.md).",
            labels=["reason"],
        )
        for reason, number in sorted(sizes.invalid.items()):
            invalid.add_metric([reason], number)
        yield invalid


def count_invalid(reasons: Iterable[Iterable[str]]) -> dict[str, int]:
    """Policies by the ids of their findings, each policy once per id."""
    return dict(Tally(reason for ids in reasons for reason in set(ids)))
