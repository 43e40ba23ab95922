"""Scenarios A to D against `netpol-agent run` on both nodes of a real cluster: real pods, policies, Services and DNS.

Each step's full matrix in both families, by connections that are made in the pods' network namespaces (`prober`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster.kube import NODES, connects, kubectl, needs_cluster, resolves
from tests.cluster.live import Agents
from tests.cluster.places import Places
from tests.cluster.stage import WHO, Serving, Stage, staged
from tests.packets.cases import Ask, through
from tests.recipes import CLIENT_AND_SERVER, RECIPES, THREE_NAMESPACES, THREE_TIERS
from tests.upstream import Case, Object, Step

pytestmark = [*needs_cluster, pytest.mark.usefixtures("agents")]

HTTP_AND_DNS = ((80, 53),)
SERVICES = (("db", 15984, 5984), ("api", 8080, 3000), ("web", 80, 80))
"""A Service's name, its port, and the port of the pod of that name."""
KINDS = ("curl", "curl-db", "curl-api", "curl-web", "db", "api", "web")


# --- A ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiers(places: Places) -> Iterator[Stage]:
    """Scenario A's pods, the cluster's own DNS among them, and its Services."""
    pods = json.loads(kubectl("-n", "kube-system", "get", "pods", "-l", "k8s-app=kube-dns", "-o", "json"))["items"]
    ready = [pod for pod in pods if all(one["ready"] for one in pod["status"].get("containerStatuses", [{"ready": 0}]))]
    dns = next((pod for pod in ready if pod["spec"]["nodeName"] in NODES), None) or pytest.skip("needs cluster DNS")
    held = sorted((one["ip"] for one in dns["status"]["podIPs"]), key=lambda address: ":" in address)
    borrowed = {"kube-system/dns": (dns["spec"]["nodeName"], held)}
    serving = Serving(HTTP_AND_DNS, more=(3000, 5984))
    kubectl("label", "namespace", "kube-system", "name-")
    try:
        with staged(Stage("tiers-", [THREE_TIERS], places, serving, borrowed)) as stage:
            yield stage
    finally:
        kubectl("label", "namespace", "kube-system", "name-")


def test_three_tiers(tiers: Stage) -> None:
    """By the pods' addresses and by Services, whose ports are others: a policy speaks of the pods' ports."""
    space = tiers.name("shop")
    kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": _services(space)}))
    cluster = {name: _cluster_addresses(space, name) for name, _, _ in SERVICES}
    cluster["dns"] = _cluster_addresses("kube-system", "kube-dns")

    def by_service(step: Step) -> list[Ask]:
        written = {(one.protocol, one.port): one.expected for one in step.probes}
        asks = [
            ask
            for name, port, target in SERVICES
            for address in cluster[name]
            for ask in through(f"svc/{name}", address, "TCP", port, f"shop/{name}", written["TCP", target])
        ]
        for address in cluster["dns"]:
            asks += through("svc/dns", address, "UDP", 53, "kube-system/dns", written["UDP", 53])
        return asks

    def labelled(step: Step) -> list[Ask]:
        label = "name=kube-system" if step.namespaces["kube-system"] else "name-"
        kubectl("label", "--overwrite", "namespace", "kube-system", label)
        return by_service(step)

    tiers.play(THREE_TIERS, labelled)
    assert {name for name in KINDS if resolves(name, namespace=space)} == {"api", "curl-api", "web", "curl-web"}
    assert connects("web", "api:8080", namespace=space)
    assert connects("api", "db:15984", namespace=space)
    assert not connects("web", "db:15984", namespace=space)
    assert not connects("curl-db", "api:8080", namespace=space)


def _services(space: str) -> list[Object]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": space, "name": name},
            "spec": {
                "selector": {WHO: name},
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"port": port, "targetPort": target}],
            },
        }
        for name, port, target in SERVICES
    ]


def _cluster_addresses(space: str, name: str) -> list[str]:
    return json.loads(kubectl("-n", space, "get", "service", name, "-o", "json"))["spec"]["clusterIPs"]


# --- B, C ------------------------------------------------------------------------------------------------------------


def test_three_namespaces(places: Places) -> None:
    """Ping and TCP; a namespace's label moves the verdicts of running pods."""
    with staged(Stage("three-", [THREE_NAMESPACES], places, Serving(HTTP_AND_DNS))) as stage:
        stage.play(THREE_NAMESPACES)


def test_client_and_server(places: Places) -> None:
    with staged(Stage("client-", [CLIENT_AND_SERVER], places, Serving(HTTP_AND_DNS))) as stage:
        stage.play(CLIENT_AND_SERVER)


# --- D ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kitchen(agents: Agents, places: Places) -> Iterator[Stage]:
    """The pods of all recipes, which take the labels that each recipe has for them."""
    assert set(agents) == set(NODES)
    with staged(Stage("recipes-", RECIPES, places, Serving(HTTP_AND_DNS, more=(5000, 6379, 8000, 8080)))) as stage:
        yield stage


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.number}-{recipe.title}")
def test_recipe(kitchen: Stage, recipe: Case) -> None:
    try:
        kitchen.play(recipe)
    finally:
        kitchen.end()
