"""A reflector of one kind in a thread, the server it follows, and what it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event as Flag
from threading import Thread
from typing import Any

from kubernetes.client import Configuration

from agent.core.findings import Finding
from agent.kube.connection import Connection, Source, Timeouts
from agent.kube.errors import ApiError
from agent.kube.kinds import POD, Kind, Object
from agent.kube.reflector import Patience, Reflector
from tests.kube.server import Asked, Server

TIMEOUTS = Timeouts(connect=5.0, answer=20.0, silence=20.0)
"""Longer than anything that is meant to end by itself."""
PATIENCE = Patience(first=0.002, longest=0.02)
DEADLINE = 20.0
"""Seconds that a test waits for what must happen."""


class Told:
    """A sink. `log` is all that was told, in its order; `objects` what there is by that."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.log: list[tuple[str, str]] = []
        self.failures: list[tuple[ApiError, str]] = []
        self.findings: list[Finding] = []
        self.versions_in_sync: list[frozenset[str]] = []

    def changed(self, kind: str, key: str, value: Object) -> None:
        assert kind
        self.objects[key] = value
        self.log.append(("changed", key))

    def deleted(self, kind: str, key: str) -> None:
        assert kind
        del self.objects[key]
        self.log.append(("deleted", key))

    def in_sync(self, kind: str) -> None:
        self.versions_in_sync.append(frozenset(self.objects))
        self.log.append(("in sync", kind))

    def connected(self, kind: str) -> None:
        self.log.append(("connected", kind))

    def failed(self, kind: str, error: ApiError, advice: str) -> None:
        self.failures.append((error, advice))
        self.log.append(("failed", f"{kind}: {error.kind}"))

    def unreadable(self, kind: str, finding: Finding) -> None:
        self.findings.append(finding)
        self.log.append(("unreadable", kind))

    @property
    def changes(self) -> list[tuple[str, str]]:
        return [(what, key) for what, key in self.log if what in ("changed", "deleted")]


class Following:
    """What a test of one reflector sees."""

    def __init__(self, server: Server, connection: Connection, kind: Kind) -> None:
        self.server = server
        self.connection = connection
        self.kind = kind
        self.told = Told()

    @property
    def asked(self) -> list[Asked]:
        return [one for one in self.server.asked if one.kind == self.kind.name]

    @property
    def lists(self) -> int:
        """How often all there is was asked for; pages behind the first do not count."""
        return sum(one.lists and "continue" not in one.query for one in self.asked)

    def until_known(self, *keys: str) -> None:
        """Until exactly these objects are there, as far as was told."""
        until(lambda: self.told.versions_in_sync and set(self.told.objects) == set(keys), lambda: self.told.log[-40:])

    def until_asked(self, times: int) -> None:
        """Until there were so many requests."""
        until(lambda: len(self.asked) >= times)


@contextmanager
def following(
    server: Server,
    kind: Kind = POD,
    *,
    source: Source | None = None,
    timeouts: Timeouts = TIMEOUTS,
    patience: Patience = PATIENCE,
    prepare: Callable[[Reflector], None] = lambda _: None,
) -> Iterator[Following]:
    """A reflector that follows a kind of the server's; the server ends with it."""
    connection = Connection(source or plainly(server), timeouts)
    found = Following(server, connection, kind)
    reflector = Reflector(kind, connection, found.told, patience)
    prepare(reflector)
    stop = Flag()
    thread = Thread(target=reflector.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        server.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def plainly(server: Server, **settings: Any) -> Source:
    """The server's address, and nothing else."""

    def source() -> Configuration:
        return Configuration(host=server.url, **settings)

    return source


def until(true: Callable[[], Any], why: Callable[[], Any] = lambda: "") -> None:
    """Wait for what must become true."""
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, f"it did not happen: {why()}"
        time.sleep(0.001)


def pod(name: str, **more: Any) -> dict[str, Any]:
    """A pod of namespace x, as the API server sends it."""
    metadata: Mapping[str, Any] = {"namespace": "x", "name": name, "uid": f"uid-{name}", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {}, "status": {}, **more}
