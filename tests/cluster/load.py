"""Connections that are tried all the time, so that whatever happens meanwhile happens to some of them."""

from __future__ import annotations

import errno
import select
import socket
from collections import deque
from collections.abc import Sequence
from threading import Event, Thread
from time import monotonic
from typing import Any

from tests.cluster.places import Places
from tests.cluster.prober import connect

EVERY = 0.01
"""Seconds between two attempts at the same address."""
ATTEMPT = 0.9
"""Seconds that a connection may take: a first packet that is lost is sent again only after one."""


class Load:
    """New TCP connections from a place to all targets, from `with` to its end; then `made` and `silent` are known."""

    def __init__(self, places: Places, place: str, targets: Sequence[str], port: int = 80) -> None:
        self.made = 0
        self.silent = 0
        self.refused: list[str] = []
        self._places, self._place = places, place
        self._targets, self._port = targets, port
        self._stop = Event()
        self._thread = Thread(target=self._work, name=f"load from {place}")

    def __enter__(self) -> Load:
        self._places.open(self._place)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"{self.made} made, {self.silent} silent, refused: {self.refused}"

    def _work(self) -> None:
        poller = select.epoll()
        flying: dict[int, socket.socket] = {}
        deadlines: deque[tuple[float, socket.socket]] = deque()
        due = monotonic()
        with self._places.inside(self._place):
            while not self._stop.is_set() or flying:
                if not self._stop.is_set() and monotonic() >= due:
                    due = monotonic() + EVERY
                    for target in self._targets:
                        made = connect(target, self._port)
                        flying[made.fileno()] = made
                        deadlines.append((monotonic() + ATTEMPT, made))
                        poller.register(made.fileno(), select.EPOLLOUT)
                now = monotonic()
                for descriptor, _ in poller.poll(EVERY / 2):
                    poller.unregister(descriptor)  # closing alone leaves it there while a fork holds it, too
                    self._judge(flying.pop(descriptor))
                while deadlines and (deadlines[0][0] < now or deadlines[0][1].fileno() < 0):
                    late = deadlines.popleft()[1]
                    if late.fileno() >= 0:
                        self.silent += 1
                        poller.unregister(late)
                        del flying[late.fileno()]
                        late.close()
        poller.close()

    def _judge(self, made: socket.socket) -> None:
        number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.refused.append(errno.errorcode[number])
        else:
            self.made += 1
        made.close()
