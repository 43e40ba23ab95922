"""Only one writer in a network namespace: two plans from one reading of the kernel would mix."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Lock
from time import monotonic, sleep

from agent.dataplane.errors import KernelError

NAME = "\0netpol-agent"
"""An abstract socket: it belongs to the network namespace, whatever the file systems, and goes with its process."""
FOLLOWERS = 16
"""That are heard at the same time; usually there is one."""
LONGEST = 1024
"""Bytes that are heard of a follower."""
PAUSE = 0.02
"""Seconds between two looks whether our turn has come."""


class Turn:
    """Whose turn it is to write here. `waiting` is told once for whom we wait, at most for `patience` seconds. It ends
    with `close`, or with the process.

    `instance` is NAME:VERSION. Those of the name that wait tell the one whose turn it is that they could follow."""

    def __init__(self, patience: float, waiting: Callable[[str], None], instance: str = "") -> None:
        self._patience = patience
        self._waiting = waiting
        self._instance = instance
        self._lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._deadline = 0.0
        self._holder = ""
        self._word: socket.socket | None = None  # to the one that we wait for
        self._mutex = Lock()
        self._followers: dict[socket.socket, bytes] = {}  # that wait for us, and what they have said

    def has_come(self, prepared: bool = False) -> bool:
        """Whether nobody else writes; from then on, it is we. `prepared` says whether we could follow.

        Raises KernelError when the other one does not end."""
        if _takes(self._lock):
            self._lock.setblocking(False)
            self._lock.listen(8)
            return True
        if not self._holder:
            self._holder = _holder()
            self._deadline = monotonic() + self._patience
            self._waiting(self._holder)
        if monotonic() > self._deadline:
            raise KernelError(
                "this network namespace",
                f"is written by another netpol-agent ({self._holder})",
                "Stop that one first; while `run` is at work, it alone writes.",
            )
        if prepared and self._instance:
            self._say_so()
        return False

    def why_not(self, instance: str) -> str:
        """What keeps an instance from following us; "" when it could. For any thread."""
        name = self._instance.partition(":")[0]
        if instance.partition(":")[0] != name:
            return f"another netpol-agent is at work here{f', {name}' if name else ''}: one for a cluster"
        with self._mutex:
            self._hear()
            told = {said.decode(errors="replace").strip() for said in self._followers.values()}
        if instance in told:
            return ""
        return f"{instance} has not said that it could follow; its log says what it waits for"

    def close(self) -> None:
        for one in (self._lock, *self._followers, *([self._word] if self._word else [])):
            one.close()

    def _say_so(self) -> None:
        """Once to each that we wait for."""
        if self._word is not None and _ended(self._word):
            self._word.close()
            self._word = None
        if self._word is None:
            word = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            word.setblocking(False)
            try:
                word.connect(NAME)
                word.send(f"{self._instance}\n".encode())
            except OSError:
                word.close()
            else:
                self._word = word

    def _hear(self) -> None:
        """Who waits, and what they say; those that have ended are forgotten."""
        with suppress(OSError):  # nobody else, or it is not our turn
            while len(self._followers) < FOLLOWERS:
                follower, _ = self._lock.accept()
                follower.setblocking(False)
                self._followers[follower] = b""
        for follower, said in list(self._followers.items()):
            try:
                more = follower.recv(LONGEST)
            except BlockingIOError:
                continue
            except OSError:
                more = b""
            if more:
                self._followers[follower] = (said + more)[:LONGEST]
            else:
                follower.close()
                del self._followers[follower]


@contextmanager
def only_writer(patience: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Wait for our turn. Raises KernelError when it does not come."""
    with closing(Turn(patience, waiting)) as turn:
        while not turn.has_come():
            sleep(PAUSE)
        yield


def _ended(peer: socket.socket) -> bool:
    """Whether who is at the other end, and says nothing, has gone."""
    try:
        return not peer.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _takes(lock: socket.socket) -> bool:
    try:
        lock.bind(NAME)
    except OSError:
        return False
    return True


def _holder() -> str:
    """The process that holds the lock, as far as it can be seen from here."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.setblocking(False)
            peer.connect(NAME)
            number, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        command = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "in another container"
    who = f" of user {user}" if user else ""
    return f"process {number}{who}: {' '.join(command.split())[:200]}"
