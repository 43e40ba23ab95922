"""Kubernetes Events on policies that cannot be enforced as written.

An Event's name follows from policy and finding: whichever node is first creates it, and all others find it there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
        self._waiting: Queue[dict[str, object]] = Queue(WAITING)
        self._told: dict[str, set[str]] = {}  # names of Events by policy
        self._stop = Flag()

    def start(self) -> None:
        Thread(target=self._run, name="events", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def announce(self, policy: Policy) -> None:
        """Each finding once, for as long as it stays."""
        before = self._told.pop(policy.key, set())
        events = {str(event_name(policy, finding)): finding for finding in policy.findings}
        if events:
            self._told[policy.key] = set(events)
        for name, finding in events.items():
            if name not in before:
                try:
                    self._waiting.put_nowait(event(policy, finding, self._node))
                except Full:
                    self._posted("failed")

    def forget(self, key: str) -> None:
        """A policy is gone."""
        self._told.pop(key, None)

    def _run(self) -> None:
        while not self._stop.is_set():
            body = self._waiting.get()
            if self._stop.wait(random.uniform(0, SPREAD) if self._waiting.empty() else 1 / PER_SECOND):
                return
            self._posted(self._post(body))

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


def event_name(policy: Policy, finding: Finding) -> str:
    """The same on every node."""
    content = "\0".join((policy.uid, finding.id, finding.field, finding.message))
    digest = sha256(content.encode()).hexdigest()[:16]
    return f"{policy.name[: NAME_BYTES - 17].rstrip('.-')}.{digest}"


def event(policy: Policy, finding: Finding, node: str) -> dict[str, object]:
    """A v1 Event on the policy."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = (
        f"{finding.field}: {finding.message} [{finding.id}]" if finding.field else f"{finding.message} [{finding.id}]"
    )
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
