"""`python -m tests.bench.live.load`: the world of the benchmarks in a real API server, and out of it again.

Its nodes do not exist but as objects: without them the controller manager would collect the pods as orphans. Their
status is never reported, so their pods are never marked unready, and the pods tolerate every taint: they stay.
"""

from __future__ import annotations

import argparse
import json
from time import monotonic, sleep
from typing import Any

from tests.bench.live.api import MERGE, Api, ApiRefused, parallel
from tests.bench.world import World

PREFIX = "bench-"
NODE = PREFIX + "node-0"
NODES, NAMESPACES, PODS = "/api/v1/nodes", "/api/v1/namespaces", "/api/v1/pods"
POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"
LABEL = {"netpol-agent/bench": "world"}
NOW = "gracePeriodSeconds=0&propagationPolicy=Background"

Object = dict[str, Any]


class LiveWorld:
    """A World as objects to create, whose names begin with `family`, and addresses with `net`; worlds of different
    families may be there at once. Namespaces of different sizes have different names."""

    def __init__(self, pods: int, policies: int, local: int, *, family: str = PREFIX, net: int = 10) -> None:
        self.world = World(pods, policies, local)
        self.family, self._net = family, net
        self.prefix = f"{family}{pods}-"
        self.node = f"{family}node-0"

    def namespaces(self) -> list[Object]:
        found = [json.loads(data) for data in self.world.namespaces()]
        return [
            {
                "metadata": {
                    "name": self.prefix + one["metadata"]["name"],
                    "labels": {k: v for k, v in one["metadata"]["labels"].items() if "/" not in k} | LABEL,
                }
            }
            for one in found
            if one["metadata"]["name"] != "kube-system"
        ]

    def nodes(self) -> list[Object]:
        last = 1 + (self.world.pod_count - 1) // 100
        return [
            {"metadata": {"name": f"{self.family}node-{n}", "labels": LABEL}, "spec": {"unschedulable": True}}
            for n in range(last + 1)
        ]

    def pod(self, number: int, *, incarnation: int = 0, app: int | None = None) -> Object:
        data = self.world.pod(number, incarnation=incarnation, app=app)
        data = data.replace(b'"10.', b'"%d.' % self._net).replace(b'"fd00:', b'"fd%02x:' % (self._net - 10))
        one: Object = json.loads(data)
        meta, spec = one["metadata"], one["spec"]
        one["metadata"] = {
            "name": meta["name"],
            "namespace": self.prefix + meta["namespace"],
            "labels": meta["labels"],
            "annotations": meta["annotations"],
        }
        spec["nodeName"] = self.family + spec["nodeName"]
        spec["automountServiceAccountToken"] = False
        spec["terminationGracePeriodSeconds"] = 0
        spec["tolerations"] = [{"operator": "Exists"}]
        del spec["serviceAccount"], spec["priority"], spec["preemptionPolicy"]
        return one

    def pods(self) -> dict[str, int]:
        """Where each pod is, and its number."""
        found = {}
        for number in range(self.world.pod_count):
            one = self.pod(number)
            found[path(one)] = number
        return found

    def policy(self, number: int, *, port: int = 8080) -> Object:
        one: Object = json.loads(self.world.policy(number, port=port))
        meta = one["metadata"]
        one["metadata"] = {
            "name": meta["name"],
            "namespace": self.prefix + meta["namespace"],
            "labels": meta["labels"],
        }
        return one


def path(one: Object) -> str:
    """Where a pod or policy is."""
    namespace, name = one["metadata"]["namespace"], one["metadata"]["name"]
    if one["kind"] == "Pod":
        return f"{NAMESPACES}/{namespace}/pods/{name}"
    return f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/{name}"


def create(api: Api, one: Object) -> None:
    """A pod with its status, or a policy; one that is there is fine."""
    where = path(one)
    api.insist("POST", where.rpartition("/")[0], one, fine=(409,))
    if "status" in one:
        report(api, one)


def report(api: Api, one: Object) -> None:
    """What a kubelet says of a pod."""
    api.insist("PUT", path(one) + "/status", {k: v for k, v in one.items() if k != "spec"})


