"""Only one writer in a network namespace: two plans from one reading of the kernel would mix."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep

from agent.dataplane.errors import KernelError

NAME = "\0netpol-agent"
"""An abstract socket: it belongs to the network namespace, whatever the file systems, and goes with its process."""
PAUSE = 0.02
"""Seconds between two looks whether our turn has come."""


class Turn:
    """Whose turn it is to write here. `waiting` is told once for whom we wait, at most for `patience` seconds. It ends
    with `close`, or with the process."""

    def __init__(self, patience: float, waiting: Callable[[str], None]) -> None:
        self._patience = patience
        self._waiting = waiting
        self._lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._deadline = 0.0
        self._holder = ""

    def has_come(self) -> bool:
        """Whether nobody else writes; from then on, it is we. Raises KernelError when the other one does not end."""
        if _takes(self._lock):
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
        return False

    def close(self) -> None:
        self._lock.close()


@contextmanager
def only_writer(patience: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Wait for our turn. Raises KernelError when it does not come."""
    with closing(Turn(patience, waiting)) as turn:
        while not turn.has_come():
            sleep(PAUSE)
        yield


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
