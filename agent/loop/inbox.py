"""What waits for the writer: the newest state of each object that changed, never more than there are objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from time import perf_counter
from typing import NamedTuple

from agent.kube.kinds import Object


class Change(NamedTuple):
    """The newest state of an object, None when it is gone; `since` when the first change that waits came, as
    `perf_counter` tells it."""

    value: Object | None
    since: float


Batch = Mapping[tuple[str, str], Change]
"""By (kind, key)."""


class Inbox:
    """Filled by many threads, emptied by one, which waits for `fileno` to become readable."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[tuple[str, str], Change] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __len__(self) -> int:
        return len(self._waiting)

    def fileno(self) -> int:
        return self._wake

    def put(self, kind: str, key: str, value: Object | None) -> None:
        """An object is this now; what waited for it is superseded."""
        now = perf_counter()
        with self._lock:
            before = self._waiting.get((kind, key))
            self._waiting[kind, key] = Change(value, before.since if before else now)
            first = len(self._waiting) == 1 and before is None
        if first:
            self.wake()

    def wake(self) -> None:
        """Make the one that waits look again; safe in a signal handler."""
        os.eventfd_write(self._wake, 1)

    def take(self) -> Batch:
        """Everything that waits."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return taken
