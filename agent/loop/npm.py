"""The metrics that dashboards of Azure NPM know, with its names, labels and units: times are in milliseconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Lock
from time import monotonic

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.loop.metrics import Metrics

QUANTILES = (0.5, 0.9, 0.99)
WINDOW = 600.0
"""Seconds that quantiles look back, as NPM's did."""
REMEMBERED = 2000
"""Observations that quantiles are taken of, at most."""


class Summary:
    """A summary with quantiles; `prometheus_client` has none."""

    def __init__(self, name: str, help_text: str, labels: dict[str, str] | None = None) -> None:
        self.name = name
        self.help = help_text
        self._labels = labels or {}
        self._lock = Lock()
        self._recent: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._count = 0
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """So long one of `times` took."""
        milliseconds = seconds * 1000
        with self._lock:
            self._recent.extend([(monotonic(), milliseconds)] * min(times, REMEMBERED))
            self._count += times
            self._sum += milliseconds * times

    def metric(self) -> Metric:
        """As the text format has it; a quantile of nothing is NaN."""
        with self._lock:
            values = sorted(value for when, value in self._recent if monotonic() - when <= WINDOW)
            count, total = self._count, self._sum
        metric = Metric(self.name, self.help, "summary")
        for quantile in QUANTILES:
            value = values[min(int(quantile * len(values)), len(values) - 1)] if values else float("nan")
            metric.add_sample(self.name, {**self._labels, "quantile": str(quantile)}, value)
        metric.add_sample(f"{self.name}_count", self._labels, count)
        metric.add_sample(f"{self.name}_sum", self._labels, total)
        return metric


class NodeMetrics(Collector):
    """`/node-metrics`: how long writing takes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.policy = Summary(
            "npm_add_policy_exec_time",
            "Execution time in milliseconds for adding a network policy",
            {"had_error": "false"},
        )
        self.rule = Summary(
            "npm_add_iptables_rule_exec_time", "Execution time in milliseconds for adding an IPTable rule to a chain"
        )
        self.ipset = Summary("npm_add_ipset_exec_time", "Execution time in milliseconds for creating an IP set")
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from (self.policy.metric(), self.rule.metric(), self.ipset.metric())


class ClusterMetrics(Collector):
    """`/cluster-metrics`: how much there is, of the sizes that `/metrics` tells."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        sizes = self._metrics.sizes
        for name, help_text, value in (
            ("npm_num_policies", "The number of current network policies for this node", sizes.policies),
            ("npm_num_iptables_rules", "The number of current IPTable rules for this node", sizes.rules),
            ("npm_num_ipsets", "The number of current IP sets for this node", sizes.sets),
            ("npm_num_ipset_entries", "The total number of entries in every IPSet", sizes.members),
        ):
            yield GaugeMetricFamily(name, help_text, value=value)
        counts = GaugeMetricFamily(
            "npm_ipset_counts", "The number of entries in each individual IPSet", labels=["set_name", "set_hash"]
        )
        for name, number in sorted(sizes.entries.items()):
            counts.add_metric([name, name.rpartition("-")[2]], number)
        yield counts
