"""One kind, followed: listed, watched, resumed where it was, listed again when that is too long ago.

A reflector tells its sink what each object is now, whenever that has changed in anything that we read; what vanished
while nobody watched is deleted when the next list is whole, and no sooner.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from threading import Event as Flag
from time import monotonic
from typing import NamedTuple, Protocol

import msgspec

from agent.core.findings import Finding, where_wrong
from agent.kube.connection import Connection
from agent.kube.errors import ApiError, Broken, Defect, Gone, Refused, Unreachable
from agent.kube.kinds import Kind, Object, mark
from agent.kube.wire import Bookmark, Changed, Deleted, Event, Head, read_line, read_page

PAGE = 500
"""Objects in a page; doubled whenever the server has compacted a list before we were through."""
WATCH_SECONDS = (240, 300)
"""Between these the server is asked to end a watch, so that not all agents come back at once."""


class Patience(NamedTuple):
    """Waits between tries, in seconds: from `first`, doubled up to `longest`, each shortened by up to half at random.

    `tries` streams in a row that break before they bring anything new mean that the version is no good."""

    first: float = 0.2
    longest: float = 30.0
    tries: int = 3


class Sink(Protocol):
    """Takes what reflectors find. Called from their threads."""

    def changed(self, kind: str, key: str, value: Object) -> None:
        """The object is this now."""

    def deleted(self, kind: str, key: str) -> None:
        """The object is gone."""

    def in_sync(self, kind: str) -> None:
        """Everything that there is has been told; said again after each list."""

    def connected(self, kind: str) -> None:
        """The server answers."""

    def failed(self, kind: str, error: ApiError, advice: str) -> None:
        """It does not, or what it says is no good; tried again. `advice` may be ""."""

    def unreadable(self, kind: str, finding: Finding) -> None:
        """An object that cannot be read counts as absent."""


class Reflector:
    """`run` follows one kind until it is told to stop, whatever the server does."""

    def __init__(self, kind: Kind, connection: Connection, sink: Sink, patience: Patience = Patience()) -> None:  # noqa: B008
        self.kind = kind
        self._connection = connection
        self._sink = sink
        self._patience = patience
        self._known: dict[str, int] = {}  # the objects that there are, and what was told of each
        self._version = ""  # up to which everything was told; "" wants a list
        self._latest = ""  # of the last version that was ever told: a list may not be older
        self._streams = True  # whether the server can stream a list
        self._page = PAGE
        self._opened = False  # whether the connection that is under way became a stream
        self._fruitless = 0  # streams in a row that broke and brought nothing

    def run(self, stop: Flag) -> None:
        failures = 0
        expired = False  # whether the last thing that went wrong was that our version is too old
        while not stop.is_set():
            begin, before = monotonic(), (self._version, self._latest)
            error = self._session(stop)
            resumed, now = before[0], (self._version, self._latest)
            moved = resumed and self._version and before != now  # a list alone is none: the watch behind it may fail
            failures = 0 if moved or monotonic() - begin > self._patience.longest else failures + 1
            if isinstance(error, Gone) and not expired:
                failures = 0  # after an outage: the server answers, and everything may have changed
            expired = isinstance(error, Gone) or (expired and not moved)
            pause = self._pause(failures) if failures > 1 or error is not None else 0.0
            if error is not None:
                self._sink.failed(self.kind.name, error, self._advice(error))
                pause = max(pause, error.retry_after or 0.0)
            stop.wait(pause)

    def _pause(self, failures: int) -> float:
        longest = min(self._patience.first * 2.0 ** min(failures, 20), self._patience.longest)
        return longest * random.uniform(0.5, 1.0)

    def _session(self, stop: Flag) -> ApiError | None:
        """One connection, to its end; the error that ended it, if any."""
        before = self._latest
        self._opened = False
        try:
            for _ in self._follow():
                if stop.is_set():
                    break
        except Gone as error:
            self._version = ""
            self._page *= 2
            return error
        except Refused as error:
            if error.status in (401, 403):  # who has no token is told 403 where anonymous requests are let in
                with suppress(ApiError):
                    self._connection.renew()
            if error.status == 504:
                self._latest = ""  # "too large resource version": the server was set back
            if self._opened:
                self._count_broken(before)
            return error
        except Unreachable as error:
            with suppress(ApiError):
                self._connection.renew()
            return error
        except Broken as error:
            self._count_broken(before)
            return error
        except ApiError as error:
            return error
        except Exception as error:  # a thread that dies would leave its kind as it is for ever, and nobody would know
            self._version = ""
            defect = Defect(f"{type(error).__name__}: {error}")
            defect.__cause__ = error
            return defect
        self._fruitless = 0
        return None

    def _count_broken(self, before: str) -> None:
        """A stream broke; give its version up when that goes on before anything new came."""
        self._fruitless = self._fruitless + 1 if before == self._latest else 0
        if self._fruitless >= self._patience.tries:
            if not self._version:
                self._streams = not self._streams  # something between us may not like the way we list
            self._version, self._fruitless = "", 0

    # --- one connection ----------------------------------------------------------------------------------------------

    def _follow(self) -> Iterator[Event]:
        """List when that is needed, then watch. Yields each event when it was told."""
        if self._version:
            yield from self._watch(self._version)
        elif self._streams:
            yield from self._stream_list()
        else:
            self._list_pages()
            yield from self._watch(self._version)

    def _stream_list(self) -> Iterator[Event]:
        """A watch that begins with everything there is."""
        found: set[str] | None = set()
        query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "resourceVersion": ""}
        try:
            for event in self._events(query):
                match event:
                    case Bookmark(version, True) if found is not None:
                        self._complete(found, version)
                        found = None
                    case Bookmark() if found is not None:
                        pass  # until the list is whole there is no version to resume at
                    case Changed(head, data) if found is not None:
                        found.add(head.key)
                        self._tell(head, data)
                    case Deleted(head) if found is not None:
                        found.discard(head.key)
                        self._forget(head.key)
                    case _:
                        self._take(event)
                yield event
        except Refused as error:
            if error.status in (401, 403, 404, 410, 429, 503) or self._version:
                raise
            self._streams = False  # an older server, or etcd, or the feature is off; none says it in one way
            return
        if found is not None:
            raise Broken("the stream ended before its list was whole")

    def _list_pages(self) -> None:
        found: set[str] = set()
        query: dict[str, str | int] = {"limit": self._page}
        if self._latest:
            query |= {"resourceVersion": self._latest, "resourceVersionMatch": "NotOlderThan"}
        while True:
            page = read_page(self._connection.get(self.kind.path, query))
            self._sink.connected(self.kind.name)
            for head, data in page.items:
                found.add(head.key)
                self._tell(head, data)
            if not page.next:
                break
            query = {"limit": self._page, "continue": page.next}
        self._complete(found, page.version)

    def _watch(self, version: str) -> Iterator[Event]:
        for event in self._events({"resourceVersion": version}):
            self._take(event)
            yield event

    def _events(self, query: dict[str, str]) -> Iterator[Event]:
        seconds = random.randint(*WATCH_SECONDS)
        asked: dict[str, str | int] = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": seconds,
            **query,
        }
        with self._connection.stream(self.kind.path, asked) as lines:
            self._opened = True
            self._sink.connected(self.kind.name)
            for line in lines:
                if line.strip():
                    yield read_line(line)

    # --- what was found ----------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        """An event of a watch. One that is no newer than the last was sent twice."""
        match event:
            case Bookmark(version, _):
                self._advance(version)
            case Changed(head, data) if self._is_new(head.version):
                self._tell(head, data)
                self._advance(head.version)
            case Deleted(head) if self._is_new(head.version):
                self._forget(head.key)
                self._advance(head.version)
            case _:
                pass

    def _is_new(self, version: str) -> bool:
        known = self._version
        return not (version.isdecimal() and known.isdecimal() and int(version) <= int(known))

    def _advance(self, version: str) -> None:
        if version and self._is_new(version):
            self._version = self._latest = version

    def _complete(self, found: set[str], version: str) -> None:
        for key in self._known.keys() - found:
            self._forget(key)
        self._version = self._latest = version
        self._page = PAGE
        self._sink.in_sync(self.kind.name)

    def _tell(self, head: Head, data: msgspec.Raw) -> None:
        try:
            value = self.kind.read(data)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            self._sink.unreadable(
                self.kind.name, Finding("type-wrong", f"{self.kind.name} {head.key}", *where_wrong(error))
            )
            self._forget(head.key)
            return
        told = mark(value)
        if self._known.get(head.key) != told:  # most updates are of a status, and end here
            self._sink.changed(self.kind.name, head.key, value)
            self._known[head.key] = told

    def _forget(self, key: str) -> None:
        if key in self._known:
            self._sink.deleted(self.kind.name, key)
            del self._known[key]

    def _advice(self, error: ApiError) -> str:
        if not isinstance(error, Refused):
            return ""
        if error.status == 403:
            return f"grant get, list and watch on {self.kind.grant} at cluster scope to the agent's service account"
        if error.status == 401:
            return "the credentials are not accepted; they are read again before the next try"
        if error.status == 404:
            return f"the API server does not serve {self.kind.grant}; is this its address?"
        return ""