def load(api: Api, world: LiveWorld) -> dict[str, int]:
    """Make the server hold this world, and no other of ours; how many objects were written."""
    namespaces = world.namespaces()
    names = {one["metadata"]["name"] for one in namespaces}
    others = [one for one in _ours(api, NAMESPACES, world.family) if one not in names]
    remove(api, others)
    known = set(_ours(api, NODES, world.family))
    nodes = [one for one in world.nodes() if one["metadata"]["name"] not in known]
    parallel(lambda one: api.insist("POST", NODES, one, fine=(409,)), nodes)
    parallel(lambda one: api.insist("POST", NAMESPACES, one), _absent(api, namespaces, world.family))
    there = {path({**one, "kind": "Pod"}): "podIP" in one["status"] for one in _listed(api, PODS, world.family)}
    wanted = world.pods()
    extra = [where for where in there if where not in wanted]
    parallel(lambda where: api.insist("DELETE", f"{where}?{NOW}", fine=(404,)), extra)
    missing = [number for where, number in wanted.items() if not there.get(where)]
    parallel(lambda number: create(api, world.pod(number)), missing)
    policies = {path({**one, "kind": "NetworkPolicy"}) for one in _listed(api, POLICIES, world.family)}
    specs = [world.policy(number) for number in range(world.world.policy_count)]
    parallel(lambda where: api.insist("DELETE", where, fine=(404,)), policies - {path(one) for one in specs})
    absent = [one for one in specs if path(one) not in policies]
    parallel(lambda one: create(api, one), absent)
    return {"nodes": len(nodes), "pods": len(missing), "policies": len(absent), "namespaces": len(namespaces)}


def _absent(api: Api, namespaces: list[Object], family: str) -> list[Object]:
    known = set(_ours(api, NAMESPACES, family))
    return [one for one in namespaces if one["metadata"]["name"] not in known]


def _ours(api: Api, kind: str, family: str) -> list[str]:
    names = (one["metadata"]["name"] for one in api.list(kind))
    return [name for name in names if name.startswith(family)]


def _listed(api: Api, kind: str, family: str) -> list[Object]:
    return [one for one in api.list(kind) if one["metadata"]["namespace"].startswith(family)]


def remove(api: Api, namespaces: list[str]) -> None:
    """These, with all that is in them; waits until they are gone."""

    def work(name: str) -> None:
        for kind in (f"{NAMESPACES}/{name}/pods", f"/apis/networking.k8s.io/v1/namespaces/{name}/networkpolicies"):
            api.insist("DELETE", f"{kind}?{NOW}", fine=(404,))
        api.insist("DELETE", f"{NAMESPACES}/{name}", fine=(404, 409))

    parallel(work, namespaces)
    gone = set(namespaces)
    while gone & {one["metadata"]["name"] for one in api.list(NAMESPACES)}:
        sleep(0.5)


def unload(api: Api, family: str = PREFIX) -> None:
    """Everything that any world of this family has left."""
    remove(api, _ours(api, NAMESPACES, family))
    parallel(lambda name: api.insist("DELETE", f"{NODES}/{name}", fine=(404,)), _ours(api, NODES, family))


def relabel(api: Api, where: str, labels: dict[str, str | None]) -> None:
    api.insist("PATCH", where, {"metadata": {"labels": labels}}, MERGE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.live.load", description=__doc__)
    parser.add_argument("--pods", type=int, default=20_000)
    parser.add_argument("--policies", type=int, default=1_000)
    parser.add_argument("--local", type=int, default=100, help=f"pods on {NODE}")
    parser.add_argument("--remove", action="store_true", help="take everything away that was ever loaded")
    options = parser.parse_args()
    begin = monotonic()
    api = Api()
    try:
        if options.remove:
            unload(api)
            print(f"removed in {monotonic() - begin:.0f} s")
            return
        done = load(api, LiveWorld(options.pods, options.policies, options.local))
    except ApiRefused as error:
        parser.exit(1, f"{error}\n")
    print(", ".join(f"{n} {what}" for what, n in done.items()), f"written in {monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
