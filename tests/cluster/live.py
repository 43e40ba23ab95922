"""`netpol-agent run` on a node of the cluster, as a process of this machine in the node's network namespace."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.kube import kubectl, node_command
from tests.cluster.places import Places

MORTAL = ("setpriv", "--pdeathsig", "KILL")
"""Whoever kills the tests has killed the agents, too."""
HEALTH, METRICS = 10093, 10092
STARTED = 60.0
"""Seconds until an agent must be ready, on a machine that is busy with something else, too."""
STOPPED = 2.5
"""Seconds until an agent must have ended after SIGTERM: one, and what a busy machine adds."""


def until(true: Callable[[], Any], seconds: float, what: str, else_shown: Callable[[], str] = str) -> float:
    """Wait for what must become true; how long that took."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s: {what}\n{else_shown()}"
        time.sleep(0.02)
    return time.monotonic() - begin


def sample(metrics: str, name: str, **labels: str) -> float:
    """A sample of an agent's /metrics, the sum where labels leave several."""
    return sum(
        one.value
        for family in text_string_to_metric_families(metrics)
        for one in family.samples
        if one.name == f"netpol_agent_{name}" and labels.items() <= one.labels.items()
    )


def node_addresses(node: str) -> list[str]:
    """The node's addresses, an IPv4 one first."""
    form = "jsonpath={.status.addresses[?(@.type=='InternalIP')].address}"
    return sorted(kubectl("get", "node", node, "-o", form).split(), key=lambda address: ":" in address)


class Running:
    """One agent. `log` holds what all its processes have said."""

    def __init__(self, node: str, log: Path, places: Places, *options: str) -> None:
        self.node = node
        self.options = options
        self._log = log
        self._places = places
        self._address = node_addresses(node)[0]
        self._process: subprocess.Popen[bytes] | None = None
        self._begin = 0

    def start(self, *options: str) -> None:
        """Start it, with these options beside its own."""
        assert self._process is None
        self._begin = len(self.all_said())
        command = node_command(self.node, sys.executable, "-m", "agent", "run", "--node", self.node)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*MORTAL, *command, *self.options, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> float:
        return until(lambda: self.reasons() == "ok", STARTED, f"{self.node} is ready: {self.said()}")

    def reasons(self) -> str:
        """What /readyz says; "" while nobody listens."""
        assert self._process is None or self._process.poll() is None, f"{self.node} has ended: {self.said()}"
        with suppress(OSError):
            return self._places.fetch(self._address, HEALTH, "/readyz")[1].strip()
        return ""

    def metrics(self) -> str:
        return self._places.fetch(self._address, METRICS, "/metrics")[1]

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics, the sum where labels leave several."""
        return sample(self.metrics(), name, **labels)

    def said(self) -> str:
        """What the process that was started last has logged."""
        return self.all_said()[self._begin :]

    def all_said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def terminate(self) -> float:
        """SIGTERM, and what the agent promises of it; the seconds that it took."""
        process = self._process
        assert process is not None
        assert process.poll() is None, f"{self.node} has ended by itself: {self.said()}"
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._process = None
        seconds = time.monotonic() - begin
        assert code == 0, f"{self.node} ended with {code}: {self.said()}"
        assert seconds < STOPPED, f"{self.node} took {seconds:.2f} s to end"
        return seconds

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def runs(self) -> bool:
        return self._process is not None


Agents = dict[str, Running]
"""By node."""
