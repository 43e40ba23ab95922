"""What `helm test` runs says when a policy is enforced and when it is not; iptables is the policy here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chart.helm import CHART
from tests.dataplane.kernel import run

SERVER = ("127.0.0.2", "::1")


@contextmanager
def server() -> Iterator[None]:
    """On addresses of both families, as a pod has them."""
    run("ip", "link", "set", "lo", "up")
    command = [sys.executable, "-IB", CHART / "files/reach.py", "serve"]
    process = subprocess.Popen(command, env={"ADDRESSES": ",".join(SERVER)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "serving on 127.0.0.2,::1\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def client(role: str) -> tuple[int, str]:
    """Its exit code, and what it says."""
    environment = {"SERVICE": SERVER[0], "PATIENCE": "3", "SILENCE": "2"}
    command = [sys.executable, "-IB", CHART / "files/reach.py", role]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def closed(iptables: str, port: int, verdict: str = "DROP") -> None:
    run(iptables, "-w", "-A", "INPUT", "-p", "tcp", "--dport", str(port), "-j", verdict)


@pytest.mark.root
def test_what_is_enforced() -> None:
    with server():
        code, told = client("allowed")
        assert (code, told.count("ok: "), told.count("as the policy allows")) == (0, 2, 2), told
        closed("iptables", 8080)
        closed("ip6tables", 8080)
        code, told = client("denied")
        assert (code, told.count("ok: "), told.count("is silent")) == (0, 2, 2), told
        code, told = client("allowed")
        assert (code, told) == (1, "FAILED: 127.0.0.2:8080 should answer, and does not within 3 s: timed out\n")


@pytest.mark.root
def test_what_is_not_enforced() -> None:
    """For nobody, for one family only, or only after a while."""
    with server():
        code, told = client("denied")
        assert (code, told.partition(" answers, although")[0]) == (1, "FAILED: 127.0.0.2:8080"), told
        closed("iptables", 8080)
        code, told = client("denied")
        assert code == 1, told
        assert told.endswith(
            "FAILED: [::1]:8080 answers, although no policy allows it: the server's node does not enforce\n"
        )


@pytest.mark.root
def test_what_is_no_verdict() -> None:
    """A network that carries nothing, and a refusal: neither is a policy at work."""
    with server():
        closed("iptables", 8080, "REJECT")
        code, told = client("denied")
        assert (code, "refuses, which no policy does" in told) == (1, True), told
        closed("iptables", 8081)
        begin = time.monotonic()
        code, told = client("denied")
        assert (code, "127.0.0.2:8081 should answer" in told) == (1, True), told
        assert 3 <= time.monotonic() - begin < 10
