"""What the tests of the lab share: a small fabric, a way to run a test's body in an enclosure, a census."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.lab import enclosure
from agent.lab.fabric import Fabric, build
from agent.lab.servers import Servers
from agent.lab.spec import FabricSpec, Mode, NodeSpec, PodSpec

ALL = (("TCP", 80), ("UDP", 80), ("SCTP", 80))
PROTOCOLS = ("TCP", "UDP", "SCTP", "ICMP")
MODES: tuple[Mode, ...] = ("routed", "bridged")
BACKENDS = ("nft", "legacy")
REPOSITORY = Path(__file__).parents[2]
MARK = "NETPOL_AGENT_LAB_TEST"

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2"),
]


def pod(name: str, node: str, octet: int, **more: object) -> PodSpec:
    """A pod of namespace x with an address of each family in its node's range; listens on port 80."""
    number = int(node.removeprefix("n"))
    addresses = (f"10.244.{number}.{octet}", f"fd00:244:0:{number}::{octet:x}")
    return PodSpec("x", name, node, addresses, ALL, **more)  # type: ignore[arg-type]


def small(mode: Mode) -> FabricSpec:
    """Pods a and b on n1, c on n2, a hostNetwork pod h on n2, and a host outside with two addresses."""
    nodes = tuple(NodeSpec(f"n{i}", (f"192.168.0.{i}", f"fd00:1::{i:x}"), (("TCP", 10250),)) for i in (1, 2))
    host = PodSpec("x", "h", "n2", nodes[1].addresses, (("TCP", 9100), ("SCTP", 9100)), host_network=True)
    pods = (pod("a", "n1", 10), pod("b", "n1", 11), pod("c", "n2", 10), host)
    outside = ("203.0.113.5", "203.0.113.6", "2001:db8::5", "2001:db8::6")
    return FabricSpec(nodes, pods, outside, mode)


def address(fabric: Fabric, key: str, version: int) -> str:
    """The first address of a pod, node or outside in a family."""
    return next(a for holder, a in fabric.spec.held() if holder == key and (":" in a) == (version == 6))


def in_lab(mode: Mode, body: Callable[[Fabric], None]) -> None:
    """Run the body with the small fabric and its servers, in an enclosure; its failure is the test's."""

    def work() -> int:
        fabric = build(small(mode))
        with Servers(fabric):
            body(fabric)
        fabric.close()
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"


def marked(mark: str) -> list[int]:
    """The processes of this machine that were started with MARK=mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def census() -> set[str]:
    """Named namespaces, links and mounts of the machine."""
    netns = Path("/run/netns")
    found = {f"netns {entry.name}" for entry in netns.iterdir()} if netns.exists() else set()
    found |= {f"link {entry.name}" for entry in Path("/sys/class/net").iterdir()}
    found |= {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return found


def environment(mark: str, **more: str) -> dict[str, str]:
    """For a process that carries a mark and finds this project."""
    return {**os.environ, MARK: mark, "PYTHONPATH": str(REPOSITORY), **more}


@contextlib.contextmanager
def nothing_left() -> Iterator[str]:
    """A name that all processes of a test carry; after the test nothing of them may be left."""
    before = census()
    name = uuid.uuid4().hex
    yield name
    try:
        assert wait_until(lambda: not marked(name)), "processes are left"
        assert wait_until(lambda: census() <= before), census() - before
    finally:
        for pid in marked(name):
            os.kill(pid, signal.SIGKILL)


def as_nobody() -> list[str] | None:
    """A command that runs Python as a user without rights and with this project on its path, if there is one."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    # The interpreter of this environment may lie in a home directory that others cannot enter.
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        path = f"PYTHONPATH={REPOSITORY}:{sysconfig.get_path('platlib')}"
        command = [*user, "env", path, "PYTHONDONTWRITEBYTECODE=1", "HOME=/nonexistent", "XDG_RUNTIME_DIR=", python]
        probe = subprocess.run([*command, "-c", "import agent.lab.fabric"], capture_output=True, check=False)
        if probe.returncode == 0:
            return command
    return None


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it came true within the time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
