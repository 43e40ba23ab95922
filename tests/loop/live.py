"""A live agent in this process and network namespace, fed by the test in the place of the API server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from agent.core.findings import Finding
from agent.core.policy import Policy
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from agent.kube.kinds import KINDS
from agent.loop.agent import Agent
from agent.loop.health import Health
from agent.loop.inbox import Inbox
from agent.loop.metrics import Metrics
from agent.loop.npm import NodeMetrics
from tests.dataplane.scenes import NODE, Object, namespace
from tests.nodes import key_of

READ = {kind.name: kind.read for kind in KINDS}
PATIENCE = 20.0
"""Seconds that a test waits for what must happen."""


class Announced:
    """In the place of the announcer: what would be posted."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def announce(self, policy: Policy) -> None:
        self.findings += policy.findings

    def forget(self, key: str) -> None:
        """Nothing is kept."""


class Live:
    """The agent, and what a watch would put into its inbox. `complete` says that all first lists have been put."""

    def __init__(self, backend: str, *, node: str = NODE, resync: float = 3600.0, linger: float = 0.0) -> None:
        self.complete = False
        self.fences = 0
        self.inbox = Inbox()
        self.metrics = Metrics(self.inbox)
        self.npm = NodeMetrics()
        self.health = Health(self.reasons)
        self.announced = Announced()
        self.dataplane = Dataplane(Backend(backend), linger=linger)
        self.agent = Agent(
            node,
            self.dataplane,
            self.inbox,
            self,
            metrics=self.metrics,
            npm=self.npm,
            health=self.health,
            announcer=self.announced,
            resync=resync,
            begin=lambda _: True,
        )

    def reasons(self) -> list[str]:
        """As `Watching.reasons`."""
        return [] if self.complete else ["the first list is not complete"]

    def put(self, *objects: Object) -> None:
        """Objects as the API server sends them."""
        for one in objects:
            kind, key = key_of(one)
            self.inbox.put(kind, key, READ[kind](_raw(one)))

    def gone(self, *objects: Object) -> None:
        for one in objects:
            self.inbox.put(*key_of(one), None)

    def become(self, before: Iterable[Object], after: Iterable[Object]) -> None:
        """The watch events that lead from some objects to others."""
        old, new = ({key_of(o): o for o in objects} for objects in (before, after))
        self.gone(*(o for key, o in old.items() if key not in new))
        self.put(*(o for key, o in new.items() if old.get(key) != o))

    def begin(self, objects: Iterable[Object]) -> None:
        """The first lists, to the end."""
        self.put(*objects)
        self.complete = True
        self.inbox.wake()

    def count(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(f"netpol_agent_{name}", labels) or 0.0

    def settle(self) -> None:
        """Until everything that was put is in the kernel: a second fence is not seen before the first is through."""
        for name in ("fence", "another-fence"):
            self.fences += 1
            fence = namespace(f"{name}-{self.fences}")
            self.put(fence)
            self.until(lambda: fence["metadata"]["name"] in self.agent.node.cluster.namespaces)  # noqa: B023
        self.until(lambda: self.health.enforcing == "")

    @staticmethod
    def until(true: Callable[[], Any]) -> None:
        """Wait for what must become true."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)

    def run(self, play: Callable[[], None]) -> None:
        """Run the agent here while `play` plays in a thread; what either raises is raised here."""
        raised: list[BaseException] = []

        def work() -> None:
            try:
                play()
            except BaseException as error:
                raised.append(error)
            finally:
                self.agent.stop()

        player = threading.Thread(target=work)
        player.start()
        try:
            self.agent.run()
        finally:
            self.agent.stop()
            player.join()
            self.dataplane.close()
        if raised:
            raise raised[0]


def _raw(one: Object) -> Any:
    return msgspec.Raw(msgspec.json.encode(one))
