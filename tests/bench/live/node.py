"""A node beside the cluster: network namespaces of our own, an agent in one of them, and its way to the API server.

Nothing of the machine's own network is changed. The API server's address is put on the node's loopback interface, and
what connects there is handed on, byte for byte, by a process outside.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from time import monotonic, perf_counter, sleep
from typing import Any

from tests.bench.live.api import Api
from tests.bench.live.load import NODE
from tests.bench.netns import inside, ip

NAME = "node"
GATE, GATE6 = "169.254.1.1", "fe80::1"
HEALTH, METRICS = 10093, 10092
CHUNK = 1 << 20
ASK = 0.02
"""Seconds between two questions whether the agent is ready: more of them cost it time."""
_TICKS = os.sysconf("SC_CLK_TCK")
_COUNTER = re.compile(r"^(netpol_agent_\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class Node:
    """An empty node, with pods where packets are to go. All of it ends with the enclosure of this process."""

    def __init__(self, api: Api, name: str = NODE) -> None:
        self.name = name
        self._server = (api.host, api.port)
        try:
            address = ipaddress.ip_address(api.host)
        except ValueError:
            sys.exit(f"{api.host}: the kubeconfig must name the API server by its address, for a node without DNS")
        ip("netns", "add", NAME)
        ip("-n", NAME, "link", "set", "lo", "up")
        if not address.is_loopback:
            ip("-n", NAME, "address", "add", str(address), "dev", "lo")
        with inside(NAME):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            listener = socket.create_server(self._server, family=family, backlog=64)
        get_context("fork").Process(target=_relay, args=(listener, self._server), daemon=True).start()
        listener.close()

    def add_pod(self, name: str, address: str) -> None:
        """A namespace that is routed by the node."""
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", NAME, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("-n", NAME, "link", "set", name, "up")
        ip("-n", NAME, "address", "add", f"{GATE}/32", "dev", name)
        ip("-n", NAME, "route", "add", f"{address}/32", "dev", name)
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "address", "add", f"{address}/32", "dev", "eth0")
        ip("-n", name, "route", "add", GATE, "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", GATE)

    def status(self, objects: str) -> tuple[int, str]:
        """What `netpol-agent status` says of these objects, and its exit code."""
        command = [sys.executable, "-m", "agent", "status", "-f", "-", "--node", self.name]
        with inside(NAME):
            done = subprocess.run(command, input=objects, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def _relay(listener: socket.socket, server: tuple[str, int]) -> None:
    while True:
        theirs, _ = listener.accept()
        ours = socket.create_connection(server)
        for one in (theirs, ours):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((theirs, ours), (ours, theirs)):
            Thread(target=_hand_on, args=(source, target), daemon=True).start()


def _hand_on(source: socket.socket, target: socket.socket) -> None:
    """Without a copy, until one side ends."""
    outlet, inlet = os.pipe()
    with suppress(OSError):
        while taken := os.splice(source.fileno(), inlet, CHUNK):
            while taken:
                taken -= os.splice(outlet, target.fileno(), taken)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    os.close(outlet)
    os.close(inlet)


class Agent:
    """`netpol-agent run` on the node, from its exec on. BENCH_PROFILE=FILE leaves where the time of the first one goes
    in FILE.0, and so on."""

    _number = count()

    def __init__(self, node: Node) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (kept open as long as the agent)
        profile = os.environ.get("BENCH_PROFILE")
        module = ["tests.bench.live.sampled", f"{profile}.{next(self._number)}"] if profile else ["agent"]
        command = [sys.executable, "-m", *module, "run", "--node", node.name]
        addresses = ["--health-address", f"127.0.0.1:{HEALTH}", "--metrics-address", f"127.0.0.1:{METRICS}"]
        with inside(NAME):
            self.began = perf_counter()
            self._process = subprocess.Popen([*command, *addresses], stdout=self._log, stderr=self._log)
        self.pid = self._process.pid

    def ready(self, patience: float = 120) -> float:
        """Seconds from its exec until /readyz says so."""
        until = monotonic() + patience
        while monotonic() < until and self._process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                if _fetch(HEALTH, "/readyz")[0] == 200:
                    return perf_counter() - self.began
            sleep(ASK)
        sys.exit(f"the agent is not ready\n{self.log()}")

    def log(self) -> str:
        self._log.flush()
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def says(self, words: str, times: int = 1, patience: float = 120) -> None:
        """Wait until the log has this so many times."""
        until = monotonic() + patience
        while self.log().count(words) < times:
            if monotonic() > until or self._process.poll() is not None:
                sys.exit(f"the agent does not say {words!r}\n{self.log()}")
            sleep(ASK)

    def metrics(self) -> dict[str, float]:
        """Sums over labels, and each with its labels."""
        found: dict[str, float] = {}
        for name, labels, value in _COUNTER.findall(_fetch(METRICS, "/metrics")[1]):
            found[name] = found.get(name, 0.0) + float(value)
            if labels:
                found[f"{name}{{{labels}}}"] = float(value)
        return found

    def processor_seconds(self) -> float:
        """User and system time of the process and of the programs that it has run."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS

    def memory(self) -> dict[str, float]:
        """Resident now and at its highest, in MiB."""
        lines = dict(line.partition(":")[::2] for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return {"resident": int(lines["VmRSS"].split()[0]) / 1024, "peak": int(lines["VmHWM"].split()[0]) / 1024}

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _fetch(port: int, path: str) -> tuple[int, str]:
    with inside(NAME):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.connect()
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
