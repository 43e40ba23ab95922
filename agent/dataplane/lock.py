"""Only one writer in a network namespace: two plans from one reading of the kernel would mix."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from agent.dataplane.errors import KernelError

NAME = "\0netpol-agent"
"""An abstract socket: it belongs to the network namespace, whatever the file systems, and goes with its process."""


@contextmanager
def only_writer(
    patience: float, waiting: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Wait until no other netpol-agent writes here, for `patience` seconds; `waiting` is told who does. False when we
    are `stopped` meanwhile.

    Raises KernelError when the other one does not end."""
    deadline = monotonic() + patience
    holder = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        while not _takes(lock):
            if not holder:
                holder = _holder()
                waiting(holder)
            if stopped():
                yield False
                return
            if monotonic() > deadline:
                raise KernelError(
                    "this network namespace",
                    f"is written by another netpol-agent ({holder})",
                    "Stop that one first; while `run` is at work, it alone writes.",
                )
            sleep(0.05)
        lock.listen(8)
        yield True


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
