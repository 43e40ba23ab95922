"""The live agent: one writer that takes what waits, brings the node's state up to date, and the kernel with it.

Invariants: nothing is written before all kinds are known. What is enforced stays when the API goes away, when the
kernel refuses, and when this process ends, however it ends.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from select import POLLIN, poll
from time import monotonic, perf_counter
from typing import TypeVar

from agent.core.node import Node
from agent.core.objects import Namespace, Pod
from agent.core.policy import Policy
from agent.dataplane.applied import dispatched
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.environment import problems
from agent.dataplane.errors import KernelError
from agent.dataplane.lock import PAUSE
from agent.dataplane.report import Report, plural
from agent.kube.events import Announcer, by_id
from agent.kube.kinds import NAMESPACE, NETWORK_POLICY, POD
from agent.loop.health import Health
from agent.loop.inbox import Batch, Inbox
from agent.loop.logs import log
from agent.loop.metrics import Metrics, count_invalid, measure
from agent.loop.npm import NodeMetrics
from agent.loop.watching import Watching

TURN = 1.0
"""Seconds after which the writer comes round, if nothing happens."""
LOOK = 60.0
"""Seconds between two looks at what of this host passes by the rules."""
REFUSALS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)
"""Seconds between tries while the kernel refuses; then the process ends."""
AGAIN = 1.0
"""Seconds after the start, when we look again: a tool that a killed agent had begun may end only then."""
LISTS = 30.0
"""Seconds that the first lists may take without the garbage collector."""
QUIET = 0.2
"""Seconds between two looks at the kernel because somebody else writes to our chains, and goes on writing."""
TOLD = 5
"""Objects that a log line names at most."""

T = TypeVar("T")


class Agent:
    """Call `run` in the thread and network namespace of the dataplane; `stop` from anywhere. `begin` is asked again and
    again until it tells that nobody else writes; it is told whether we are prepared for that."""

    def __init__(
        self,
        node: str,
        dataplane: Dataplane,
        inbox: Inbox,
        watching: Watching,
        *,
        metrics: Metrics,
        npm: NodeMetrics,
        health: Health,
        announcer: Announcer,
        resync: float,
        begin: Callable[[bool], bool],
    ) -> None:
        self.node = Node(node)
        self._dataplane = dataplane
        self._inbox = inbox
        self._watching = watching
        self._metrics = metrics
        self._npm = npm
        self._health = health
        self._announcer = announcer
        self._resync = resync
        self._begin = begin
        self._begun = False  # whether it is our turn to write
        self._prepared = False  # whether all is ready for it, should it be another's turn
        self.stopping = False
        self.adopted = False  # whether the kernel was brought to what we know, at least once
        self._findings: dict[str, list[str]] = {}  # ids of what is wrong with a policy
        self._first_sight: dict[str, float] = {}  # when pods of this node, not yet isolated, got an address
        self._causes: list[str] = []  # policies and pods that concern this node, since the last sync
        self._counted = 0.0

    def stop(self) -> None:
        """End after the sync that is under way; safe in a signal handler."""
        self.stopping = True
        self._inbox.wake()

    def run(self) -> None:
        """Until `stop`. Raises KernelError when the kernel refuses to the last; what is enforced stays."""
        waiting = poll()
        waiting.register(self._inbox.fileno(), POLLIN)
        notices = self._dataplane.listen()
        if notices is not None:
            waiting.register(notices, POLLIN)
        gc.disable()  # while the first lists come: all of that stays
        begin = due = look = repaired = monotonic()
        disturbed = False
        while not self.stopping:
            if self._begun:
                rest = max(0.0, repaired + QUIET - monotonic()) if disturbed else TURN
            else:
                self._begun = self._begin(self._prepared)
                rest = 0.0 if self._begun else PAUSE
            told = {file for file, _ in waiting.poll(rest * 1000)}
            self._health.turned()
            disturbed |= notices in told and self._dataplane.disturbed()
            complete = self._watching.complete  # asked first: what makes it so is in the inbox then
            batch = self._inbox.take()
            self._apply(batch)
            if not self.adopted:
                if complete and not self._begun:
                    self._prepare()
                elif complete and self._adopt():
                    due = monotonic() + AGAIN
                elif monotonic() - begin > LISTS:
                    gc.enable()
                self._count()
                continue
            if batch:
                self._enforce(batch)
            elif self._dataplane.lingers:
                self._sync()
            cause = "timer" if monotonic() >= due else "notice"
            if cause == "timer" or (disturbed and monotonic() >= repaired + QUIET):
                self._repair(cause)
                repaired, disturbed = monotonic(), False
                due = repaired + self._resync
            if monotonic() >= look:
                self._look()
                look = monotonic() + LOOK
            self._count()

    # --- objects -----------------------------------------------------------------------------------------------------

    def _apply(self, batch: Batch) -> None:
        """Take in what each object is now."""
        begin = perf_counter()
        node = self.node
        for (kind, key), (value, since) in batch.items():
            if kind == POD.name:
                self._apply_pod(key, value, since)
            elif kind == NAMESPACE.name:
                if isinstance(value, Namespace):
                    node.apply_namespace(value)
                else:
                    node.delete_namespace(key)
            elif isinstance(value, Policy):
                self._note_findings(value)
                if node.apply_policy(value):
                    self._causes.append(f"{kind} {key}")
            else:
                self._findings.pop(key, None)
                self._announcer.forget(key)
                if node.delete_policy(key):
                    self._causes.append(f"{kind} {key}")
        if batch and self.adopted:
            self._metrics.stage.labels("event").observe(begin - min(change.since for change in batch.values()))
            self._metrics.stage.labels("state").observe(perf_counter() - begin)

    def _apply_pod(self, key: str, value: object, since: float) -> None:
        node = self.node
        before = node.cluster.pods.get(key)
        if (before is not None and before.local) or (isinstance(value, Pod) and value.node == node.cluster.node):
            self._causes.append(f"{POD.name} {key}")
        if not isinstance(value, Pod):
            self._first_sight.pop(key, None)
            node.delete_pod(key)
            return
        here = value.node == node.cluster.node and value.live and not value.host_network
        same = before is not None and before.uid == value.uid and before.addresses == value.addresses
        if self.adopted and here and not same:
            self._first_sight[key] = since
        node.apply_pod(value)

    def _note_findings(self, policy: Policy) -> None:
        ids = [finding.id for finding in policy.findings]
        if ids:
            self._findings[policy.key] = ids
            for first, more in by_id(policy.findings):
                log(logging.WARNING, f"{first}{more}", policy=policy.key, id=first.id)
        elif self._findings.pop(policy.key, None):
            log(logging.INFO, f"NetworkPolicy {policy.key}: is enforced as written now", policy=policy.key)
        self._announcer.announce(policy)

    # --- the kernel --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Have ready what is desired, while another agent still writes. Raises KernelError when we could not write."""
        self.node.compile()
        if not self._prepared:
            self._dataplane.read()
            _settle()
            self._prepared = True

    def _adopt(self) -> bool:
        """Bring the kernel from what an earlier run left to what is desired; False when that must wait."""
        if self._would_open():
            return False
        begin = perf_counter()
        report = self._sync()
        if report is None:
            return False
        _settle()
        self.adopted = True
        self._causes = []  # of the first lists, which are told as a whole
        self._look()
        other = self._dataplane.leave_other_backend()
        self._metrics.wrote(other)
        report.add(other)
        self._count(now=True)
        sizes = self._metrics.sizes
        log(
            logging.INFO,
            f"enforcing: {sizes.enforced_policies} of {plural(sizes.policies, 'policy')} in force on this node, "
            f"{sizes.isolated_pods} of {plural(sizes.local_pods, 'pod')} isolated; "
            f"{report if report.writes else 'as an earlier run left it: 0 kernel writes'}",
            writes=report.writes,
            seconds=round(perf_counter() - begin, 4),
        )
        return True

    def _would_open(self) -> bool:
        """Whether what is isolated here are no pods of this node, but of others or nobody's: its name may be wrong."""
        applied = self._insist(self._dataplane.read)
        if applied is None:
            return True
        cluster = self.node.cluster
        isolated = {address for table in applied.tables.values() for address in dispatched(table)}
        holders = [holder for address in isolated for holder in cluster.holders(address)]
        known = any(pod.local for pod in cluster.pods.values())
        if not isolated or any(holder.local for holder in holders) or (known and not holders):
            return False
        self._health.enforcing = (
            f"none of the {plural(len(isolated), 'address')} that are isolated here is a pod's of node {cluster.node}, "
            f"and {'some are of other nodes' if holders else 'no pod at all is on it'}: is --node right? "
            "If it is, stop, and run clean first"
        )
        log(logging.ERROR, self._health.enforcing)
        return True

    def _enforce(self, batch: Batch) -> None:
        report = self._sync()
        if report is None:
            return
        now = perf_counter()
        if report.writes:
            for change in batch.values():
                self._metrics.latency.observe(now - change.since)
            self._tell(batch, report, now)
        self._causes = []
        if self._first_sight:
            self._note_isolated(now)

    def _sync(self, *, from_kernel: bool = False) -> Report | None:
        """Compile, and write. None when we are told to stop before it is done."""

        def work() -> Report:
            begin = perf_counter()
            self.node.compile()
            self._metrics.stage.labels("compile").observe(perf_counter() - begin)
            return self._dataplane.resync(self.node) if from_kernel else self._dataplane.sync(self.node)

        report = self._insist(work)
        if report is not None:
            self._health.enforcing = ""
            self._metrics.synced(report)
            self._note_times(report)
        return report

    def _insist(self, work: Callable[[], T]) -> T | None:
        """Try again while the kernel refuses, with what is newest then; None when we are told to stop meanwhile.

        Raises KernelError in the end."""
        for pause in (*REFUSALS, None):
            try:
                return work()
            except KernelError as error:
                self._metrics.failures.labels(error.stage or "read").inc()
                self._health.enforcing = f"the kernel refuses: {error}"
                if pause is None:
                    raise
                log(logging.ERROR, f"{error} Enforcement stays as it was.", next_try_seconds=pause)
            self._pause(pause)
            if self.stopping:
                break
            self._apply(self._inbox.take())
        return None

    def _repair(self, cause: str) -> None:
        """Read the kernel, and put right what somebody else changed."""
        self._metrics.drift_checks.labels(cause).inc()
        self.node.forget_departed()
        report = self._sync(from_kernel=True)
        if report is not None and report.writes - report.sets_destroyed - report.connections_forgotten:
            self._metrics.drift_found.labels(cause).inc()
            self._metrics.drift_repaired.labels(cause).inc()
            log(logging.WARNING, f"drift: somebody changed what we had programmed; repaired: {report}")

    def _pause(self, seconds: float) -> None:
        """Wait, and stay alive, unless we are told to stop."""
        until = monotonic() + seconds
        waiting = poll()
        while not self.stopping and (left := until - monotonic()) > 0:
            self._health.turned()
            waiting.poll(min(left, 0.1) * 1000)

    # --- what operators see ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        found = problems(self.node)
        for problem in found:
            log(logging.ERROR, problem)
        self._health.unenforceable = found

    def _count(self, *, now: bool = False) -> None:
        """Sizes for the metrics, once a second at most."""
        if now or monotonic() - self._counted >= TURN:
            self._metrics.sizes = measure(self.node, self._dataplane.applied, count_invalid(self._findings.values()))
            self._counted = monotonic()

    def _note_times(self, report: Report) -> None:
        """For NPM's dashboards: the mean of what one of each took."""
        seconds = report.seconds
        if report.sets_created:
            self._npm.ipset.observe(seconds.get("sets", 0.0) / report.sets_created, report.sets_created)
        if report.chains_written:
            self._npm.rule.observe(seconds.get("rules", 0.0) / report.chains_written, report.chains_written)

    def _note_isolated(self, now: float) -> None:
        """Pods of this node that have got their first address, and are isolated now."""
        isolated = self.node.isolated_pods
        for key, since in self._first_sight.items():
            if key in isolated:
                self._metrics.isolation.observe(now - since)
                log(logging.INFO, f"pod {key} is isolated, {(now - since) * 1000:.1f} ms after its address was seen")
        self._first_sight.clear()

    def _tell(self, batch: Batch, report: Report, now: float) -> None:
        """One line for a change of rules; peers that come and go are for the metrics."""
        causes = self._causes
        slowest = now - min(change.since for change in batch.values())
        policies = [cause for cause in causes if cause.startswith(NETWORK_POLICY.name)]
        if policies:
            self._npm.policy.observe(slowest, len(policies))
        if report.transactions:
            named = ", ".join(sorted(causes)[:TOLD]) or plural(len(batch), "changed object")
            cause = f"{named} and {len(causes) - TOLD} more" if len(causes) > TOLD else named
            log(
                logging.INFO,
                f"{cause}: {report}; in force {slowest * 1000:.1f} ms after the first was seen",
                milliseconds=round(slowest * 1000, 2),
            )


def _settle() -> None:
    """What the first lists have made stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.enable()
