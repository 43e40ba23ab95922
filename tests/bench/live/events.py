"""From a change in the API server to the first packet that is judged by it: the whole way, as an operator sees it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from time import perf_counter, sleep
from typing import Any

from tests.bench.live.api import Api
from tests.bench.live.load import NAMESPACES, NODE, PREFIX, LiveWorld, Object, create, load, path, relabel, remove
from tests.bench.live.node import Agent, Node
from tests.bench.live.probe import Probe
from tests.bench.measure import spread

SPACE = PREFIX + "event"
HERE, THERE = "10.200.9.2", "10.63.9.3"
PORT, OTHER = 9999, 9998
PAUSE = (0.04, 0.08)
"""Between these, in seconds, lie two changes: nothing is left of the one before."""


def event(pods: int, policies: int, local: int, times: int) -> dict[str, Any]:
    """A pod elsewhere becomes a peer of an isolated pod here, and none again; a policy gets the port, and loses it."""
    api = Api()
    load(api, LiveWorld(pods, policies, local))
    target, peer = _pod("target", NODE, HERE, "fd00:200::902"), _pod("peer", PREFIX + "node-1", THERE, "fd00:63::903")
    try:
        api.insist("POST", NAMESPACES, {"metadata": {"name": SPACE}}, fine=(409,))
        for one in (target, peer, _policy(PORT)):
            create(api, one)
        node = Node(api)
        node.add_pod("here", HERE)
        node.add_pod("there", THERE)
        with Agent(node) as agent:
            agent.ready()
            return _measure(api, Probe("there", "here", HERE, PORT), peer, times)
    finally:
        remove(api, [SPACE])


def _measure(api: Api, probe: Probe, peer: Object, times: int) -> dict[str, Any]:
    def role(value: str | None) -> Callable[[], None]:
        return lambda: relabel(api, path(peer), {"role": value})

    def port(number: int) -> Callable[[], None]:
        one = _policy(number)
        return lambda: api.insist("PUT", path(one), one)

    random = Random(1)
    found: dict[str, dict[str, list[float]]] = {}
    assert probe.closed(perf_counter()), "the pod is isolated before anything is measured"
    for what, opens, closes in (
        ("relabelled", role("client"), role(None)),
        ("edited", port(PORT), port(OTHER)),
    ):
        if what == "edited":
            role("client")()
            closes()
            assert probe.closed(perf_counter() + 1)
        for _ in range(times):
            for name, change, judged in (("opened", opens, probe.opened), ("closed", closes, probe.closed)):
                sleep(random.uniform(*PAUSE))
                asked = perf_counter()
                change()
                answered = perf_counter()
                at = judged(asked)
                assert at is not None, f"{what}: packets are not judged anew"
                each = found.setdefault(f"{what} {name}", {"asked": [], "answered": [], "write": []})
                each["asked"].append(at - asked)
                each["answered"].append(max(at - answered, 0.0))
                each["write"].append(answered - asked)
    probe.end()
    return {name: {since: spread(values) for since, values in each.items()} for name, each in found.items()}


def _pod(name: str, node: str, v4: str, v6: str) -> Object:
    one = LiveWorld(1, 0, 1).pod(0)
    one["metadata"] |= {"name": name, "namespace": SPACE, "labels": {"app": name}}
    one["spec"]["nodeName"] = node
    one["status"] |= {"podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]}
    return one


def _policy(port: int) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "clients", "namespace": SPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": "target"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": {"role": "client"}}}],
                    "ports": [{"protocol": "UDP", "port": port}],
                }
            ],
        },
    }
