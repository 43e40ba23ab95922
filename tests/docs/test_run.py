"""The commands of the documents, run: those that need no cluster. tests/e2e runs those that do."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.chart.helm import ROOT, helm
from tests.cli.shell import SCENARIOS, Command, agent, inside, system
from tests.docs.blocks import Block, blocks, commands
from tests.docs.test_documents import WRITTEN
from tests.lab.world import BACKENDS

MARKED = [(path, block) for path in WRITTEN for block in blocks(path) if block.mark]
INSTALL, MIGRATING = ROOT / "docs/install.md", ROOT / "docs/migrating-from-npm.md"
PODS = """
- {apiVersion: v1, kind: Namespace, metadata: {name: demo}}
- apiVersion: v1
  kind: Pod
  metadata: {name: server, namespace: demo, labels: {app: server}}
  spec: {nodeName: node1, containers: [{name: nginx}]}
  status: {phase: Running, podIPs: [{ip: 10.244.1.3}, {ip: "fd00:244:0:1::3"}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: client, namespace: demo, labels: {app: client}}
  spec: {nodeName: node2, containers: [{name: busybox}]}
  status: {phase: Running, podIPs: [{ip: 10.244.2.3}, {ip: "fd00:244:0:2::3"}]}
"""
POLICY = SCENARIOS / "c-client-and-server/1-policy.yaml"


def marked(mark: str) -> pytest.MarkDecorator:
    found = [pytest.param(block, id=f"{path.name}:{block.line}") for path, block in MARKED if block.mark == mark]
    return pytest.mark.parametrize("block", found)


def bash(block: Block, **more: str) -> Command:
    """A block as somebody types it, in the repository, with netpol-agent on PATH; it ends with the first failure."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return Command(("bash", "-euc", f"cd {shlex.quote(str(ROOT))}\n{block.text}"), "", {"PATH": path, **more})


def in_force() -> list[Command]:
    """A node that enforces a policy on a pod."""
    objects = "apiVersion: v1\nkind: List\nitems:" + PODS
    text = f"{objects}---\n{POLICY.read_text()}"
    return [agent("apply", "-f", "-", "--node", "node1", text=text)]


@marked("files")
@pytest.mark.root
def test_files(block: Block) -> None:
    done = bash(block).run()
    assert done.code == 0, done
    assert done.out


@marked("chart")
def test_chart(block: Block) -> None:
    """What would be installed renders."""
    for line in commands(block.text):
        words = shlex.split(line)
        assert words[0] == "helm"
        done = helm("template", *(word for word in words[1:] if word not in ("install", "upgrade", *NOT_OF_TEMPLATE)))
        assert done.returncode == 0, done.stderr
        assert "kind: DaemonSet" in done.stdout


NOT_OF_TEMPLATE = ("--install", "--wait", "--reset-then-reuse-values")


@marked("node")
@pytest.mark.root
def test_node(block: Block) -> None:
    """On a node where something is enforced; afterwards it is as it was."""
    *_, done, status = inside(*in_force(), bash(block), agent("status"))
    assert done.code == 0, done
    assert "as programmed" in status.out, status
    if "AZURE-NPM" not in block.text:
        for words in ("-A FORWARD -j NPA-FORWARD", "demo/server", "demo/demo-policy", "npa4-p-", "as programmed"):
            assert words in done.out, words


def test_blocks_for_a_cluster_are_a_life_of_a_release() -> None:
    """They install, verify, test, upgrade and uninstall, in this order, and need nobody at the keyboard."""
    text = "\n".join(block.text for path, block in MARKED if block.mark == "cluster" and path == INSTALL)
    steps = re.findall(r"^(helm \w+|kubectl [\w -]*?(?:status|exec|get))", text, re.MULTILINE)
    order = [step for step in steps if step.startswith("helm")]
    assert order == ["helm install", "helm test", "helm upgrade", "helm uninstall"]
    assert not {path for path, block in MARKED if block.mark == "cluster"} - {INSTALL}
    for forbidden in ("$REGISTRY", "POD", "…", " -it ", "edit"):
        assert forbidden not in text, forbidden


# --- what is left of NPM ----------------------------------------------------------------------------------------------

LEFTOVERS = """
ipset create azure-npm-100 hash:net
ipset create azure-npm-200 list:set
ipset add azure-npm-200 azure-npm-100
ipset create another hash:ip
iptables-BACKEND-restore --noflush <<'EOF'
*filter
:AZURE-NPM - [0:0]
:AZURE-NPM-INGRESS - [0:0]
:AZURE-NPM-INGRESS-123 - [0:0]
:AZURE-NPM-ACCEPT - [0:0]
:ANOTHER - [0:0]
-A FORWARD -m conntrack --ctstate NEW -j AZURE-NPM
-A FORWARD -j ANOTHER
-A AZURE-NPM -j AZURE-NPM-INGRESS
-A AZURE-NPM -j AZURE-NPM-ACCEPT
-A AZURE-NPM-INGRESS -m set --match-set azure-npm-200 src -j AZURE-NPM-INGRESS-123
-A AZURE-NPM-INGRESS-123 -j MARK --set-xmark 0x200/0x200
-A AZURE-NPM-ACCEPT -j ACCEPT
-A ANOTHER -m set --match-set another src -j ACCEPT
COMMIT
EOF
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.root
def test_what_npm_left_goes_and_nothing_else(backend: str) -> None:
    (block,) = (block for path, block in MARKED if path == MIGRATING and block.mark == "node")
    held = system("sh", "-c", f"iptables-{backend}-save -t filter; ipset list -name")
    *_, left, before, done, after, status = inside(
        *in_force(),
        system("sh", "-euc", LEFTOVERS.replace("BACKEND", backend)),
        held,
        bash(block),
        held,
        agent("status"),
    )
    assert left.code == 0, left
    assert "AZURE-NPM" in before.out
    assert done.code == 0, done

    def others(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return [line for line in lines if "azure-npm" not in line.lower()]

    assert others(after.out) == [line for line in after.out.splitlines() if not line.startswith("#")], "all of NPM's"
    assert sorted(others(after.out)) == sorted(others(before.out)), "and nothing else"
    assert "as programmed" in status.out


# --- kind -------------------------------------------------------------------------------------------------------------

NODES = """kind-control-plane|10.244.0.0/24 fd00:10:244::/64|172.18.0.2 fc00:f853::2
kind-worker|10.244.1.0/24 fd00:10:244:1::/64|172.18.0.3 fc00:f853::3
"""
PROVIDER = """#!/bin/sh
# "docker exec -i NODE sh -euc COMMANDS": a node is a network namespace, its /etc/cni/net.d a directory of ours
[ "$1 $2 $4 $5" = "exec -i sh -euc" ] || exit 9
mkdir -p "$PLACE/$3"
exec ip netns exec "$3" sh -euc "$(printf %s "$6" | sed "s#/etc/cni/net.d#$PLACE/$3#g")"
"""
TWICE = """
for node in kind-control-plane kind-worker; do ip netns add $node; done
ip link add one netns kind-control-plane type veth peer name two netns kind-worker
address() { ip -n $1 address add $2 dev $3 nodad; ip -n $1 address add $4 dev $3; ip -n $1 link set $3 up; }
address kind-control-plane fc00:f853::2/64 one 172.18.0.2/16
address kind-worker fc00:f853::3/64 two 172.18.0.3/16
"$SCRIPT"; "$SCRIPT" >/dev/null
"""


@pytest.mark.root
def test_the_network_of_kind(tmp_path: Path) -> None:
    """docs/kind/network.sh with namespaces for nodes: routes, masquerading, and a configuration for plugins."""
    for name, text in (("docker", PROVIDER), ("kubectl", f"#!/bin/sh\ncat <<'EOF'\n{NODES}EOF\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    more = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PLACE": str(tmp_path / "nodes"),
        "SCRIPT": str(ROOT / "docs/kind/network.sh"),
    }
    looks = [
        f"{tool} -n kind-worker {family} route show proto boot; {tool} netns exec kind-worker {tables}-save -t nat"
        for tool, family, tables in (("ip", "-4", "iptables"), ("ip", "-6", "ip6tables"))
    ]
    done, four, six = inside(Command(("sh", "-euc", TWICE), "", more), *(system("sh", "-c", look) for look in looks))
    assert done.code == 0, done
    assert "kind-worker: pods get addresses of 10.244.1.0/24 fd00:10:244:1::/64" in done.out
    assert "10.244.0.0/24 via 172.18.0.2" in four.out
    assert "fd00:10:244::/64 via fc00:f853::2" in six.out
    for family, here, elsewhere in (
        (four, "10.244.1.0/24", "10.244.0.0/24"),
        (six, "fd00:10:244:1::/64", "fd00:10:244::/64"),
    ):
        rules = [line for line in family.out.splitlines() if "PODS-OUT" in line and line.startswith("-A")]
        assert sorted(rules) == sorted(
            [
                f"-A POSTROUTING -s {here} -j PODS-OUT",
                f"-A PODS-OUT -d {here} -j RETURN",
                f"-A PODS-OUT -d {elsewhere} -j RETURN",
                "-A PODS-OUT -j MASQUERADE",
            ]
        ), "once, though it ran twice"
    conflist = json.loads((tmp_path / "nodes/kind-worker/10-pods.conflist").read_text())
    ptp, portmap = conflist["plugins"]
    assert (ptp["type"], ptp["ipMasq"], ptp["ipam"]["type"], portmap["type"]) == ("ptp", False, "host-local", "portmap")
    assert ptp["ipam"]["ranges"] == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]]
    assert [route["dst"] for route in ptp["ipam"]["routes"]] == ["0.0.0.0/0", "::/0"]
