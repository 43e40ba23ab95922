"""The reflectors of all kinds, each in a thread of its own: what of them is in sync, and what keeps them from it."""

from __future__ import annotations

import logging
from threading import Event as Flag
from threading import Thread
from time import monotonic
from typing import NamedTuple

from agent.core.findings import Finding
from agent.kube.connection import Connection
from agent.kube.errors import ApiError, Defect, Gone, Refused
from agent.kube.kinds import KINDS, Object
from agent.kube.reflector import Patience, Reflector
from agent.loop import logs
from agent.loop.inbox import Inbox
from agent.loop.logs import log
from agent.loop.metrics import Metrics

PATIENCE = 30.0
"""Seconds without the API after which we say so in the readiness; what is enforced stays as it was."""
STEADY = 5.0
"""Seconds for which the server must answer until a fault is over: streams may open and fail, again and again."""


class Fault(NamedTuple):
    """Why the API does not tell us about a kind; `since` when that began, `over` when the server answered again, as
    `monotonic` tells it."""

    error: ApiError
    advice: str
    since: float
    over: float | None = None


class Watching:
    """The sink of all reflectors."""

    def __init__(self, connection: Connection, inbox: Inbox, metrics: Metrics, patience: Patience = Patience()) -> None:  # noqa: B008
        self._inbox = inbox
        self._metrics = metrics
        self._pending = {kind.name for kind in KINDS}
        self._faults: dict[str, Fault] = {}
        self._reflectors = [Reflector(kind, connection, self, patience) for kind in KINDS]
        self._stop = Flag()

    def start(self) -> None:
        for reflector in self._reflectors:
            name = f"watch-{reflector.kind.name}"
            Thread(target=reflector.run, args=(self._stop,), name=name, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    @property
    def complete(self) -> bool:
        """Whether everything that there is of every kind has been put into the inbox."""
        return not self._pending

    def reasons(self) -> list[str]:
        """Why we do not know the cluster, or not any more; [] when we do."""
        now = monotonic()
        pending, faults = sorted(self._pending), dict(self._faults)
        found = []
        for kind in sorted({*pending, *faults}):
            fault = faults.get(kind)
            if fault is None or fault.over is not None:
                found += [f"{kind}: the first list is not complete"] if kind in pending else []
            elif kind in pending or now - fault.since > PATIENCE:
                found.append(f"{kind}: {told(fault.error, fault.advice)}")
        return found

    # --- what reflectors tell ----------------------------------------------------------------------------------------

    def changed(self, kind: str, key: str, value: Object) -> None:
        self._metrics.events.labels(kind).inc()
        self._inbox.put(kind, key, value)

    def deleted(self, kind: str, key: str) -> None:
        self._metrics.events.labels(kind).inc()
        self._inbox.put(kind, key, None)

    def in_sync(self, kind: str) -> None:
        log(logging.INFO, f"{kind}: everything is known", kind=kind)
        self._pending.discard(kind)
        self._inbox.wake()

    def connected(self, kind: str) -> None:
        fault, now = self._faults.get(kind), monotonic()
        if fault is not None and fault.over is None:
            self._faults[kind] = fault._replace(over=now)
            if now - fault.since > 1:
                log(logging.INFO, f"{kind}: the API server answers again", kind=kind)

    def failed(self, kind: str, error: ApiError, advice: str) -> None:
        self._metrics.watch_restarts.labels(kind, error.kind).inc()
        before, now = self._faults.get(kind), monotonic()
        goes_on = before is not None and (before.over is None or now - before.over < STEADY)
        self._faults[kind] = Fault(error, advice, before.since if before and goes_on else now)
        level = logging.INFO if isinstance(error, Gone) else logging.WARNING
        log(level, f"{kind}: {told(error, advice)}", kind=kind)
        if isinstance(error, Defect):
            logs.LOGGER.error("this is a defect of netpol-agent", exc_info=error.__cause__)

    def unreadable(self, kind: str, finding: Finding) -> None:
        self._metrics.unreadable.labels(kind).inc()
        log(logging.ERROR, str(finding), kind=kind, id=finding.id)


def told(error: ApiError, advice: str) -> str:
    """An error with its advice, as one sentence."""
    prefix = "" if isinstance(error, Refused | Defect) else "no answer from the API server: "
    return f"{prefix}{error}; {advice}" if advice else f"{prefix}{error}"
