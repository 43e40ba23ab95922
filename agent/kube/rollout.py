"""How far a DaemonSet has come: the nodes where its pod is ready, and those where it is not yet, with the reason."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import msgspec

from agent.kube.connection import Connection
from agent.kube.errors import Broken

T = TypeVar("T")


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    generation: int = 0


class _Selector(msgspec.Struct, rename="camel"):
    match_labels: dict[str, str] = msgspec.field(default_factory=dict)


class _DaemonSetSpec(msgspec.Struct, rename="camel"):
    selector: _Selector


class _DaemonSetStatus(msgspec.Struct, rename="camel"):
    observed_generation: int = 0
    desired_number_scheduled: int = 0


class _DaemonSet(msgspec.Struct, rename="camel"):
    metadata: _Metadata
    spec: _DaemonSetSpec
    status: _DaemonSetStatus = msgspec.field(default_factory=_DaemonSetStatus)


class _Reason(msgspec.Struct, rename="camel"):
    reason: str = ""
    message: str = ""


class _State(msgspec.Struct, rename="camel"):
    waiting: _Reason | None = None
    terminated: _Reason | None = None


class _Container(msgspec.Struct, rename="camel"):
    name: str = ""
    ready: bool = False
    state: _State = msgspec.field(default_factory=_State)
    last_state: _State = msgspec.field(default_factory=_State)


class _Condition(msgspec.Struct, rename="camel"):
    type: str
    status: str = ""
    message: str = ""


class _PodSpec(msgspec.Struct, rename="camel"):
    node_name: str = ""


class _PodStatus(msgspec.Struct, rename="camel"):
    conditions: list[_Condition] = msgspec.field(default_factory=list)
    init_container_statuses: list[_Container] = msgspec.field(default_factory=list)
    container_statuses: list[_Container] = msgspec.field(default_factory=list)


class _Pod(msgspec.Struct, rename="camel"):
    metadata: _Metadata
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _Pods(msgspec.Struct):
    items: list[_Pod]


class Rollout(NamedTuple):
    """`desired` nodes, None while nobody has counted them; `ready` nodes; why the others are not, by node."""

    desired: int | None
    ready: frozenset[str]
    waiting: dict[str, str]

    @property
    def done(self) -> bool:
        return self.desired is not None and len(self.ready) >= self.desired


def rollout(connection: Connection, namespace: str, name: str) -> Rollout:
    """Ask for a DaemonSet and its pods. Raises ApiError."""
    path = f"/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}"
    found = _decoded(connection.get(path, {}), _DaemonSet)
    labels = ",".join(f"{key}={value}" for key, value in sorted(found.spec.selector.match_labels.items()))
    pods = _decoded(connection.get(f"/api/v1/namespaces/{namespace}/pods", {"labelSelector": labels}), _Pods).items
    counted = 0 < found.metadata.generation <= found.status.observed_generation
    ready, waiting = set(), {}
    for pod in pods:
        if any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions):
            ready.add(pod.spec.node_name)
        else:
            waiting[pod.spec.node_name or f"no node yet ({pod.metadata.name})"] = _why(pod.status)
    return Rollout(found.status.desired_number_scheduled if counted else None, frozenset(ready), waiting)


def _why(status: _PodStatus) -> str:
    """What a pod waits for, in the kubelet's and the scheduler's words."""
    for container in (*status.init_container_statuses, *status.container_statuses):
        state = container.state
        reason = state.waiting or (state.terminated if not container.ready else None)
        if reason is not None and reason.reason not in ("PodInitializing", "Completed"):
            before = container.last_state.terminated
            words = (reason.reason, reason.message, before.message if before else "")
            return ": ".join(word for word in (container.name, *words) if word)
        if state.waiting is None and not container.ready:
            return f"{container.name} is at work"
    unmet = next((one.message for one in status.conditions if one.status == "False" and one.message), "")
    return unmet or "its kubelet has not said anything yet"


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise Broken(f"the answer is no {kind.__name__.strip('_')}: {error}") from error
