"""An API server for tests: lists, watches and Events as a real one serves them, and what may go wrong on the way.

It holds objects in one line of versions. Faults wait in a queue for each kind; each spoils one answer."""

from __future__ import annotations

import base64
import json
import ssl
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Condition, RLock
from time import monotonic
from typing import Any, NamedTuple

from agent.kube.kinds import KINDS
from agent.kube.wire import INITIAL_EVENTS_END
from tests.kube.wire import HangUp, Listener, Request, Wire
from tests.nodes import key_of

Object = dict[str, Any]
PATHS = {kind.path: kind.name for kind in KINDS}
GROUPS = {kind.name: kind.path.rpartition("/")[0].removeprefix("/apis/").removeprefix("/api/") for kind in KINDS}
EVENT = "Event"
"""The kind that is posted, for faults."""
TICK = 0.02
"""Seconds after which a watch without news looks whether its client is still there."""

BEFORE = ("answer", "hang up", "empty", "delay", "compact")
"""Faults instead of, or before, any answer."""
INSIDE = (
    "bookmark",
    "bookmark, cut",
    "cut",
    "cut inside",
    "duplicate",
    "end",
    "error",
    "garbage",
    "replay",
    "silence",
    "stall",
    "torn",
    "trickle",
)
"""Faults in a watch, behind its first `after` lines, or LIVE; those that a list can have spoil one, too."""
LIVE = -1
"""Behind the list that a watch begins with, if it does."""


class Fault(NamedTuple):
    """What goes wrong with one answer.

    `answer` is HTTP's `status` with `body`, `hang up` none, `empty` 200 and nothing; `delay` lasts `seconds`; `compact`
    makes all versions too old that anybody knows. `cut` ends the connection, between two objects or `inside` one,
    `torn` ends the answer inside one; `silence` and `stall` send nothing for `seconds`, before or inside an object;
    `trickle` sends `pieces` of one, so many seconds apart; `replay` sends all that there was of the kind, again;
    `error` is an ERROR event of `status`."""

    name: str
    after: int = 0
    seconds: float = 0.0
    status: int = 500
    body: bytes = b"\x00 no JSON \xff\n"
    headers: Mapping[str, str] = {}
    pieces: int = 10


class Event(NamedTuple):
    """A change of the store; `object` is as it was then."""

    version: int
    type: str
    kind: str
    key: str
    object: Object


class Asked(NamedTuple):
    """A request for a kind: when, and how."""

    kind: str
    query: Mapping[str, str]
    at: float
    token: str
    agent: str

    @property
    def watches(self) -> bool:
        return "watch" in self.query

    @property
    def lists(self) -> bool:
        """Whether everything that there is was asked for."""
        return not self.watches or "sendInitialEvents" in self.query


@dataclass
class Switches:
    """How the server is set up. `streams` is HTTP's status, or an ERROR's code, to a streamed list; 200 allows it.
    With `tokens`, one of them is demanded; `anonymous` is the status for none, `answers` that for a kind."""

    streams: int = 200
    refuses_in_stream: bool = False
    gone_by_http: bool = False
    tokens: frozenset[str] | None = None
    anonymous: int = 401
    answers: Mapping[str, int] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.answers = self.answers or {}


