"""One process of the agent for a test to drive, what the kernel must hold after it, and a small cluster to change."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from agent.core.node import Node
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from agent.dataplane.render import OPTIONS, ipset_text, iptables_text
from agent.dataplane.report import Report
from tests.dataplane.kernel import FAMILIES, ours_of
from tests.nodes import change, node_of
from tests.tracer import Sets, Tables

Object = dict[str, Any]
NODE = "node-1"


class Agent:
    """A node's state, and the dataplane that brings the kernel to it; a new one is a restart."""

    def __init__(self, backend: str, objects: Iterable[Object] = (), linger: float = 0.0) -> None:
        self.objects = list(objects)
        self.node = node_of(self.objects, NODE)
        self.dataplane = Dataplane(Backend(backend), linger=linger)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.dataplane.close()

    def sync(self) -> Report:
        return self.dataplane.sync(self.node)

    def resync(self) -> Report:
        return self.dataplane.resync(self.node)

    def change(self, objects: Iterable[Object]) -> Report:
        """The watch events that lead to other objects, and a sync."""
        before, self.objects = self.objects, list(objects)
        change(self.node, before, self.objects)
        self.node.compile()
        return self.sync()


def applied(backend: str, objects: Iterable[Object]) -> Report:
    """What one short process did to enforce these objects."""
    with Agent(backend, objects) as agent:
        return agent.sync()


def desired(objects: Iterable[Object] | Node) -> dict[str, Any]:
    """What `Kernel.ours` must be, from the text that is rendered: no kernel has a part in it."""
    node = objects if isinstance(objects, Node) else node_of(objects, NODE)
    sets = Sets()
    sets.apply_restore(ipset_text(node))
    tables = {version: Tables.parse(iptables_text(node, version, OPTIONS), sets) for version in FAMILIES}
    return ours_of(sets, tables)


# --- a small cluster -------------------------------------------------------------------------------------------------


def pod(name: str, node: int, number: int, ports: dict[str, int] | None = None, **labels: str) -> Object:
    """A running pod of namespace x (or of the one before a slash in the name), with an address of each family."""
    namespace, _, own = name.rpartition("/")
    addresses = [f"10.0.{node}.{number}", f"fd00::{node}:{number:x}"]
    container = {"name": "c", "ports": [{"name": n, "containerPort": p} for n, p in (ports or {}).items()]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace or "x", "name": own, "uid": name, "labels": labels},
        "spec": {"nodeName": f"node-{node}", "containers": [container]},
        "status": {"phase": "Running", "podIP": addresses[0], "podIPs": [{"ip": a} for a in addresses]},
    }


def policy(name: str, selects: dict[str, str], **directions: Any) -> Object:
    """A policy of namespace x; `ingress` and `egress` are lists of rules, and isolate where they are given."""
    types = [direction.capitalize() for direction in directions]
    spec = {"podSelector": {"matchLabels": selects}, "policyTypes": types, **directions}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": name},
        "spec": spec,
    }


def namespace(name: str, **labels: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pods_with(**labels: str) -> Object:
    return {"podSelector": {"matchLabels": labels}}


def cluster() -> list[Object]:
    """Each kind of set, in both families: pods `web` and `db` of this node are isolated, `idle` is not.

    `db` and `web` share no class; `friend` (elsewhere) is a peer of both, `stranger` of none."""
    holes = {"cidr": "10.0.0.0/8", "except": ["10.0.1.0/24", "10.9.9.0/24"]}
    holes6 = {"cidr": "2001:db8::/32", "except": ["2001:db8:1:1::/64"]}
    web = [
        {"from": [pods_with(app="friend")], "ports": [{"port": 80}, {"port": "http"}]},
        {"from": [{"ipBlock": holes}, {"ipBlock": holes6}], "ports": [{"port": 443}]},
    ]
    db = [{"from": [pods_with(app="web"), pods_with(app="friend")], "ports": [{"port": 5432}]}]
    out = [{"to": [{"namespaceSelector": {"matchLabels": {"team": "y"}}}], "ports": [{"port": "dns"}]}]
    return [
        namespace("x"),
        namespace("y", team="y"),
        pod("web", 1, 1, {"http": 8080}, app="web"),
        pod("db", 1, 2, app="db"),
        pod("idle", 1, 3, app="idle"),
        pod("friend", 2, 1, app="friend"),
        pod("stranger", 2, 2, app="stranger"),
        pod("y/dns", 2, 3, {"dns": 53}, app="dns"),
        policy("web", {"app": "web"}, ingress=web, egress=out),
        policy("db", {"app": "db"}, ingress=db),
        policy("elsewhere", {"app": "stranger"}, ingress=[]),
    ]


def edited(objects: list[Object], name: str, **fields: Any) -> list[Object]:
    """The objects with one of them changed: `labels` of its metadata, or fields of its `spec`."""
    changed = copy.deepcopy(objects)
    found = next(o for o in changed if name in (o["metadata"]["name"], f"{o['kind']}/{o['metadata']['name']}"))
    if "labels" in fields:
        found["metadata"]["labels"] = fields.pop("labels")
    found.setdefault("spec", {}).update(fields)
    return changed


def without(objects: list[Object], *names: str) -> list[Object]:
    return [o for o in objects if f"{o['kind']}/{o['metadata']['name']}" not in names]
