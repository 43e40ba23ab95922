"""The objects of the cluster as the core knows them, and their decoding with only the fields in use.

`decode_pod(json bytes)` and its kin read what the API server sends; `convert_pod(dict)` reads parsed YAML.
A wrong type raises msgspec.ValidationError with the field's path.
"""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import Any

import msgspec

from agent.core.addresses import Address, is_assignable, parse_address

NAME_LABEL = "kubernetes.io/metadata.name"
PROTOCOLS = ("TCP", "UDP", "SCTP")


class NamedPort(msgspec.Struct, frozen=True, order=True):
    """A container port with a name; `protocol` is TCP, UDP or SCTP."""

    name: str
    protocol: str
    number: int


class Namespace(msgspec.Struct, frozen=True):
    """A namespace that was seen, with its labels; its name label is always there (semantics.md line 14)."""

    name: str
    labels: Mapping[str, str]


class Pod(msgspec.Struct, frozen=True):
    """A pod, flattened to what policies and the lab need.

    `addresses` are packed, without doubles. `ports` holds the named ports that policies may resolve, in the order of
    search (line 30); `listens` every declared (protocol, number). `unreadable` holds addresses that are none.
    """

    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    node: str
    host_network: bool
    finished: bool
    addresses: tuple[Address, ...]
    ports: tuple[NamedPort, ...]
    listens: tuple[tuple[str, int], ...] = ()
    unreadable: tuple[str, ...] = ()
    owned: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def live(self) -> bool:
        """semantics.md line 23."""
        return bool(self.addresses) and not self.finished


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a Service; `target` is a pod's port, by number or by name; `node_port` 0 is none."""

    name: str
    protocol: str
    port: int
    target: int | str
    node_port: int


class Service(msgspec.Struct, frozen=True):
    """A Service as far as a packet meets it: `selector` None picks no pod; headless has no `addresses`."""

    namespace: str
    name: str
    type: str
    headless: bool
    addresses: tuple[Address, ...]
    families: tuple[str, ...]
    selector: Mapping[str, str] | None
    ports: tuple[ServicePort, ...]
    local_only: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


# --- what the wire holds ---------------------------------------------------------------------------------------------


class _Owner(msgspec.Struct):
    """Only that there is one counts."""


class _Meta(msgspec.Struct):
    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    labels: dict[str, str | None] | None = None
    ownerReferences: list[_Owner] | None = None


class _ContainerPort(msgspec.Struct):
    containerPort: int | None = None
    name: str | None = None
    protocol: str | None = None


class _Container(msgspec.Struct):
    ports: list[_ContainerPort] | None = None
    restartPolicy: str | None = None


class _PodSpec(msgspec.Struct):
    nodeName: str | None = None
    hostNetwork: bool | None = None
    containers: list[_Container] | None = None
    initContainers: list[_Container] | None = None


class _PodIP(msgspec.Struct):
    ip: str | None = None


class _PodStatus(msgspec.Struct):
    phase: str | None = None
    podIP: str | None = None
    podIPs: list[_PodIP] | None = None


class _Pod(msgspec.Struct):
    metadata: _Meta | None = None
    spec: _PodSpec | None = None
    status: _PodStatus | None = None


class _Namespace(msgspec.Struct):
    metadata: _Meta | None = None


class _ServicePort(msgspec.Struct):
    port: int
    name: str | None = None
    protocol: str | None = None
    targetPort: int | str | None = None
    nodePort: int | None = None


class _ServiceSpec(msgspec.Struct):
    type: str | None = None
    clusterIP: str | None = None
    clusterIPs: list[str] | None = None
    ipFamilies: list[str] | None = None
    selector: dict[str, str | None] | None = None
    ports: list[_ServicePort] | None = None
    externalTrafficPolicy: str | None = None


class _Service(msgspec.Struct):
    metadata: _Meta | None = None
    spec: _ServiceSpec | None = None


_pod_decoder = msgspec.json.Decoder(_Pod)
_namespace_decoder = msgspec.json.Decoder(_Namespace)


def decode_pod(data: bytes | msgspec.Raw) -> Pod:
    """A v1 Pod from JSON."""
    return _flatten_pod(_pod_decoder.decode(data))


