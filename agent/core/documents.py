"""YAML and JSON text into plain values, with the line of every field.

YAML is read as kubectl reads it: YAML 1.1 booleans (`y`, `on`), octal with a leading zero, no sexagesimal numbers,
dates as strings, a key twice is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import yaml

from agent.core.findings import BadInput, Finding

LINES_OF_JSON = 1 << 20
"""Bytes of JSON up to which its lines are looked up for messages and origins."""
DEPTH = 200
"""Levels of nesting that are read; the API server refuses far fewer."""


@dataclass(slots=True)
class Node:
    """One YAML node. `value` is the text of a scalar, the items of a list, or the (key, item) pairs of a mapping.

    `plain` tells a scalar that is neither quoted nor tagged, whose text alone says what it is."""

    kind: Literal["scalar", "list", "mapping"]
    value: Any
    line: int
    tag: str | None = None
    plain: bool = False


@dataclass
class Document:
    """One document: its value, and where it stands.

    JSON is decoded without its lines, which is a hundred times faster; `text`, which begins at line `begins`, is read
    once more when they are asked for, unless it is long."""

    value: Any
    file: str
    composed: Node | None = None
    text: bytes = b""
    begins: int = 0

    @property
    def node(self) -> Node | None:
        """The root with its lines; None where they are not known."""
        if self.composed is None and self.text and len(self.text) <= LINES_OF_JSON:
            spaced = self.text.replace(b"\t", b" ")  # JSON may be indented by tabs, YAML may not
            try:
                self.composed = next(_compose(spaced, self.file), None)
            except (yaml.YAMLError, BadInput, ValueError):
                self.composed = None
            self.text = b""
        return self.composed

    def lines(self, path: str = "") -> dict[str, int]:
        """The line of every field below `path`, by its path relative to there; {} where not known."""
        start = _walk(self.node, path)
        found: dict[str, int] = {}
        if start is not None:
            _collect(start, "", found, start.line, set())
        return {path: line + self.begins for path, line in found.items()} if self.begins else found

    def where(self, path: str) -> str:
        """`file:line` of a field, or of the nearest part that holds it."""
        while path and _walk(self.node, path) is None:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        node = _walk(self.node, path)
        return self.file if node is None else f"{self.file}:{node.line + self.begins}"


def parse(data: bytes, file: str) -> Iterator[Document]:
    """The documents of a file, empty ones left out. Raises BadInput with the line for what is neither YAML nor JSON."""
    if data.lstrip()[:1] in (b"{", b"["):
        documents = _parse_json(data, file)
        if documents is not None:
            yield from documents
            return
    yield from _parse_yaml(data, file)


def _parse_json(data: bytes, file: str) -> list[Document] | None:
    """The documents of a stream of JSON values; None when it is not one, and the YAML reader tells what is wrong."""
    try:
        return [Document(msgspec.json.decode(data), file, text=data)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    documents = []
    try:
        text = data.decode()
        end = 0
        while rest := text[end:].lstrip():
            end = len(text) - len(rest)
            begin, begins = end, text.count("\n", 0, end)
            value, end = _JSON.raw_decode(text, begin)
            documents.append(Document(value, file, text=text[begin:end].encode(), begins=begins))
    except (ValueError, RecursionError):
        return None
    return documents


_JSON = json.JSONDecoder()


def _parse_yaml(data: bytes, file: str) -> Iterator[Document]:
    try:
        for node in _compose(data, file):
            value = _Builder(file).build(node)
            if value is not None:
                yield Document(value, file, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise BadInput([Finding("yaml-broken", file, "", f"cannot be read: {error.problem}", where)]) from error
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput([Finding("yaml-broken", file, "", f"cannot be read: {reason}", file)]) from error


def _compose(data: bytes, file: str) -> Iterator[Node]:
    """The root of each document. From events, with a stack of our own: the loaders' composers recurse, and one of them
    ends the process when a document is nested deeply enough."""
    anchors: dict[str, Node] = {}
    open_nodes: list[Node] = []
    done: list[Any] = []  # the values of each open node so far; a mapping's keys and items alternate
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.DocumentStartEvent):
            anchors, open_nodes, done = {}, [], [[]]
            continue
        if isinstance(event, yaml.DocumentEndEvent):
            yield done[0][0]
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise _bad(file, "yaml-broken", _line(event), f"the alias {event.anchor!r} is not defined")
            done[-1].append(anchors[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            node = Node("scalar", event.value, _line(event), event.tag, event.implicit[0])
            _name(anchors, event, node)
            done[-1].append(node)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) >= DEPTH:
                raise _bad(file, "yaml-broken", _line(event), "is nested too deeply")
            kind: Literal["list", "mapping"] = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
            node = Node(kind, [], _line(event))
            _name(anchors, event, node)
            open_nodes.append(node)
            done.append([])
        elif isinstance(event, yaml.CollectionEndEvent):
            node, values = open_nodes.pop(), done.pop()
            node.value = values if node.kind == "list" else list(zip(values[::2], values[1::2]))
            done[-1].append(node)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _name(anchors: dict[str, Node], event: Any, node: Node) -> None:
    if event.anchor is not None:
        anchors[event.anchor] = node


def _bad(file: str, id: str, line: int, message: str) -> BadInput:
    return BadInput([Finding(id, file, "", message, f"{file}:{line}")])


_TRUE = frozenset(["y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"])
_FALSE = frozenset(["n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"])
_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_INT = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.built: dict[int, Any] = {}
        self.open: set[int] = set()

    def bad(self, id: str, node: Node, message: str) -> BadInput:
        return _bad(self.file, id, node.line, message)

    def build(self, node: Node) -> Any:
        """The value of a node; a node that aliases name several times is built once."""
        if node.kind == "scalar":
            return self.scalar(node)
        key = id(node)
        if key in self.built:
            return self.built[key]
        if key in self.open:
            raise self.bad("yaml-broken", node, "an alias leads back into itself")
        self.open.add(key)
        value = self.mapping(node) if node.kind == "mapping" else [self.build(item) for item in node.value]
        self.open.discard(key)
        self.built[key] = value
        return value

    def mapping(self, node: Node) -> dict[str, Any]:
        value: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, item in node.value:
            if key_node.plain and key_node.value == "<<":
                for part in reversed(item.value if item.kind == "list" else [item]):
                    inherited = self.build(part)
                    if not isinstance(inherited, dict):
                        raise self.bad("yaml-broken", part, "a merge (<<) needs an object")
                    merged |= inherited
                continue
            key = self.key(key_node)
            if key in value:
                raise self.bad("key-twice", key_node, f"the key {key!r} stands here for the second time")
            value[key] = self.build(item)
        return merged | value if merged else value

    def key(self, node: Node) -> str:
        if node.kind == "scalar":
            value = self.scalar(node)
            if isinstance(value, bool):
                return "true" if value else "false"
            if value is not None:
                return str(value)
        raise self.bad("yaml-broken", node, "a key must be a string")

    def scalar(self, node: Node) -> Any:
        text: str = node.value
        if node.tag is not None:
            if node.tag not in (_TAG + "str", "!", _TAG + "binary"):
                return self.tagged(node)
            return text
        return _plain(text) if node.plain else text

    def tagged(self, node: Node) -> Any:
        wanted = {_TAG + "int": int, _TAG + "float": (int, float), _TAG + "bool": bool, _TAG + "null": type(None)}
        value = _plain(node.value)
        if node.tag not in wanted or not isinstance(value, wanted[node.tag]):  # type: ignore[arg-type]
            raise self.bad("yaml-broken", node, f"{node.value!r} cannot be read as {node.tag}")
        return value


def _plain(text: str) -> Any:
    """What an unquoted scalar is, by YAML 1.1 as kubectl reads it."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        number = _integer(text)
        if number is not None:
            return number
    if _FLOAT.fullmatch(text):
        fraction = float(text)
        return int(fraction) if fraction.is_integer() and abs(fraction) < 1e21 else fraction
    if _SPECIAL.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def _integer(text: str) -> int | None:
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    try:
        if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
            return sign * int(digits, 8)
        return sign * int(digits, 0)
    except ValueError:
        return None


# --- lines -----------------------------------------------------------------------------------------------------------


def _walk(node: Node | None, path: str) -> Node | None:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if node is not None and node.kind == "mapping" and name:
            node = next((item for key, item in node.value if key.value == name), None)
        elif node is not None and node.kind == "list" and index and int(index) < len(node.value):
            node = node.value[int(index)]
        else:
            return None
    return node


def _collect(node: Node, path: str, found: dict[str, int], line: int, seen: set[int]) -> None:
    found[path] = line
    if id(node) in seen:
        return  # an alias: its inside has the lines of its anchor, under the anchor's path
    seen.add(id(node))
    if node.kind == "mapping":
        for key, item in node.value:
            if key.kind == "scalar":
                _collect(item, f"{path}.{key.value}" if path else key.value, found, key.line, seen)
    elif node.kind == "list":
        for index, item in enumerate(node.value):
            _collect(item, f"{path}[{index}]", found, item.line, seen)
