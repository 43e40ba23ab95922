"""The objects of files: decoded, defaulted as the API server defaults them, and what is wrong with them.

Every fault that could not even be decoded is gathered, and raised as one BadInput when the last file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.core.documents import Document, parse
from agent.core.findings import UNDECODABLE, BadInput, Finding, where_wrong
from agent.core.objects import (
    Namespace,
    Pod,
    Service,
    convert_namespace,
    convert_pod,
    convert_service,
    named_namespace,
)
from agent.core.policy import Policy, read_policy
from agent.core.workloads import KINDS as WORKLOADS
from agent.core.workloads import Workload, convert_workload

LISTS = 3
"""Levels of List in List that are read."""
_POLICY_API = "networking.k8s.io/v1"


class Inventory:
    """Everything that was read, by key. `findings` are faults of objects that are enforced all the same."""

    def __init__(self, namespace: str = "default") -> None:
        self.namespace = namespace
        self.namespaces: dict[str, Namespace] = {}
        self.pods: dict[str, Pod] = {}
        self.policies: dict[str, Policy] = {}
        self.services: dict[str, Service] = {}
        self.workloads: dict[str, Workload] = {}
        self.findings: list[Finding] = []
        self._seen: dict[str, tuple[Document, str]] = {}
        self._bad: list[Finding] = []

    def read(self, data: bytes, file: str) -> None:
        """Take in the documents of one file; `file` names it in findings."""
        try:
            for document in parse(data, file):
                self._take(document, document.value, "", {})
        except BadInput as error:
            self._bad += error.findings

    def finish(self) -> None:
        """Assume the namespaces that no file holds (semantics.md line 26). Raises BadInput for all bad input so far."""
        if self._bad:
            raise BadInput(self._bad)
        parts = (self.pods, self.policies, self.workloads)
        used = {key.rpartition(" ")[2].partition("/")[0] for part in parts for key in part}
        for name in sorted(used - set(self.namespaces)):
            self.namespaces[name] = named_namespace(name)
            message = "is in no file; it is assumed, with no label but its name"
            self.findings.append(Finding("namespace-assumed", f"Namespace {name}", "", message))

    # --- one object --------------------------------------------------------------------------------------------------

    def _take(self, document: Document, value: Any, path: str, inherited: Mapping[str, Any]) -> None:
        """One object. `inherited` has the kind and apiVersion that a typed list gives items which have none."""
        if not isinstance(value, dict):
            self._wrong("type-wrong", document.file, path, "must be a Kubernetes object", document.where(path))
            return
        if not value.get("kind") and inherited:
            value = {**inherited, **value}
        kind = value.get("kind")
        if not isinstance(kind, str) or not kind:
            message = "is missing: no Kubernetes object"
            self._wrong("type-wrong", document.file, _join(path, "kind"), message, document.where(path))
            return
        if kind.endswith("List") and "items" in value:
            self._take_items(document, value, path)
            return
        if not self._concerns(kind, value):
            return
        label = kind
        try:
            key = self._identify(kind, value)
            label = f"{kind} {key}"
            self._convert(kind, document, value, path)
            self._note_double(label, document, path)
        except msgspec.ValidationError as error:
            field, message = where_wrong(error)
            self._wrong("type-wrong", label, field, message, document.where(_join(path, field)))
        except ValueError as error:
            self._wrong("type-wrong", label, "", str(error), document.where(path))

    def _take_items(self, document: Document, value: Mapping[str, Any], path: str) -> None:
        items, kind = value["items"], value["kind"].removesuffix("List")
        inherited = {"kind": kind, "apiVersion": value.get("apiVersion")} if kind else {}
        if items is None:
            return
        if path.count("items") >= LISTS:
            self._wrong("type-wrong", document.file, path, "lists are nested too deeply", document.where(path))
            return
        if not isinstance(items, list):
            self._wrong("type-wrong", document.file, _join(path, "items"), "must be a list", document.where(path))
            return
        for index, item in enumerate(items):
            self._take(document, item, f"{_join(path, 'items')}[{index}]", inherited)

    @staticmethod
    def _concerns(kind: str, value: Mapping[str, Any]) -> bool:
        """Whether a policy has to do with such an object; all others are passed over."""
        core = value.get("apiVersion") in (None, "v1")
        return kind == "NetworkPolicy" or kind in WORKLOADS or (kind in ("Namespace", "Pod", "Service") and core)

    def _convert(self, kind: str, document: Document, value: Any, path: str) -> None:
        match kind:
            case "NetworkPolicy":
                self._policy(document, value, path)
            case "Namespace":
                self._namespace(value)
            case "Pod":
                self._pod(value, document, path)
            case "Service":
                self._service(value)
            case _:
                self._workload(kind, value)

    def _identify(self, kind: str, value: dict[str, Any]) -> str:
        """The object's key; fills in the namespace (semantics.md line 53)."""
        meta = value.get("metadata")
        if not isinstance(meta, dict):
            raise msgspec.ValidationError("must be an object with a name - at `$.metadata`")
        name = meta.get("name")
        if name is None and isinstance(meta.get("generateName"), str):
            name = meta["name"] = meta["generateName"].rstrip("-")
        if not isinstance(name, str) or not name:
            raise msgspec.ValidationError("must be a name - at `$.metadata.name`")
        if kind == "Namespace":
            return name
        namespace = meta.get("namespace")
        if namespace is None or namespace == "":
            namespace = meta["namespace"] = self.namespace
        if not isinstance(namespace, str):
            raise msgspec.ValidationError("must be a namespace's name - at `$.metadata.namespace`")
        return f"{namespace}/{name}"

    def _note_double(self, label: str, document: Document, path: str) -> None:
        before = self._seen.get(label)
        if before is not None:
            message = f"stands in {before[0].where(before[1])} too; this one, the last, counts"
            self.findings.append(Finding("duplicate-object", label, "", message, document.where(path)))
        self._seen[label] = document, path

    def _wrong(self, id: str, object: str, field: str, message: str, where: str) -> None:
        self._bad.append(Finding(id, object, field, message, where))

    # --- kinds -------------------------------------------------------------------------------------------------------

    def _namespace(self, value: Any) -> None:
        namespace = convert_namespace(value)
        self.namespaces[namespace.name] = namespace

    def _pod(self, value: Any, document: Document, path: str) -> None:
        pod = convert_pod(value)
        self.pods[pod.key] = pod
        for text in pod.unreadable:
            message = f"{text} is none that a pod can have; it is passed over"
            if text.startswith("port "):
                where = document.where(_join(path, "spec.containers"))
                finding = Finding("container-port-unreadable", f"Pod {pod.key}", "spec.containers", message, where)
            else:
                where = document.where(_join(path, "status"))
                finding = Finding("address-unreadable", f"Pod {pod.key}", "status.podIPs", message, where)
            self.findings.append(finding)

    def _service(self, value: Any) -> None:
        service = convert_service(value)
        self.services[service.key] = service

    def _workload(self, kind: str, value: Any) -> None:
        if value["metadata"].get("ownerReferences"):
            return  # what owns it creates its pods
        workload = convert_workload(kind, value, value["metadata"]["namespace"])
        self.workloads[f"{kind} {workload.namespace}/{workload.name}"] = workload

    def _policy(self, document: Document, value: Any, path: str) -> None:
        version = value.get("apiVersion")
        if version != _POLICY_API:
            label = f"NetworkPolicy {value['metadata']['namespace']}/{value['metadata']['name']}"
            message = f"is {version!r}; only {_POLICY_API} is read"
            self._wrong("api-version", label, "apiVersion", message, document.where(_join(path, "apiVersion")))
            return
        policy = read_policy(value, file=document.file, lines=document.lines(path))
        undecodable = [finding for finding in policy.findings if finding.id in UNDECODABLE]
        self._bad += undecodable
        self.policies[policy.key] = policy
        self.findings += [finding for finding in policy.findings if finding not in undecodable]


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path and field else path or field