class Server(Listener):
    """Use as a context. `asked` holds the requests, `events` the Events that were posted."""

    def __init__(self, *objects: Object, tls: ssl.SSLContext | None = None, **switches: Any) -> None:
        self.switches = Switches(**switches)
        self.version = 100
        self.compacted = 0
        self.history: list[Event] = []
        self.asked: list[Asked] = []
        self.events: dict[str, Object] = {}
        self._objects: dict[str, dict[str, Object]] = {name: {} for name in GROUPS}
        self._pinned: dict[tuple[str, int], list[Object]] = {}
        self._faults: dict[str, deque[Fault]] = {name: deque() for name in (*GROUPS, EVENT)}
        self._bookmarks = 0
        self._changed = Condition(RLock())
        self.put(*objects)
        super().__init__(tls)

    def __enter__(self) -> Server:
        return self

    def close(self) -> None:
        self.stopping.set()
        with self._changed:
            self._changed.notify_all()
        super().close()

    # --- the store ---------------------------------------------------------------------------------------------------

    def put(self, *objects: Object) -> None:
        """Create or replace."""
        for one in objects:
            kind, key = key_of(one)
            with self._changed:
                known = key in self._objects[kind]
                self._objects[kind][key] = self._record("MODIFIED" if known else "ADDED", kind, key, one)

    def delete(self, *objects: Object) -> None:
        for one in objects:
            kind, key = key_of(one)
            with self._changed:
                self._record("DELETED", kind, key, self._objects[kind].pop(key))

    def touch(self, one: Object) -> None:
        """A new version, in which only the status says something new."""
        kind, key = key_of(one)
        with self._changed:
            held = self._objects[kind][key]
            status = {**(held.get("status") or {}), "message": f"after {self.version}"}
            self._objects[kind][key] = self._record("MODIFIED", kind, key, {**held, "status": status})

    def compact(self) -> None:
        """Forget how it came to this: every version that anybody knows is too old now."""
        with self._changed:
            self.version += 1
            self.compacted = self.version

    def bookmark(self) -> None:
        """Tell all watches where they are."""
        with self._changed:
            self._bookmarks += 1
            self._changed.notify_all()

    def advance(self, versions: int = 1) -> None:
        """Something else has changed in the cluster."""
        with self._changed:
            self.version += versions

    @property
    def objects(self) -> list[Object]:
        """All that there is now."""
        with self._changed:
            return [one for held in self._objects.values() for one in held.values()]

    def _record(self, event: str, kind: str, key: str, one: Object) -> Object:
        self.version += 1
        stored = {**one, "metadata": {**one["metadata"], "resourceVersion": str(self.version)}}
        self.history.append(Event(self.version, event, kind, key, stored))
        self._changed.notify_all()
        return stored

    # --- faults ------------------------------------------------------------------------------------------------------

    def spoil(self, kind: str, *faults: Fault) -> None:
        """The next answers to requests for a kind, a fault each."""
        self._faults[kind].extend(faults)

    def behave(self) -> None:
        """No more faults."""
        for waiting in self._faults.values():
            waiting.clear()

    @property
    def faults(self) -> int:
        """How many have not been applied yet."""
        return sum(map(len, self._faults.values()))

    # --- requests ----------------------------------------------------------------------------------------------------

    def serve(self, wire: Wire) -> None:
        request = wire.request()
        token = request.headers.get("authorization", "").partition(" ")[2]
        kind = EVENT if request.method == "POST" else PATHS.get(request.path, "")
        if kind:
            self.asked.append(Asked(kind, request.query, monotonic(), token, request.headers["user-agent"]))
        fault = self._faults[kind].popleft() if kind and self._faults[kind] else None
        if fault is not None and fault.name in BEFORE:
            self._spoil_before(wire, fault)
            if fault.name in ("answer", "empty"):
                return
            fault = None
        if self.switches.tokens is not None and token not in self.switches.tokens:
            status = self.switches.anonymous if not token else 401
            _answer(wire, status, _status(status, "Unauthorized", "Unauthorized"))
        elif kind in self.switches.answers:
            status = self.switches.answers[kind]
            _answer(wire, status, _status(status, f"{kind} is not for you", "No"))
        elif request.method == "POST":
            self._post(wire, request)
        elif not kind:
            _answer(wire, 404, _status(404, "the server could not find the requested resource", "NotFound"))
        elif "watch" in request.query:
            self._watch(wire, kind, request.query, fault)
        else:
            self._list(wire, kind, request.query, fault)

    def _spoil_before(self, wire: Wire, fault: Fault) -> None:
        match fault.name:
            case "answer":
                _answer(wire, fault.status, fault.body, fault.headers)
            case "empty":
                _answer(wire, 200, b"")
            case "hang up":
                raise HangUp
            case "delay":
                self.stopping.wait(fault.seconds)
            case "compact":
                self.compact()

    def _post(self, wire: Wire, request: Request) -> None:
        namespace, _, what = request.path.removeprefix("/api/v1/namespaces/").partition("/")
        body = json.loads(request.body)
        key = f"{namespace}/{body['metadata']['name']}"
        if what != "events" or body["metadata"]["namespace"] != namespace:
            _answer(wire, 400, _status(400, "no Event of this namespace", "BadRequest"))
        elif key in self.events:
            _answer(wire, 409, _status(409, f"events {key} already exists", "AlreadyExists"))
        else:
            self.events[key] = body
            _answer(wire, 201, request.body)

    # --- lists -------------------------------------------------------------------------------------------------------

    def _list(self, wire: Wire, kind: str, query: Mapping[str, str], fault: Fault | None) -> None:
        status, body = self._page(kind, query)
        data = json.dumps(body).encode()
        if fault is not None and fault.name in ("error", "garbage"):
            status = fault.status if fault.name == "error" else 200
            data = json.dumps(_status(status, "spoilt", "Expired")).encode() if fault.name == "error" else fault.body
        wire.head(status, {"Content-Length": str(len(data))})
        half = len(data) // 2
        match fault.name if fault is not None else "":
            case "cut" | "cut inside" | "torn":
                wire.send(data[:half])
                raise HangUp
            case "silence" | "stall":
                assert fault is not None
                wire.send(data[:half])
                self.stopping.wait(fault.seconds)
                wire.send(data[half:])
            case "trickle":
                assert fault is not None
                for piece in _pieces(data, fault.pieces):
                    wire.send(piece)
                    self.stopping.wait(fault.seconds)
            case _:
                wire.send(data)

    def _page(self, kind: str, query: Mapping[str, str]) -> tuple[int, Object]:
        limit, token, asked = int(query.get("limit", "0")), query.get("continue", ""), query.get("resourceVersion", "")
        with self._changed:
            if token and asked:
                return 400, _status(400, "specifying resource version is not allowed when using continue", "BadRequest")
            if query.get("resourceVersionMatch") and not asked:
                return 422, _status(422, "resourceVersionMatch is forbidden unless resourceVersion is given", "Invalid")
            if asked and int(asked) > self.version:
                return 504, _status(504, "Too large resource version", "Timeout")
            if token:
                version, begin = map(int, base64.b64decode(token).split())
                if version < self.compacted:
                    return 410, _status(410, "The provided continue parameter is too old", "Expired")
            else:
                version, begin = self.version, 0
                self._pinned[kind, version] = [one for _, one in sorted(self._objects[kind].items())]
            items = self._pinned[kind, version]
        end = begin + limit if limit else len(items)
        metadata = {"resourceVersion": str(version)}
        if end < len(items):
            metadata["continue"] = base64.b64encode(f"{version} {end}".encode()).decode()
        return 200, {"kind": f"{kind}List", "apiVersion": GROUPS[kind], "metadata": metadata, "items": items[begin:end]}

    # --- watches -----------------------------------------------------------------------------------------------------

    def _watch(self, wire: Wire, kind: str, query: Mapping[str, str], fault: Fault | None) -> None:
        initial = query.get("sendInitialEvents") == "true"
        if initial != (query.get("resourceVersionMatch") == "NotOlderThan"):
            return _answer(
                wire, 422, _status(422, "sendInitialEvents and resourceVersionMatch need each other", "Invalid")
            )
        refused = self.switches.streams if initial else 200
        if not initial and int(query["resourceVersion"]) < self.compacted:
            refused = 410
        if refused != 200:
            status = _status(refused, "etcd cannot do that" if initial else "too old resource version", "Refused")
            if self.switches.refuses_in_stream if initial else not self.switches.gone_by_http:
                wire.head(200, {"Transfer-Encoding": "chunked"})
                wire.chunk(_line("ERROR", status))
                return wire.end()
            return _answer(wire, refused, status)
        wire.head(200, {"Transfer-Encoding": "chunked"})
        watch = _Watch(self, kind, query, initial)
        sent = 0
        for found in watch.lines():
            line = found
            if fault is not None and sent >= fault.after and (watch.live or fault.after >= 0):
                if fault.name in ("end", "torn", "error"):
                    self._spoil_end(wire, fault, line or watch.bookmark())
                    break
                line, fault = self._spoil_inside(wire, fault, watch, line), None
            if line is not None:
                wire.chunk(line)
                sent += 1
            elif wire.closed():
                raise HangUp
        return wire.end()

    def _spoil_end(self, wire: Wire, fault: Fault, line: bytes) -> None:
        if fault.name == "error":
            reason = "Expired" if fault.status == 410 else "InternalError"
            wire.chunk(_line("ERROR", _status(fault.status, "spoilt", reason)))
        elif fault.name == "torn":
            wire.chunk(line[: len(line) // 2])

    def _spoil_inside(self, wire: Wire, fault: Fault, watch: _Watch, line: bytes | None) -> bytes | None:
        """What is still to be sent of the line."""
        whole = line or watch.bookmark()
        half = len(whole) // 2
        match fault.name:
            case "bookmark":
                wire.chunk(line or b"")
                wire.chunk(watch.bookmark())
                return None
            case "bookmark, cut":
                wire.chunk(line or b"")
                wire.chunk(watch.bookmark())
                raise HangUp
            case "cut":
                raise HangUp
            case "cut inside":
                wire.chunk(whole[:half])
                raise HangUp
            case "duplicate":
                wire.chunk(whole)
            case "garbage":
                wire.chunk(fault.body)
            case "replay":
                for event in watch.told():
                    wire.chunk(_line(event.type, event.object))
            case "silence":
                self.stopping.wait(fault.seconds)
            case "stall":
                wire.chunk(whole[:half])
                self.stopping.wait(fault.seconds)
                return whole[half:]
            case "trickle":
                for piece in _pieces(whole, fault.pieces):
                    wire.chunk(piece)
                    self.stopping.wait(fault.seconds)
                return None
        return line

    # --- for watches -------------------------------------------------------------------------------------------------

    def since(self, kind: str, version: int, bookmarks: int) -> tuple[list[Event], int, int]:
        """What has happened to a kind; waits a moment when that is nothing."""
        with self._changed:
            for _ in range(2):
                found = self.after(kind, version)
                if found or bookmarks != self._bookmarks or self.stopping.is_set():
                    break
                self._changed.wait(TICK)
            return found, self._bookmarks, self.version

    def after(self, kind: str, version: int) -> list[Event]:
        with self._changed:
            return [event for event in self.history if event.version > version and event.kind == kind]

    def now(self, kind: str) -> tuple[list[Object], int]:
        with self._changed:
            return list(self._objects[kind].values()), self.version


class _Watch:
    """One watch; `position` is the version up to which all was told, 0 before that, and `live` when a list is over."""

    def __init__(self, server: Server, kind: str, query: Mapping[str, str], initial: bool) -> None:
        self._server = server
        self._kind = kind
        self._initial = initial
        self.live = False
        self.position = 0 if initial else int(query["resourceVersion"])
        self._end = monotonic() + float(query["timeoutSeconds"])

    def lines(self) -> Iterator[bytes | None]:
        """What to send; None when there is nothing at the moment."""
        if self._initial:
            objects, version = self._server.now(self._kind)
            for one in objects:
                yield _line("ADDED", one)
            for event in self._server.after(
                self._kind, version
            ):  # what has happened meanwhile may come before the mark
                version = event.version
                yield _line(event.type, event.object)
            self.position = version
            yield self.bookmark({INITIAL_EVENTS_END: "true"})
        self.live = True
        yield None
        bookmarks = self._server._bookmarks
        while not self._server.stopping.is_set() and monotonic() < self._end:
            events, told, version = self._server.since(self._kind, self.position, bookmarks)
            for event in events:
                self.position = event.version
                yield _line(event.type, event.object)
            if told != bookmarks:
                bookmarks, self.position = told, version
                yield self.bookmark()
            elif not events:
                yield None

    def told(self) -> list[Event]:
        """All that there was of the kind, up to where this watch is."""
        return [e for e in self._server.history if e.kind == self._kind and e.version <= self.position]

    def bookmark(self, annotations: Mapping[str, str] | None = None) -> bytes:
        metadata: Object = {"resourceVersion": str(self.position or self._server.version), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = annotations
        return _line("BOOKMARK", {"kind": self._kind, "apiVersion": GROUPS[self._kind], "metadata": metadata})


def _answer(wire: Wire, status: int, body: bytes | Object, headers: Mapping[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    wire.head(status, {"Content-Length": str(len(data)), **(headers or {})})
    wire.send(data)


def _status(code: int, message: str, reason: str) -> Object:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**status, "message": message, "reason": reason, "code": code}


def _line(event: str, one: Object) -> bytes:
    return json.dumps({"type": event, "object": one}).encode() + b"\n"


def _pieces(data: bytes, number: int) -> list[bytes]:
    size = max(1, -(-len(data) // number))
    return [data[begin : begin + size] for begin in range(0, len(data), size)]
