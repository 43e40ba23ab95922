"""The kinds that are watched: where the API serves them, and how one is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from agent.core.objects import Namespace, Pod, decode_namespace, decode_pod
from agent.core.policy import Policy, read_policy

Object = Namespace | Pod | Policy


class Kind(NamedTuple):
    """`name` as in manifests, `path` of the whole cluster's, `read` from JSON; `grant` is what RBAC must allow."""

    name: str
    path: str
    read: Callable[[msgspec.Raw], Object]
    grant: str


def mark(value: Object) -> int:
    """A number that two versions of an object share when they differ in nothing that we read."""
    if isinstance(value, Policy):
        return hash((value.uid, value.digest, value.findings))
    return hash(msgspec.msgpack.encode(value))


def _read_policy(data: msgspec.Raw) -> Policy:
    return read_policy(msgspec.json.decode(data, type=dict))


NAMESPACE = Kind("Namespace", "/api/v1/namespaces", decode_namespace, "namespaces")
POD = Kind("Pod", "/api/v1/pods", decode_pod, "pods")
NETWORK_POLICY = Kind(
    "NetworkPolicy",
    "/apis/networking.k8s.io/v1/networkpolicies",
    _read_policy,
    "networkpolicies.networking.k8s.io",
)
KINDS = (NAMESPACE, POD, NETWORK_POLICY)