def decode_namespace(data: bytes | msgspec.Raw) -> Namespace:
    """A v1 Namespace from JSON."""
    return _flatten_namespace(_namespace_decoder.decode(data))


def convert_pod(value: Any) -> Pod:
    """A v1 Pod from parsed YAML."""
    return _flatten_pod(msgspec.convert(value, _Pod))


def convert_namespace(value: Any) -> Namespace:
    """A v1 Namespace from parsed YAML."""
    return _flatten_namespace(msgspec.convert(value, _Namespace))


def convert_service(value: Any) -> Service:
    """A v1 Service from parsed YAML, with the API's defaults."""
    wire = msgspec.convert(value, _Service)
    meta, spec = wire.metadata or _Meta(), wire.spec or _ServiceSpec()
    addresses = [a for a in (spec.clusterIPs or [spec.clusterIP or ""]) if a and a != "None"]
    return Service(
        namespace=meta.namespace or "",
        name=meta.name or "",
        type=spec.type or "ClusterIP",
        headless=spec.clusterIP == "None",
        addresses=tuple(parse_address(a) for a in addresses),
        families=tuple(spec.ipFamilies or ()),
        selector=_labels(spec.selector) if spec.selector else None,
        ports=tuple(
            ServicePort(p.name or "", p.protocol or "TCP", p.port, p.targetPort or p.port, p.nodePort or 0)
            for p in spec.ports or ()
            if _is_port(p.port) and (p.nodePort is None or _is_port(p.nodePort))
        ),
        local_only=spec.externalTrafficPolicy == "Local",
    )


def _is_port(number: int) -> bool:
    return 1 <= number <= 65535


def named_namespace(name: str, labels: Mapping[str, str] | None = None) -> Namespace:
    """A namespace with these labels and the one that is its name."""
    return Namespace(name, {**(labels or {}), NAME_LABEL: name})


def _labels(labels: dict[str, str | None] | None) -> dict[str, str]:
    return {intern(k): intern(v or "") for k, v in labels.items()} if labels else {}


def _flatten_namespace(wire: _Namespace) -> Namespace:
    meta = wire.metadata or _Meta()
    return named_namespace(intern(meta.name or ""), _labels(meta.labels))


def _read_addresses(texts: list[str]) -> tuple[list[Address], list[str]]:
    """The addresses, each once, and the texts that are none a pod could have."""
    addresses: dict[Address, None] = {}
    unreadable = []
    for text in texts:
        try:
            address = parse_address(text)
        except ValueError:
            address = b""
        if is_assignable(address):
            addresses[address] = None
        else:
            unreadable.append(text)
    return list(addresses), unreadable


def _flatten_pod(wire: _Pod) -> Pod:
    meta, spec, status = wire.metadata or _Meta(), wire.spec or _PodSpec(), wire.status or _PodStatus()
    addresses, unreadable = _read_addresses([p.ip for p in status.podIPs or () if p.ip])
    if status.podIP:
        first, wrong = _read_addresses([status.podIP])
        unreadable += [text for text in wrong if text not in unreadable]
        if first and first != addresses[:1]:
            addresses = first  # where the two differ, podIP wins (line 21)
    ports = []
    listens = []
    sidecars = [c for c in spec.initContainers or () if c.restartPolicy == "Always"]
    for container in (*(spec.containers or ()), *sidecars):
        for port in container.ports or ():
            if port.containerPort is not None and not _is_port(port.containerPort):
                unreadable.append(f"port {port.containerPort}")
            elif port.containerPort is not None:
                protocol = intern(port.protocol or "TCP")
                listens.append((protocol, port.containerPort))
                if port.name:
                    ports.append(NamedPort(intern(port.name), protocol, port.containerPort))
    return Pod(
        namespace=intern(meta.namespace or ""),
        name=meta.name or "",
        uid=meta.uid or "",
        labels=_labels(meta.labels),
        node=intern(spec.nodeName or ""),
        host_network=bool(spec.hostNetwork),
        finished=status.phase in ("Succeeded", "Failed"),
        addresses=tuple(addresses),
        ports=tuple(ports),
        listens=tuple(listens),
        unreadable=tuple(unreadable),
        owned=bool(meta.ownerReferences),
    )
