"""A cluster made up for measuring: as many pods and policies as asked for, as the bytes that an API server sends.

Deployments of ten pods, spread over the namespaces, each with a common app name of which every namespace has its own;
policies select one deployment each, and allow two peers on two ports; a third have egress rules too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from agent.core.node import Node
from agent.core.objects import decode_namespace, decode_pod
from agent.core.policy import Policy, read_policy

LOCAL = "node-0"
REPLICAS = 10
TEAMS = 10
TIERS = ("frontend", "backend", "data")
DNS_PODS = 2
NAMED, EGRESS = 0.1, 0.33
"""Shares of the policies that name a port, and that have egress rules too."""
DIGITS = "bcdfghjklmnpqrstvwxz2456789"


class World:
    """`policies` on `pods`, of which `local` are on the node judged, each of them selected by a policy."""

    def __init__(self, pods: int, policies: int, local: int) -> None:
        self.pod_count, self.policy_count, self.local_count = pods, policies, local
        self.deployments = max(pods // REPLICAS, 1)
        self.spaces = min(max(pods // 200, 50), 200, self.deployments)
        self._here: dict[int, int] = {}  # pod → its number on the node
        used: dict[int, int] = {}
        for number in range(local):
            deployment = self._selected(number * policies // local) if policies else number * self.deployments // local
            replica = used.get(deployment, 0)
            used[deployment] = replica + 1
            self._here[replica * self.deployments + deployment] = number

    def _selected(self, policy: int) -> int:
        """The deployment that a policy selects."""
        return policy * self.deployments // self.policy_count

    def _place(self, deployment: int) -> tuple[int, int]:
        """A deployment's namespace, and its number in there."""
        space = deployment * self.spaces // self.deployments
        first = -(-space * self.deployments // self.spaces)
        return space, deployment - first

    # --- what the server sends ---------------------------------------------------------------------------------------

    def namespaces(self) -> Iterator[bytes]:
        for space in range(self.spaces):
            yield _namespace(f"team-{space % TEAMS}-{space}", {"team": f"t-{space % TEAMS}", "stage": "production"})
        yield _namespace("kube-system", {})

    def pods(self) -> Iterator[bytes]:
        for pod in range(self.pod_count):
            yield self.pod(pod)
        for number in range(DNS_PODS):
            labels = {"k8s-app": "kube-dns", "pod-template-hash": "6f6b679f8f"}
            yield _pod("kube-system", "coredns-6f6b679f8f", number, labels, "node-1", "10.63", number + 2, 0)

    def pod(self, pod: int, *, incarnation: int = 0, app: int | None = None) -> bytes:
        """A pod's present state; another `incarnation` is another pod of the same deployment, in its place."""
        deployment = pod % self.deployments
        space, number = self._place(deployment)
        template = _random_name(Random(deployment), 10)
        labels = {
            "app": f"app-{number if app is None else app}",
            "app.kubernetes.io/managed-by": "Helm",
            "pod-template-hash": template,
            "tier": TIERS[number % len(TIERS)],
            "version": f"v1.{deployment % 4}",
        }
        name = f"app-{number}-{template}"
        here = self._here.get(pod)
        if here is not None:
            return _pod(f"team-{space % TEAMS}-{space}", name, pod, labels, LOCAL, "10.200", here + 2, incarnation)
        node = f"node-{1 + pod // 100}"
        return _pod(f"team-{space % TEAMS}-{space}", name, pod, labels, node, None, pod, incarnation)

    def policies(self) -> Iterator[bytes]:
        for policy in range(self.policy_count):
            yield self.policy(policy)

    def policy(self, policy: int, *, port: int = 8080) -> bytes:
        deployment = self._selected(policy)
        space, number = self._place(deployment)
        random = Random(policy)
        apps = self.deployments // self.spaces or 1
        near, far, team = (
            f"app-{random.randrange(apps)}",
            f"app-{random.randrange(apps)}",
            f"t-{random.randrange(TEAMS)}",
        )
        second: int | str = "metrics" if random.random() < NAMED else 9090
        spec: dict[str, Any] = {
            "podSelector": {"matchLabels": {"app": f"app-{number}"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [
                        {"podSelector": {"matchLabels": {"app": near}}},
                        {
                            "namespaceSelector": {"matchLabels": {"team": team}},
                            "podSelector": {"matchLabels": {"app": far}},
                        },
                    ],
                    "ports": [{"protocol": "TCP", "port": port}, {"protocol": "TCP", "port": second}],
                }
            ],
        }
        if random.random() < EGRESS:
            spec["policyTypes"].append("Egress")
            spec["egress"] = [
                {
                    "to": [
                        {
                            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
                            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
                        }
                    ],
                    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
                },
                {
                    "to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "169.254.169.254/32"]}}],
                    "ports": [{"protocol": "TCP", "port": 443}],
                },
                {"to": [{"podSelector": {"matchLabels": {"app": near}}}]},
            ]
        return policy_bytes(f"team-{space % TEAMS}-{space}", f"allow-{number}-{policy}", spec)

    # --- who is who --------------------------------------------------------------------------------------------------

    def app(self, pod: int) -> int:
        """The number of a pod's app."""
        return self._place(pod % self.deployments)[1]

    def local_pods(self) -> list[int]:
        return list(self._here)

    def remote_pods(self) -> Iterator[int]:
        return (pod for pod in range(self.pod_count) if pod not in self._here)


def policy_bytes(namespace: str, name: str, spec: dict[str, Any]) -> bytes:
    manifest = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": "9d3b3f5e-4c36-4a3a-9d0e-0f3f6ad3ab11",
            "resourceVersion": "118237",
            "generation": 1,
            "creationTimestamp": "2025-03-04T08:15:02Z",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
        },
        "spec": spec,
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


