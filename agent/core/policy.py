"""A NetworkPolicy read into what it enforces, and what is wrong with it.

Never less is enforced than was asked (semantics.md section 6): a fault in a rule closes that rule, a fault in
`podSelector` selects the whole namespace and allows nothing, a fault in `policyTypes` isolates both directions.
An unknown field directly in `spec` closes the whole policy in both directions: it may be a misspelt direction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

from agent.core.addresses import Prefix, is_strict_subset, parse_block
from agent.core.findings import Finding
from agent.core.objects import PROTOCOLS
from agent.core.selectors import EVERYTHING, Requirement, Selector

INGRESS, EGRESS = "Ingress", "Egress"
DIRECTIONS = (INGRESS, EGRESS)


class PodPeer(NamedTuple):
    """Pods by selector. `namespace` names the one namespace (line 10), else `namespaces` selects among those seen
    (line 12); both None is every pod of the cluster, as a named port without `to` needs it (line 31)."""

    namespace: str | None
    namespaces: Selector | None
    pods: Selector

    def __str__(self) -> str:
        where = self.namespace if self.namespace is not None else f"namespaces {self.namespaces or 'any'}"
        return f"pods {self.pods} in {where}"


class BlockPeer(NamedTuple):
    """An ipBlock and its own excepts."""

    block: Prefix
    excepts: tuple[Prefix, ...]


class PortRange(NamedTuple):
    """Ports low to high, inclusive, of one protocol; 0 to 65535 is every port."""

    protocol: str
    low: int
    high: int


class PortName(NamedTuple):
    """A named port, resolved on the destination pod (line 29)."""

    protocol: str
    name: str


class PolicyRule(NamedTuple):
    """One rule, the `ordinal`-th from 0. `peers` None is everyone, () nobody (a rule with a fault); `ports` None is
    everything.

    The position of a peer or port in its tuple is its index in the manifest."""

    ordinal: int
    peers: tuple[PodPeer | BlockPeer, ...] | None
    ports: tuple[PortRange | PortName, ...] | None


@dataclass(frozen=True, slots=False, eq=False)
class Policy:
    """What one NetworkPolicy enforces. `rules[direction]` is None where it does not isolate.

    Policies of equal content are equal, wherever they were read from; `lines` maps field paths to line numbers, `uid`
    is "" where they come from files."""

    namespace: str
    name: str
    selector: Selector
    ingress: tuple[PolicyRule, ...] | None
    egress: tuple[PolicyRule, ...] | None
    findings: tuple[Finding, ...] = ()
    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    uid: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def rules(self, direction: str) -> tuple[PolicyRule, ...] | None:
        return self.ingress if direction == INGRESS else self.egress

    @cached_property
    def digest(self) -> str:
        """Hash of all that is enforced and of the policy's name."""
        content = (self.namespace, self.name, self.selector, self.ingress, self.egress)
        return sha256(repr(content).encode()).hexdigest()[:24]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def where(self, path: str) -> str | None:
        """`file:line` of a field, or of what holds it; None for policies that come from the API."""
        return _where(self.file, self.lines, path)


def _where(file: str | None, lines: Mapping[str, int], path: str) -> str | None:
    if file is None:
        return None
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    line = lines.get(path)
    return file if line is None else f"{file}:{line}"


def read_policy(
    manifest: Mapping[str, Any], *, file: str | None = None, lines: Mapping[str, int] | None = None
) -> Policy:
    """Read a NetworkPolicy of any shape; never raises. What is wrong stands in `findings`.

    `metadata.name` and `metadata.namespace` are the caller's business (line 53)."""
    return _Reader(manifest, file, lines or {}).policy()


class _Fault(Exception):
    """A part cannot be read; the finding is written already."""


_MISSING = object()
_PART = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


