"""`apply` on a real cluster: scenario A's pods, Services and DNS, enforced from what kubectl prints.

`kube` says what it needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.kube import NODES, agent, agnhost, connects, kubectl, left_on, needs_cluster, on_node, resolves

HERE = Path(__file__).parent
POLICIES = HERE.parent.parent / "docs" / "scenarios" / "a-three-tiers"
SOURCES = ("curl", "curl-as-db", "curl-as-api", "curl-as-web", "db", "api", "web")

pytestmark = needs_cluster


def enforce() -> None:
    """What the README says: on each node, what kubectl prints."""
    objects = kubectl("get", "ns,pods,netpol", "-A", "-o", "yaml")
    for node in NODES:
        print(agent(node, "apply", "-f", "-", "--node", node, text=objects), end="")


@pytest.fixture(scope="module")
def shop() -> Iterator[dict[str, str]]:
    """Scenario A's pods, ready; afterwards nothing is left on the cluster or its nodes."""
    manifests = (HERE / "pods.yaml").read_text().replace("AGNHOST", agnhost())
    kubectl("apply", "-f", "-", text=manifests)
    kubectl("label", "namespace", "kube-system", "name-")
    try:
        kubectl("-n", "shop", "wait", "--for=condition=Ready", "pods", "--all", "--timeout=60s")
        addresses = {}
        for name in SOURCES:
            addresses[name] = kubectl("-n", "shop", "get", "pod", name, "-o", "jsonpath={.status.podIP}")
        for number, node in enumerate(NODES):
            shown = kubectl("get", "node", node, "-o", "jsonpath={.status.addresses[?(@.type=='InternalIP')].address}")
            addresses[NODES[1 - number] + "-as-outside"] = shown.split()[0]
        yield addresses
    finally:
        for node in NODES:
            agent(node, "clean")
        kubectl("label", "namespace", "kube-system", "name-")
        kubectl("delete", "namespace", "shop")


Pair = tuple[str, str]
TARGETS = {"db": 5984, "api": 3000, "web": 80}
EVERYTHING = {(s, t) for s in SOURCES for t in TARGETS if s != t}
API_TO_DB = {(s, "db") for s in ("api", "curl-as-api")}
WEB_TO_API = {(s, "api") for s in ("web", "curl-as-web")}
AS_API, AS_WEB = {"api", "curl-as-api"}, {"web", "curl-as-web"}

STEPS: tuple[tuple[str | None, bool, set[Pair], set[str], bool], ...] = (
    # manifest, label of kube-system, who reaches whom, who resolves names, whether outside reaches web
    (None, False, EVERYTHING, set(SOURCES), True),
    ("1-deny-all.yaml", False, set(), set(), False),
    ("2-db.yaml", False, set(), set(), False),
    ("3-api.yaml", False, API_TO_DB, set(), False),
    (None, True, API_TO_DB, AS_API, False),
    ("5-web.yaml", True, API_TO_DB | WEB_TO_API, AS_API | AS_WEB, True),
)


def test_three_tiers_step_by_step(shop: dict[str, str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for number, (manifest, labelled, reach, resolve, outside) in enumerate(STEPS):
            if manifest:
                kubectl("apply", "-f", str(POLICIES / manifest))
            if labelled:
                kubectl("label", "--overwrite", "namespace", "kube-system", "name=kube-system")
            enforce()
            pairs = sorted(EVERYTHING)
            found = pool.map(lambda p: connects(p[0], f"{shop[p[1]]}:{TARGETS[p[1]]}"), pairs)
            assert {pair for pair, passed in zip(pairs, found) if passed} == reach, f"step {number}"
            assert {s for s, passed in zip(SOURCES, pool.map(resolves, SOURCES)) if passed} == resolve, f"step {number}"
            from_node = "node2"  # web is on node1: node2 is an outside address there
            probe = on_node(from_node, sys.executable, "-c", _CONNECT, shop["web"], "80")
            assert (probe.returncode == 0) is outside, f"step {number}: outside → web"


_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"


@pytest.mark.usefixtures("shop")
def test_services_by_name() -> None:
    """After the last step: web → api through the Service's 8080 by name; not db, whose name resolves all the same."""
    assert connects("web", "api:8080")
    assert not connects("web", "db:15984")
    assert connects("api", "db:15984")
    assert not connects("curl-as-db", "api:8080")


def test_nothing_goes_outside(shop: dict[str, str]) -> None:
    """Another node's kubelet is an outside address."""
    assert not connects("web", f"{shop['node1-as-outside']}:10250")
    assert not connects("api", f"{shop['node2-as-outside']}:10250")


@pytest.mark.usefixtures("shop")
def test_a_second_apply_writes_nothing() -> None:
    objects = kubectl("get", "ns,pods,netpol", "-A", "-o", "yaml")
    for node in NODES:
        assert "unchanged: 0 kernel writes" in agent(node, "apply", "-f", "-", "--node", node, text=objects)
        assert "as programmed" in agent(node, "status", "-f", "-", "--node", node, text=objects)


@pytest.mark.usefixtures("shop")
def test_beside_kube_proxy() -> None:
    """kube-proxy writes all the time: a Service comes and goes, and neither side loses anything."""
    objects = kubectl("get", "ns,pods,netpol", "-A", "-o", "yaml")
    for number in range(5):
        name = f"extra-{number}"
        kubectl("-n", "shop", "create", "service", "clusterip", name, "--tcp=80:80")
        for node in NODES:
            agent(node, "apply", "-f", "-", "--node", node, text=objects)
        kubectl("-n", "shop", "delete", "service", name)
    time.sleep(1)
    for node in NODES:
        assert "as programmed" in agent(node, "status", "-f", "-", "--node", node, text=objects)
    assert connects("web", "api:8080")


def test_clean_leaves_nothing(shop: dict[str, str]) -> None:
    for node in NODES:
        agent(node, "clean")
        assert not left_on(node)
    assert connects("curl", f"{shop['db']}:5984")
