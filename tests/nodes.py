"""Plain objects into the core's own state, and its state into something that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from agent.core.node import Node
from agent.core.objects import decode_namespace, decode_pod
from agent.core.policy import read_policy
from agent.dataplane.render import OPTIONS, Options, render
from tests.tracer import Packet, Sets, Tables, trace

Object = Mapping[str, Any]


def key_of(obj: Object) -> tuple[str, str]:
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
    kind, name = key
    {"Namespace": node.delete_namespace, "Pod": node.delete_pod, "NetworkPolicy": node.delete_policy}[kind](name)


def change(node: Node, before: Iterable[Object], after: Iterable[Object]) -> None:
    """The watch events that lead from one list of objects to another; not compiled."""
    old = {key_of(o): o for o in before}
    new = {key_of(o): o for o in after}
    for key in old:
        if key not in new:
            delete(node, key)
    for key, obj in new.items():
        if old.get(key) != obj:
            apply(node, obj)


def node_of(objects: Iterable[Object], name: str | None) -> Node:
    """A node that saw these objects, in this order."""
    node = Node(name)
    for obj in objects:
        apply(node, obj)
    node.compile()
    return node


def rendered(node: Node, options: Options = OPTIONS) -> str:
    return render(node, options)


class Kernel:
    """The tracer's model of one node's kernel: sets, and a table for each family."""

    def __init__(self, text: str = "") -> None:
        self.sets = Sets()
        self.tables = {4: Tables.parse(""), 6: Tables.parse("")}
        parts = text.split("*filter")
        if text:
            self.sets.apply_restore(parts[0].replace("# ipset restore", "").partition("# iptables")[0])
            for version, part in zip((4, 6), parts[1:]):
                self.tables[version].apply("*filter" + part.partition("\n#")[0] + "\n", self.sets)

    def passes(self, src: str, dst: str, protocol: str, port: int | None, **more: Any) -> bool:
        version = 6 if ":" in src else 4
        packet = Packet(src=src, dst=dst, protocol=protocol.lower(), dport=port, **more)
        return trace(self.tables[version], self.sets, packet).verdict == "ACCEPT"