def read(data: bytes) -> Policy:
    """A policy from the bytes that the server sends."""
    return read_policy(msgspec.json.decode(data))


APPLY: dict[str, Callable[[Node, bytes], None]] = {
    "namespaces": lambda node, data: node.apply_namespace(decode_namespace(data)),
    "pods": lambda node, data: node.apply_pod(decode_pod(data)),
    "policies": lambda node, data: node.apply_policy(read(data)),
}
"""How each kind goes from the bytes of an event into the node's state."""


def _template() -> str:
    """pod.json as the server sends it: in one line, with places to fill in."""
    text = json.dumps(json.loads(Path(__file__).with_name("pod.json").read_text()), separators=(",", ":"))
    text = text.replace('"@labels@"', "@labels@").replace('"@fields@":{}', "@fields@")
    return re.sub("@([a-z0-9]+)@", r"%(\1)s", text)


_TEMPLATE = _template()


def _random_name(random: Random, length: int) -> str:
    return "".join(random.choices(DIGITS, k=length))


def _namespace(name: str, labels: dict[str, str]) -> bytes:
    meta = {
        "name": name,
        "uid": "0f3f6ad3-4c36-4a3a-9d0e-9d3b3f5eab11",
        "resourceVersion": "2218",
        "creationTimestamp": "2025-03-01T10:00:00Z",
        "labels": {**labels, "kubernetes.io/metadata.name": name},
    }
    rest = {"spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    return json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": meta, **rest}).encode()


def _pod(
    namespace: str,
    owner: str,
    pod: int,
    labels: dict[str, str],
    node: str,
    net: str | None,
    host: int,
    incarnation: int,
) -> bytes:
    number = host + (incarnation << 20 if net is None else 0)
    low = f"{number >> 8 & 255}.{number & 255}"
    v4 = f"{net}.{low}" if net else f"10.{64 + (number >> 16) % 128}.{low}"
    v6 = f"fd00:{net.split('.')[1]}::{host:x}" if net else f"fd00:64::{number >> 16:x}:{number & 65535:x}"
    name = f"{owner}-{_random_name(Random(pod * 64 + incarnation), 5)}"
    label_text = json.dumps(labels, separators=(",", ":"))
    return (
        _TEMPLATE
        % {
            "namespace": namespace,
            "owner": owner,
            "app": owner.rsplit("-", 1)[0],
            "name": name,
            "labels": label_text,
            "fields": ",".join(f'"f:{key}":{{}}' for key in labels),
            "node": node,
            "uid": f"{pod:08x}-4c36-4a3a-9d0e-{incarnation:012x}",
            "version": 100_000 + pod,
            "v4": v4,
            "v6": v6,
            "host": f"192.168.{int(node[5:]) >> 8}.{int(node[5:]) & 255}",
        }
    ).encode()