class _Reader:
    def __init__(self, manifest: Mapping[str, Any], file: str | None, lines: Mapping[str, int]) -> None:
        meta = manifest.get("metadata") or {}
        self.namespace = str(meta.get("namespace") or "")
        self.name = str(meta.get("name") or "")
        self.uid = str(meta.get("uid") or "")
        self.spec = manifest.get("spec")
        self.file = file
        self.lines = lines
        self.findings: list[Finding] = []

    def find(self, id: str, path: str, message: str) -> None:
        where = _where(self.file, self.lines, path)
        self.findings.append(Finding(id, f"NetworkPolicy {self.namespace}/{self.name}", path, message, where))

    def fault(self, id: str, path: str, message: str) -> _Fault:
        self.find(id, path, message)
        return _Fault()

    # --- shapes ------------------------------------------------------------------------------------------------------

    def mapping(self, value: Any, path: str, known: tuple[str, ...]) -> dict[str, Any]:
        """The fields that are there and not null (line 52); an unknown one is a fault of this mapping (line 50)."""
        if not isinstance(value, dict):
            raise self.fault("type-wrong", path, f"must be an object, is {_kind(value)}")
        unknown = [key for key in value if key not in known]
        for key in unknown:
            close = ", ".join(known)
            self.find("field-unknown", f"{path}.{key}", f"is not a field here; known are {close}")
        if unknown:
            raise _Fault
        return {key: item for key, item in value.items() if item is not None}

    def items(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fault("type-wrong", path, f"must be a list, is {_kind(value)}")
        return value

    def each(self, value: Any, path: str, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
        """Read every item, so that each fault is found; then fail if any failed."""
        results = []
        failed = False
        for index, item in enumerate(self.items(value, path)):
            here = f"{path}[{index}]"
            try:
                if item is None:
                    raise self.fault("null-item", here, "a list must not hold null")
                results.append(read(item, here))
            except _Fault:
                failed = True
        if failed:
            raise _Fault
        return tuple(results)

    def text(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise self.fault("type-wrong", path, f"must be a string, is {_kind(value)}")
        return value

    # --- the policy --------------------------------------------------------------------------------------------------

    def policy(self) -> Policy:
        selector, ingress, egress = self.read_spec()
        found = tuple(self.findings)
        return Policy(self.namespace, self.name, selector, ingress, egress, found, self.file, self.lines, self.uid)

    def read_spec(self) -> tuple[Selector, tuple[PolicyRule, ...] | None, tuple[PolicyRule, ...] | None]:
        spec = {} if self.spec is None else self.spec
        closed = False
        if not isinstance(spec, dict):
            self.find("type-wrong", "spec", f"must be an object, is {_kind(spec)}")
            return EVERYTHING, (), ()
        known = ("podSelector", "policyTypes", "ingress", "egress")
        for key in spec:
            if key not in known:
                self.find("field-unknown", f"spec.{key}", f"is not a field here; known are {', '.join(known)}")
                closed = True
        rules = {d: self.read_rules(spec.get(d.lower()), d) for d in DIRECTIONS}
        types = self.read_types(spec.get("policyTypes"), has_egress=bool(rules[EGRESS]))
        try:
            value = spec.get("podSelector")
            selector = EVERYTHING if value is None else self.selector(value, "spec.podSelector")
        except _Fault:
            selector = EVERYTHING
            rules = dict.fromkeys(DIRECTIONS, ())
        if closed:
            return selector, (), ()
        return (
            selector,
            rules[INGRESS] if INGRESS in types else None,
            rules[EGRESS] if EGRESS in types else None,
        )

    def read_types(self, value: Any, *, has_egress: bool) -> tuple[str, ...]:
        default = DIRECTIONS if has_egress else (INGRESS,)
        if value is None:
            return default
        try:
            return self.each(value, "spec.policyTypes", self.read_type) or default
        except _Fault:
            return DIRECTIONS

    def read_type(self, value: Any, path: str) -> str:
        if self.text(value, path) not in DIRECTIONS:
            raise self.fault("policy-type-unknown", path, f"{value!r} is neither Ingress nor Egress; both are isolated")
        return str(value)

    def read_rules(self, value: Any, direction: str) -> tuple[PolicyRule, ...]:
        path = f"spec.{direction.lower()}"
        if value is None:
            return ()
        try:
            values = self.items(value, path)
        except _Fault:
            return (PolicyRule(0, (), ()),)
        return tuple(self.read_rule(item, f"{path}[{i}]", i, direction) for i, item in enumerate(values))

    def read_rule(self, value: Any, path: str, index: int, direction: str) -> PolicyRule:
        """A rule, or one that allows nothing where it has a fault (line 48)."""
        side = "from" if direction == INGRESS else "to"
        try:
            if value is None:
                raise self.fault("null-item", path, "a list must not hold null")
            fields = self.mapping(value, path, (side, "ports"))
        except _Fault:
            return PolicyRule(index, (), ())
        failed = False
        peers = ports = None
        try:
            peers = self.each(fields.get(side, []), f"{path}.{side}", self.peer) or None
        except _Fault:
            failed = True
        try:
            ports = self.each(fields.get("ports", []), f"{path}.ports", self.port) or None
        except _Fault:
            failed = True
        return PolicyRule(index, (), ()) if failed else PolicyRule(index, peers, ports)

    # --- peers -------------------------------------------------------------------------------------------------------

    def peer(self, value: Any, path: str) -> PodPeer | BlockPeer:
        fields = self.mapping(value, path, ("podSelector", "namespaceSelector", "ipBlock"))
        if not fields:
            raise self.fault("peer-empty", path, "an empty peer is refused by the API; leave out the list to allow all")
        if "ipBlock" in fields:
            if len(fields) > 1:
                raise self.fault("ipblock-with-selector", path, "an ipBlock cannot stand beside a selector in one peer")
            return self.block(fields["ipBlock"], f"{path}.ipBlock")
        selectors = {}
        failed = False
        for key, item in fields.items():
            try:
                selectors[key] = self.selector(item, f"{path}.{key}")
            except _Fault:
                failed = True
        if failed:
            raise _Fault
        pods = selectors.get("podSelector", EVERYTHING)
        if "namespaceSelector" in selectors:
            return PodPeer(None, selectors["namespaceSelector"], pods)
        return PodPeer(self.namespace, None, pods)

    def block(self, value: Any, path: str) -> BlockPeer:
        fields = self.mapping(value, path, ("cidr", "except"))
        if "cidr" not in fields:
            raise self.fault("cidr-unreadable", f"{path}.cidr", "is missing")
        cidr = self.cidr(fields["cidr"], f"{path}.cidr")

        def read_except(item: Any, here: str) -> Prefix:
            cut = self.cidr(item, here)
            if not is_strict_subset(cut, cidr):
                raise self.fault("except-not-inside", here, f"{item} must lie inside {fields['cidr']} and be smaller")
            return cut

        return BlockPeer(cidr, self.each(fields.get("except", []), f"{path}.except", read_except))

    def cidr(self, value: Any, path: str) -> Prefix:
        try:
            return parse_block(self.text(value, path))
        except ValueError as error:
            raise self.fault("cidr-unreadable", path, f"{value!r} {error}; write ADDRESS/LENGTH") from None

    # --- selectors ---------------------------------------------------------------------------------------------------

    def selector(self, value: Any, path: str) -> Selector:
        fields = self.mapping(value, path, ("matchLabels", "matchExpressions"))
        requirements: set[Requirement] = set()
        failed = False
        labels = fields.get("matchLabels", {})
        if not isinstance(labels, dict):
            raise self.fault("type-wrong", f"{path}.matchLabels", f"must be an object, is {_kind(labels)}")
        for key, item in labels.items():
            here = f"{path}.matchLabels.{key}"
            try:
                self.label_key(key, here)
                text = "" if item is None else self.text(item, here)
                self.label_value(text, here)
                requirements.add(Requirement(key, "In", (text,)))
            except _Fault:
                failed = True
        try:
            requirements.update(
                self.each(fields.get("matchExpressions", []), f"{path}.matchExpressions", self.expression)
            )
        except _Fault:
            failed = True
        if failed:
            raise _Fault
        return Selector.of(requirements)

    def expression(self, value: Any, path: str) -> Requirement:
        fields = self.mapping(value, path, ("key", "operator", "values"))
        key = self.text(fields.get("key", ""), f"{path}.key")
        operator = self.text(fields.get("operator", ""), f"{path}.operator")
        values = self.each(fields.get("values", []), f"{path}.values", self.text)
        self.label_key(key, f"{path}.key")
        if operator in ("In", "NotIn"):
            if not values:
                raise self.fault("selector-values", f"{path}.values", f"{operator} needs at least one value")
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                raise self.fault("selector-values", f"{path}.values", f"{operator} takes no values")
        else:
            raise self.fault(
                "selector-operator", f"{path}.operator", f"{operator!r} is none of In, NotIn, Exists, DoesNotExist"
            )
        for index, text in enumerate(values):
            self.label_value(text, f"{path}.values[{index}]")
        return Requirement(key, operator, tuple(sorted(set(values))))

    def label_key(self, key: Any, path: str) -> None:
        text = self.text(key, path)
        prefix, slash, name = text.rpartition("/")
        if (
            not _PART.fullmatch(name)
            or len(name) > 63
            or (slash and (not _SUBDOMAIN.fullmatch(prefix) or len(prefix) > 253))
        ):
            raise self.fault("label-key-invalid", path, f"{text!r} is not a label key")

    def label_value(self, value: str, path: str) -> None:
        """Compared as it is, and reported; no fault of the rule (line 51)."""
        if len(value) > 63 or not _VALUE.fullmatch(value):
            self.find("label-value-invalid", path, f"{value!r} is no label value: no object can carry it")

    # --- ports -------------------------------------------------------------------------------------------------------

    def port(self, value: Any, path: str) -> PortRange | PortName:
        fields = self.mapping(value, path, ("protocol", "port", "endPort"))
        protocol = self.text(fields.get("protocol", "TCP"), f"{path}.protocol")
        if protocol not in PROTOCOLS:
            raise self.fault("protocol-unknown", f"{path}.protocol", f"{protocol!r} is none of TCP, UDP, SCTP")
        port = fields.get("port", _MISSING)
        end = fields.get("endPort", _MISSING)
        if end is not _MISSING and not _is_int(end):
            raise self.fault("type-wrong", f"{path}.endPort", f"must be a whole number, is {_kind(end)}")
        if port is _MISSING:
            if end is not _MISSING:
                raise self.fault("endport-alone", f"{path}.endPort", "needs a numeric port beside it")
            return PortRange(protocol, 0, 65535)
        if isinstance(port, str):
            if end is not _MISSING:
                raise self.fault("endport-alone", f"{path}.endPort", "cannot go with a named port")
            if not _PORT_NAME.fullmatch(port) or len(port) > 15 or "--" in port or not re.search("[a-z]", port):
                hint = f"; write port: {port} without quotes" if port.isdigit() else ""
                raise self.fault("port-name-invalid", f"{path}.port", f"{port!r} is not the name of a port{hint}")
            return PortName(protocol, port)
        if not _is_int(port):
            raise self.fault("type-wrong", f"{path}.port", f"must be a number or a name, is {_kind(port)}")
        if not 1 <= port <= 65535:
            raise self.fault("port-out-of-range", f"{path}.port", f"{port} is not between 1 and 65535")
        if end is _MISSING:
            return PortRange(protocol, port, port)
        if not port <= end <= 65535:
            raise self.fault("endport-out-of-range", f"{path}.endPort", f"{end} is not between port {port} and 65535")
        return PortRange(protocol, port, end)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    shown = f" ({value})" if isinstance(value, (bool, int, float)) else ""
    return names.get(type(value), "null" if value is None else type(value).__name__) + shown
