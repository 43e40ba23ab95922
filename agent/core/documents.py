"""YAML and JSON text into plain values, with the line of every field.

YAML is read as kubectl reads it: YAML 1.1 booleans (`y`, `on`), octal with a leading zero, no sexagesimal numbers,
dates as strings, a key twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml

from agent.core.findings import BadInput, Finding


@dataclass
class Document:
    """One document: its value, and where it stands. `node` is None for JSON, which knows no lines until asked."""

    value: Any
    file: str
    node: yaml.Node | None = None

    def lines(self, path: str = "") -> dict[str, int]:
        """The line of every field below `path`, by its path relative to there; {} where not known."""
        start = _walk(self.node, path)
        found: dict[str, int] = {}
        if start is not None:
            _collect(start, "", found, start.start_mark.line + 1, set())
        return found

    def where(self, path: str) -> str:
        """`file:line` of a field, or of the nearest part that holds it."""
        while path and _walk(self.node, path) is None:
            path = re.sub(r"(\.?[^.\[\]]+|\[\d+\])$", "", path)
        node = _walk(self.node, path)
        return self.file if node is None else f"{self.file}:{node.start_mark.line + 1}"


def parse(data: bytes, file: str) -> Iterator[Document]:
    """The documents of a file, empty ones left out. Raises BadInput with the line for what is neither YAML nor JSON."""
    if data.lstrip()[:1] in (b"{", b"["):
        documents = _parse_json(data, file)
        if documents is not None:
            yield from documents
            return
    yield from _parse_yaml(data, file)


def _parse_json(data: bytes, file: str) -> list[Document] | None:
    """The documents of a stream of JSON values; None when it is not one."""
    documents = []
    while data.strip():
        try:
            documents.append(Document(msgspec.json.decode(data), file))
            break
        except msgspec.DecodeError as error:
            trailing = re.search(r"trailing characters \(byte (\d+)\)", str(error))
            if not trailing:
                return None
            end = int(trailing[1])
            documents.append(Document(msgspec.json.decode(data[:end]), file))
            data = data[end:]
        except UnicodeDecodeError:
            return None
    return documents


def _parse_yaml(data: bytes, file: str) -> Iterator[Document]:
    try:
        for node in yaml.compose_all(data, Loader=yaml.CSafeLoader):
            if node is not None:
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
    except RecursionError as error:
        raise BadInput([Finding("yaml-broken", file, "", "is nested too deeply", file)]) from error


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

    def bad(self, id: str, node: yaml.Node, message: str) -> BadInput:
        return BadInput([Finding(id, self.file, "", message, f"{self.file}:{node.start_mark.line + 1}")])

    def build(self, node: yaml.Node) -> Any:
        """The value of a node; a node that aliases name several times is built once."""
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        key = id(node)
        if key in self.built:
            return self.built[key]
        if key in self.open:
            raise self.bad("yaml-broken", node, "an alias leads back into itself")
        self.open.add(key)
        value = self.mapping(node) if isinstance(node, yaml.MappingNode) else [self.build(n) for n in node.value]
        self.open.discard(key)
        self.built[key] = value
        return value

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        value: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, item in node.value:
            if key_node.tag == _TAG + "merge":
                for part in reversed(item.value if isinstance(item, yaml.SequenceNode) else [item]):
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

    def key(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            value = self.scalar(node)
            if isinstance(value, bool):
                return "true" if value else "false"
            if value is not None:
                return str(value)
        raise self.bad("yaml-broken", node, "a key must be a string")

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        if node.style in ("'", '"', "|", ">"):
            if node.tag not in (_TAG + "str", _TAG + "int", _TAG + "float", _TAG + "bool"):
                raise self.bad("yaml-broken", node, f"the tag {node.tag} is not known")
            return text
        if node.tag == _TAG + "str" and not _plain_is_str(text):
            return text  # tagged !!str
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _INT.fullmatch(text):
            number = _integer(text)
            if number is not None:
                return number
        if _FLOAT.fullmatch(text) and text not in (".", "+", "-"):
            fraction = float(text)
            return int(fraction) if fraction.is_integer() and abs(fraction) < 1e21 else fraction
        if _SPECIAL.fullmatch(text):
            return float(text.lower().replace(".", ""))
        return text


def _plain_is_str(text: str) -> bool:
    """Whether the loader's own resolver gives the tag str to a plain scalar, so that the tag says nothing."""
    return yaml.CSafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == _TAG + "str"  # type: ignore[no-untyped-call, no-any-return]


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


def _walk(node: yaml.Node | None, path: str) -> yaml.Node | None:
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if isinstance(node, yaml.MappingNode) and name:
            node = next((item for key, item in node.value if key.value == name), None)
        elif isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
            node = node.value[int(index)]
        else:
            return None
    return node


def _collect(node: yaml.Node, path: str, found: dict[str, int], line: int, above: set[int]) -> None:
    found[path] = line
    if id(node) in above or isinstance(node, yaml.ScalarNode):
        return
    below = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = f"{path}.{key.value}" if path else str(key.value)
                _collect(item, name, found, key.start_mark.line + 1, below)
    else:
        for index, item in enumerate(node.value):
            _collect(item, f"{path}[{index}]", found, item.start_mark.line + 1, below)
