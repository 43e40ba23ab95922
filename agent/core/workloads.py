"""Pods that a workload of a repository would create, for manifests that come without their pods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.core.objects import Pod, convert_pod

KINDS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job", "CronJob")


class Workload(msgspec.Struct, frozen=True):
    """A workload with the pod of its template; `per_node` creates one on each node instead of `replicas`."""

    kind: str
    namespace: str
    name: str
    replicas: int
    per_node: bool
    template: Pod

    def pod(self, number: int) -> Pod:
        """The pod of this ordinal, without an address."""
        return msgspec.structs.replace(self.template, name=f"{self.name}-{number}")

    def created(self, pod: Pod) -> bool:
        """Whether a real pod is one of this workload's: owned, and with all labels of the template."""
        return (
            pod.namespace == self.namespace
            and pod.owned
            and self.template.labels.items() <= pod.labels.items()
            and pod.name.startswith(self.name)
        )


def convert_workload(kind: str, value: Mapping[str, Any], namespace: str) -> Workload:
    """A workload from parsed YAML, with the API's defaults. Raises msgspec.ValidationError."""
    name = value["metadata"]["name"]
    spec = _object(value.get("spec"))
    job = _object(_object(spec.get("jobTemplate")).get("spec")) if kind == "CronJob" else spec
    template = _object(job.get("template"))
    meta = _object(template.get("metadata"))
    pod = convert_pod(
        {
            "metadata": {"name": name, "namespace": namespace, "labels": meta.get("labels")},
            "spec": template.get("spec"),
        }
    )
    count = None if kind in ("DaemonSet", "Job", "CronJob") else msgspec.convert(value, _Scaled).spec.replicas
    return Workload(kind, namespace, name, 1 if count is None else max(count, 0), kind == "DaemonSet", pod)


class _Scale(msgspec.Struct):
    replicas: int | None = None


class _Scaled(msgspec.Struct):
    spec: _Scale = msgspec.field(default_factory=_Scale)


def _object(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise msgspec.ValidationError("Expected `object`")
    return value
