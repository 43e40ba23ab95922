"""Kubernetes Events on policies that cannot be enforced as written.

An Event's name follows from policy and finding: whichever node is first creates it, and all others find it there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from hashlib import sha256
from queue import Full, Queue
from threading import Event as Flag
from threading import Thread

from agent.core.findings import Finding
from agent.core.policy import Policy
from agent.kube.connection import Connection
from agent.kube.errors import ApiError, Refused

REASON = "NotEnforcedAsWritten"
COMPONENT = "netpol-agent"
WAITING = 1000
"""Events that wait to be posted at most; those beyond are dropped, the log has them."""
PER_SECOND = 5.0
SPREAD = 3.0
"""Seconds in which all nodes post; most find the Event there already."""
MESSAGE_BYTES = 1024
NAME_BYTES = 253
TRIES = 3


class Announcer:
    """Posts Events in a thread of its own. `posted` is told the result of each: created, exists, or failed."""

    def __init__(self, connection: Connection, node: str, posted: Callable[[str], None]) -> None:
        self._connection = connection
        self._node = node
        self._posted = posted
        self._waiting: Queue[tuple[str, str, dict[str, object]]] = Queue(WAITING)
        self._told: dict[str, set[str]] = {}  # names of Events by policy
        self._stop = Flag()

    def start(self) -> None:
        Thread(target=self._run, name="events", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def announce(self, policy: Policy) -> None:
        """What is wrong with it: one Event for each id of a finding, once, for as long as it stays."""
        before = self._told.pop(policy.key, set())
        events = {event_name(policy, first): (first, more) for first, more in by_id(policy.findings)}
        if events:
            self._told[policy.key] = set(events)
        for name, (first, more) in events.items():
            if name not in before:
                try:
                    self._waiting.put_nowait((policy.key, name, event(policy, first, more, self._node)))
                except Full:
                    self._failed(policy.key, name)

    def forget(self, key: str) -> None:
        """A policy is gone."""
        self._told.pop(key, None)

    def _failed(self, key: str, name: str) -> None:
        """Tried again when the policy comes again."""
        self._told.get(key, set()).discard(name)
        self._posted("failed")

    def _run(self) -> None:
        while not self._stop.is_set():
            key, name, body = self._waiting.get()
            if self._stop.wait(random.uniform(0, SPREAD) if self._waiting.empty() else 1 / PER_SECOND):
                return
            if name not in self._told.get(key, ()):
                continue  # the policy is gone, or mended
            result = self._post(body)
            if result == "failed":
                self._failed(key, name)
            else:
                self._posted(result)

    def _post(self, body: dict[str, object]) -> str:
        metadata = body["metadata"]
        assert isinstance(metadata, dict)
        for attempt in range(TRIES):
            try:
                self._connection.post(f"/api/v1/namespaces/{metadata['namespace']}/events", body)
                return "created"
            except Refused as error:
                if error.status == 409:
                    return "exists"
                if error.status in (403, 404, 422):  # no permission, the namespace is going
                    return "failed"
                pause = error.retry_after or 1.0
            except ApiError:
                pause = 1.0
            except Exception:  # whatever it is, it must not end the thread
                return "failed"
            self._stop.wait(pause * (attempt + 1))
        return "failed"


def by_id(findings: Iterable[Finding]) -> list[tuple[Finding, str]]:
    """The first finding of each id, and in words how many more of it there are."""
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.id, []).append(finding)
    return [(found[0], f" (and {len(found) - 1} more like it)" * (len(found) > 1)) for found in grouped.values()]


def event_name(policy: Policy, finding: Finding) -> str:
    """The same on every node, for all findings of an id."""
    digest = sha256(f"{policy.uid} {finding.id}".encode()).hexdigest()[:16]
    return f"{policy.name[: NAME_BYTES - 17].rstrip('.-')}.{digest}"


def event(policy: Policy, finding: Finding, more: str, node: str) -> dict[str, object]:
    """A v1 Event on the policy."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    field = f"{finding.field}: " if finding.field else ""
    message = f"{field}{finding.message} [{finding.id}]{more}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": event_name(policy, finding), "namespace": policy.namespace},
        "involvedObject": {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "namespace": policy.namespace,
            "name": policy.name,
            "uid": policy.uid,
            "fieldPath": finding.field,
        },
        "type": "Warning",
        "reason": REASON,
        "message": message[:MESSAGE_BYTES],
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
