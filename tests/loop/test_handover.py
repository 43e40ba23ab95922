"""A rolling update, as processes: the new agent starts beside the old one, and takes over when that one ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.dataplane.kernel import Kernel, run
from tests.dataplane.scenes import NODE, Object, cluster, desired
from tests.kube.following import until
from tests.kube.server import Fault, Server
from tests.kube.wire import kubeconfig
from tests.lab.world import REPOSITORY

pytestmark = pytest.mark.root
SECONDS = 20.0


class Process:
    """One agent; what it has said is in a file."""

    def __init__(self, log: Path, backend: str, kubeconfig: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "agent", "run", "--node", NODE, "--backend", backend]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--kubeconfig", str(kubeconfig), "--log-format", "json", *options],
                stderr=file,
                cwd=REPOSITORY,
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
    path = tmp_path / "kubeconfig"
    run("ip", "link", "set", "lo", "up")
    with Server(*objects) as server:
        path.write_text(kubeconfig(server.url))
        yield path, server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_one_knows_the_cluster_before_it_may_write(
    backend: str, kernel: Kernel, tmp_path: Path, number: signal.Signals
) -> None:
    objects = cluster()
    with api(tmp_path, objects) as (path, _):
        first = Process(tmp_path / "first", backend, path)
        first.says("enforcing:")
        second = Process(tmp_path / "second", backend, path)
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
    with api(tmp_path, cluster()) as (path, _):
        first = Process(tmp_path / "first", backend, path)
        first.says("enforcing:")
        second = Process(tmp_path / "second", backend, path)
        second.says("waiting for another netpol-agent to end")
        assert second.end(signal.SIGTERM) == 0
        assert kernel.ours() == desired(cluster())
        assert first.end(signal.SIGTERM) == 0


def ready(instance: str, port: int = 10093) -> tuple[int, str]:
    """What a probe for the instance is told, whoever answers; 0 when nobody does."""
    asking = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        asking.request("GET", f"/readyz?instance={instance}" if instance else "/readyz")
        answer = asking.getresponse()
        return answer.status, answer.read().decode().strip()
    except OSError as error:
        return 0, str(error)
    finally:
        asking.close()


def test_the_one_at_work_says_whether_the_next_could_follow(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    """Not before it knows the cluster; and never for one of another name."""
    objects = cluster()
    with api(tmp_path, objects) as (path, server):
        first = Process(tmp_path / "first", backend, path, "--instance", "x/agent:1")
        first.says("enforcing:")
        assert ready("x/agent:1") == (200, "ok")
        status, why = ready("x/agent:2")
        assert (status, why) == (503, "x/agent:2 has not said that it could follow; its log says what it waits for")
        server.spoil("NetworkPolicy", *[Fault("answer", status=403, body=b'{"message": "it may not"}')] * 1000)
        second = Process(tmp_path / "second", backend, path, "--instance", "x/agent:2")
        other = Process(tmp_path / "other", backend, path, "--instance", "y/agent:1")
        second.says("it may not (HTTP 403)")
        assert ready("x/agent:2") == (503, why)
        server.behave()
        second.says("everything is known", times=3)
        until(lambda: ready("x/agent:2") == (200, "ok"))
        assert ready("x/agent:1") == (200, "ok")
        other.says("everything is known", times=3)
        assert ready("y/agent:1") == (503, "another netpol-agent is at work here, x/agent: one for a cluster")
        second.end(signal.SIGKILL)
        until(lambda: ready("x/agent:2") == (503, why))
        third = Process(tmp_path / "third", backend, path, "--instance", "x/agent:3")
        until(lambda: ready("x/agent:3") == (200, "ok"))
        assert other.end(signal.SIGTERM) == first.end(signal.SIGTERM) == 0
        third.says("enforcing:")
        until(lambda: ready("x/agent:3") == (200, "ok"))
        assert ready("x/agent:1")[0] == 503
        assert third.end(signal.SIGTERM) == 0
        assert kernel.ours() == desired(objects)


def test_where_somebody_else_listens_it_does_not_follow(backend: str, tmp_path: Path) -> None:
    """It ends before it is its turn; where nobody does, it answers while it waits."""
    with api(tmp_path, cluster()) as (path, _), socket.create_server(("127.0.0.1", 0)) as taken:
        first = Process(tmp_path / "first", backend, path)
        first.says("enforcing:")
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        second = Process(tmp_path / "second", backend, path, "--metrics-address", address)
        assert second.process.wait(SECONDS) == 3
        assert f"cannot listen on {address}: Address already in use" in second.log.read_text()
        third = Process(tmp_path / "third", backend, path, "--health-address", "127.0.0.1:10094")
        until(lambda: ready("", port=10094) == (200, "ok"))
        assert "enforcing:" not in third.log.read_text()
        assert first.end(signal.SIGTERM) == 0
        third.says("enforcing:")
        assert third.end(signal.SIGTERM) == 0
