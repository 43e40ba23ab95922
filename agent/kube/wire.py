"""What the API server sends: lines of a watch and pages of a list, decoded as far as the reflector needs them.

The objects themselves stay bytes until their kind reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from agent.kube.errors import Broken, Gone, Refused

INITIAL_EVENTS_END = "k8s.io/initial-events-end"


class Head(NamedTuple):
    """Which object, and which version of it. `key` is the name, or namespace/name."""

    key: str
    version: str


class Changed(NamedTuple):
    """An object was added or modified."""

    head: Head
    data: msgspec.Raw


class Deleted(NamedTuple):
    """An object is gone."""

    head: Head


class Bookmark(NamedTuple):
    """All changes up to a version were sent; `complete` ends a streamed initial list."""

    version: str
    complete: bool


Event = Changed | Deleted | Bookmark


class Page(NamedTuple):
    """A part of a list. `next` is the token of the part behind it, "" for none."""

    items: list[tuple[Head, msgspec.Raw]]
    version: str
    next: str


class _Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""


class _Object(msgspec.Struct):
    metadata: _Meta


class _Annotated(msgspec.Struct):
    annotations: dict[str, str] | None = None


class _Bookmark(msgspec.Struct):
    metadata: _Annotated


class _Line(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 500
    message: str = ""
    reason: str = ""


class _ListMeta(msgspec.Struct):
    resourceVersion: str = ""
    next: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


_lines = msgspec.json.Decoder(_Line)
_objects = msgspec.json.Decoder(_Object)
_bookmarks = msgspec.json.Decoder(_Bookmark)
_statuses = msgspec.json.Decoder(_Status)
_lists = msgspec.json.Decoder(_List)


def read_line(line: bytes) -> Event:
    """One line of a watch. Raises Gone or Refused for an ERROR, Broken for what is no event."""
    try:
        event = _lines.decode(line)
        if event.type == "ERROR":
            raise _error(_statuses.decode(event.object))
        meta = _objects.decode(event.object).metadata
        if event.type == "BOOKMARK":
            marks = _bookmarks.decode(event.object).metadata.annotations or {}
            return Bookmark(meta.resourceVersion, marks.get(INITIAL_EVENTS_END) == "true")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Broken(f"no watch event: {error}") from error
    head = _head(meta)
    if event.type == "DELETED":
        return Deleted(head)
    if event.type in ("ADDED", "MODIFIED"):
        return Changed(head, event.object)
    raise Broken(f"no watch event: type {event.type!r}")


def read_page(data: bytes) -> Page:
    """One part of a list. Raises Broken."""
    try:
        found = _lists.decode(data)
        items = [(_head(_objects.decode(item).metadata), item) for item in found.items or ()]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Broken(f"no list: {error}") from error
    if not found.metadata.resourceVersion:
        raise Broken("a list without a version")
    return Page(items, found.metadata.resourceVersion, found.metadata.next)


def _head(meta: _Meta) -> Head:
    if not meta.name:
        raise Broken("an object without a name")
    return Head(f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name, meta.resourceVersion)


def _error(status: _Status) -> Refused:
    kind = Gone if status.code == 410 or status.reason in ("Expired", "Gone") else Refused
    return kind(status.code, status.message)
