"""Plain objects into the core's own state, and what it desires into the tracer's model of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from agent.core.addresses import FAMILIES
from agent.core.node import Node
from agent.core.objects import decode_namespace, decode_pod
from agent.core.policy import read_policy
from agent.dataplane.applied import Applied, AppliedTable
from agent.dataplane.plan import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    ForgetConnections,
    Operation,
    SwapSets,
    Transaction,
    plan,
    record,
)
from agent.dataplane.render import OPTIONS, create_text, format_member, table
from tests.tracer import Packet, Sets, Tables, trace

Object = Mapping[str, Any]


def key_of(obj: Object) -> tuple[str, str]:
    """(kind, name or namespace/name)."""
    meta = obj["metadata"]
    name = meta["name"] if obj["kind"] == "Namespace" else f"{meta.get('namespace') or 'default'}/{meta['name']}"
    return obj["kind"], name


def apply(node: Node, obj: Object) -> None:
    """One object as a watch delivers it."""
    if obj["kind"] == "Namespace":
        node.apply_namespace(decode_namespace(msgspec.json.encode(obj)))
    elif obj["kind"] == "Pod":
        node.apply_pod(decode_pod(msgspec.json.encode(obj)))
    else:
        node.apply_policy(read_policy(obj))


def delete(node: Node, key: tuple[str, str]) -> None:
    """One object goes."""
    kind, name = key
    {"Namespace": node.delete_namespace, "Pod": node.delete_pod, "NetworkPolicy": node.delete_policy}[kind](name)


def change(node: Node, before: Iterable[Object], after: Iterable[Object]) -> None:
    """The watch events that lead from one list of objects to another, as one batch."""
    old = {key_of(o): o for o in before}
    new = {key_of(o): o for o in after}
    for key in old:
        if key not in new:
            delete(node, key)
    for key, obj in new.items():
        if old.get(key) != obj:
            apply(node, obj)
    node.compile()


def node_of(objects: Iterable[Object], name: str | None) -> Node:
    """A node that saw these objects, in this order."""
    node = Node(name)
    for obj in objects:
        apply(node, obj)
    node.compile()
    return node


class Kernel:
    """A node's kernel as the tracer models it, with the mirror that the dataplane keeps of it.

    Sets refuse to be destroyed while a rule uses them, and transactions to name what is not there."""

    def __init__(self) -> None:
        self.sets = Sets()
        self.tables = {version: Tables.parse("*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n") for version in FAMILIES}
        for one in self.tables.values():
            one.sets = self.sets
        self.mirror = Applied({}, {version: AppliedTable() for version in FAMILIES})

    def operations(self, node: Node, *, everything: bool = False) -> list[Operation]:
        return plan(node, node.journal(), self.mirror, OPTIONS, everything=everything)

    def steps(self, operations: Iterable[Operation]) -> Iterator[Operation]:
        """Carry out operations in the smallest steps that a packet can see; yields after each."""
        for operation in operations:
            for step in _smallest(operation):
                self._carry_out(step)
                record(self.mirror, step)
                yield step

    def sync(self, node: Node, *, everything: bool = False) -> list[Operation]:
        """Bring this kernel to what the node desires; answers with the operations."""
        operations = self.operations(node, everything=everything)
        for _ in self.steps(operations):
            pass
        return operations

    def _carry_out(self, operation: Operation) -> None:
        match operation:
            case CreateSet(name, kind, version):
                self.sets.apply_restore(create_text(name, kind, version))
            case AddMembers(name, _, _, members):
                for member in members:
                    self.sets.add(name, format_member(member))
            case DeleteMembers(name, _, _, members):
                for member in members:
                    self.sets.delete(name, format_member(member))
            case SwapSets(name, other):
                self.sets.swap(name, other)
            case DestroySet(name):
                self.sets.destroy(name, list(self.tables.values()))
            case Transaction():
                self.tables[operation.family].apply(operation.text)
            case ForgetConnections():
                pass

    def content(self) -> dict[str, Any]:
        """All that is programmed, comparable with `snapshot`."""
        return {
            "sets": {name: one.members for name, one in self.sets.items()},
            "tables": {v: {n: [r.text for r in c] for n, c in t.chains.items()} for v, t in self.tables.items()},
        }

    def passes(self, src: str, dst: str, protocol: str, port: int | None, **more: Any) -> bool:
        """Whether a packet of a new connection gets through FORWARD."""
        echo = {"ICMP": 8, "ICMPv6": 128}.get(protocol)
        packet = Packet(src, dst, protocol.lower(), dport=port, icmp_type=echo, **more)
        return trace(self.tables[6 if ":" in src else 4], self.sets, packet).verdict == "ACCEPT"


def _smallest(operation: Operation) -> Iterator[Operation]:
    if isinstance(operation, AddMembers | DeleteMembers):
        for member in operation.members:
            yield type(operation)(operation.name, operation.kind, operation.family, (member,))
    else:
        yield operation


def snapshot(node: Node) -> dict[str, Any]:
    """All that a node desires, comparable."""
    return {
        "sets": {n: frozenset(map(format_member, s.members())) for n, s in node.sets.active.items()},
        "tables": {version: table(node, version, OPTIONS) for version in FAMILIES},
    }
