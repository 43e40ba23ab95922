"""The cluster and its nodes, as all tests here reach them.

Needs KUBECONFIG of a cluster with cluster DNS, no other policy engine and two nodes that take pods; NODES, their names,
where these are not node1,node2; and NODE_EXEC: the command that runs another one in a node's network namespace,
`{node}` standing for the node's name. For kind that is `docker exec -i {node}`; the development cluster's namespaces
are found by themselves.
The nodes must hold an agnhost image; AGNHOST names it where it is not found by itself.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

NODES = tuple(os.environ.get("NODES", "node1,node2").split(","))
DNS = "kube-dns.kube-system.svc.cluster.local."  # ends in a dot: not tried with every search domain


def node_exec() -> str | None:
    given = os.environ.get("NODE_EXEC")
    if given is None and all(Path(f"/run/netns/cl-{node}").exists() for node in NODES):
        return "ip netns exec cl-{node}"
    return given


needs_cluster = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="needs a cluster: KUBECONFIG is not set"),
    pytest.mark.skipif(node_exec() is None, reason="needs a way into the nodes: NODE_EXEC is not set"),
]


def kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def agnhost() -> str:
    """The name of the agnhost image on the nodes."""
    given = os.environ.get("AGNHOST")
    names = kubectl("get", "nodes", "-o", "jsonpath={.items[*].status.images[*].names[*]}").split()
    found = given or next((name for name in names if "/agnhost:" in name), None)
    return found or pytest.skip("needs an agnhost image on the nodes: AGNHOST is not set")


def node_command(node: str, *command: str) -> list[str]:
    """The command, as it is run in the node's network namespace."""
    return [*shlex.split((node_exec() or "").format(node=node)), *command]


def on_node(node: str, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(node_command(node, *command), input=text, capture_output=True, text=True, check=False)


def agent(node: str, *arguments: str, text: str = "") -> str:
    done = on_node(node, sys.executable, "-m", "agent", *arguments, text=text)
    assert done.returncode == 0, f"{node}: {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def left_on(node: str) -> list[str]:
    """Every line of the node's kernel that is ours."""
    lines = [
        line
        for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"])
        for line in on_node(node, *command).stdout.splitlines()
    ]
    return [line for line in lines if "NPA-" in line or "npa4-" in line or "npa6-" in line]


def connects(source: str, target: str, protocol: str = "tcp", *, namespace: str = "shop") -> bool:
    """A real connection from a real pod; by DNS where the target is a name of it."""
    return exec_in(source, target, f"--protocol={protocol}", namespace=namespace)[0]


def exec_in(source: str, target: str, *options: str, namespace: str = "shop") -> tuple[bool, str]:
    """Whether a connection from the pod was made, and what agnhost said."""
    command = ["kubectl", "-n", namespace, "exec", source, "--", "/agnhost", "connect", target, "--timeout=1s"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=30)
    return done.returncode == 0, done.stdout + done.stderr


def resolves(source: str, *, namespace: str = "shop") -> bool:
    """Whether DNS answers: the name is known, so that the connection is made, refused, or times out (no policy allows
    the TCP port of DNS). Without an answer agnhost says DNS."""
    for _ in range(3):
        made, said = exec_in(source, f"{DNS}:53", namespace=namespace)
        if made or "REFUSED" in said or "TIMEOUT" in said:
            return True
        if "DNS" in said:
            return False
    raise AssertionError(f"{source} cannot be asked: {said}")
