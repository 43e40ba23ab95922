"""A rolling update, as processes: the new agent starts beside the old one, and takes over when that one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.dataplane.kernel import Kernel, run
from tests.dataplane.scenes import NODE, Object, cluster, desired, policy
from tests.kube.server import Fault, Server
from tests.lab.world import REPOSITORY

pytestmark = pytest.mark.root
SECONDS = 20.0


class Process:
    """One agent; what it has said is in a file."""

    def __init__(self, log: Path, backend: str, kubeconfig: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "agent", "run", "--node", NODE, "--backend", backend]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--kubeconfig", str(kubeconfig), "--log-format", "json"], stderr=file, cwd=REPOSITORY
            )

    def says(self, words: str, times: int = 1) -> None:
        """Wait for it."""
        deadline = time.monotonic() + SECONDS
        while self.log.read_text().count(words) < times:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{words!r} is not in:\n{self.log.read_text()}"
            time.sleep(0.01)

    def end(self, number: signal.Signals) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextmanager
def api(tmp_path: Path, objects: list[Object]) -> Iterator[tuple[Path, Server]]:
    """An API server that has these objects, and a kubeconfig of it."""
    kubeconfig = tmp_path / "kubeconfig"
    run("ip", "link", "set", "lo", "up")
    with Server(*objects) as server:
        kubeconfig.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],"
            f"clusters: [{{name: c, cluster: {{server: '{server.url}'}}}}], users: [{{name: u, user: {{token: t}}}}]}}"
        )
        yield kubeconfig, server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_one_knows_the_cluster_before_it_may_write(
    backend: str, kernel: Kernel, tmp_path: Path, number: signal.Signals
) -> None:
    objects = cluster()
    with api(tmp_path, objects) as (kubeconfig, _):
        first = Process(tmp_path / "first", backend, kubeconfig)
        first.says("enforcing:")
        second = Process(tmp_path / "second", backend, kubeconfig)
        second.says("waiting for another netpol-agent to end")
        second.says("everything is known", times=3)
        assert "enforcing:" not in second.log.read_text()
        assert first.end(number) == (0 if number == signal.SIGTERM else -number)
        second.says("enforcing:")
        assert "0 kernel writes" in second.log.read_text()
        assert kernel.ours() == desired(objects)
        assert second.end(signal.SIGTERM) == 0
        assert kernel.ours() == desired(objects)


def test_one_that_waits_can_be_told_to_stop(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    with api(tmp_path, cluster()) as (kubeconfig, _):
        first = Process(tmp_path / "first", backend, kubeconfig)
        first.says("enforcing:")
        second = Process(tmp_path / "second", backend, kubeconfig)
        second.says("waiting for another netpol-agent to end")
        assert second.end(signal.SIGTERM) == 0
        assert kernel.ours() == desired(cluster())
        assert first.end(signal.SIGTERM) == 0


def test_one_that_could_not_work_does_not_follow(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    """It ends, with the reason; the one that is at work goes on."""
    objects = cluster()
    with api(tmp_path, objects) as (kubeconfig, server):
        first = Process(tmp_path / "first", backend, kubeconfig)
        first.says("enforcing:")
        server.spoil("NetworkPolicy", *[Fault("answer", status=403, body=b'{"message": "it may not"}')] * 3)
        second = Process(tmp_path / "second", backend, kubeconfig)
        assert second.process.wait(SECONDS) == 3
        assert "error: it may not (HTTP 403)" in second.log.read_text()
        server.put(edited := policy("later", {}, ingress=[]))
        first.says("NetworkPolicy x/later")
        assert first.end(signal.SIGTERM) == 0
        assert kernel.ours() == desired([*objects, edited])
