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
def only_writer(patience: float, waiting: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other netpol-agent writes here, for `patience` seconds; `waiting` is told who does.

    Raises KernelError when the other one does not end."""
    deadline = monotonic() + patience
    told = False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        while True:
            try:
                lock.bind(NAME)
                break
            except OSError:
                holder = _holder()
            if monotonic() > deadline:
                raise KernelError(
                    "this network namespace",
                    f"is written by another netpol-agent ({holder})",
                    "Stop that one first; while `run` is at work, it alone writes.",
                )
            if not told:
                waiting(holder)
                told = True
            sleep(0.05)
        lock.listen(8)
        yield


def _holder() -> str:
    """The process that holds the lock, as far as it can be seen from here."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.setblocking(False)
            peer.connect(NAME)
            number, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        command = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "in another container"
    return f"process {number}: {' '.join(command.split())[:200]}"
