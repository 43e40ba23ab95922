"""A flood of new connections: one pinned process per CPU, each sending batches of frames as fast as the kernel takes.

Every frame carries the mark of what it asks in which epoch. `show` changes what is asked; when it returns, no packet
of the epoch before is on its way any more, so each packet saw the kernel as it was between two calls of `show`.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import NoReturn

from agent.lab.fabric import Fabric
from tests.windows.frames import Probe, frame

BATCH = 256
STRIDE = 128
PORTS = 509
"""So many source ports in turn, for each process; a prime, so that every place of a batch meets all of them.
A flow that was never answered stays new for conntrack, and is judged each time."""
SLOTS = 256
_SOL_PACKET, _QDISC_BYPASS = 263, 20


def mark(epoch: int, slot: int) -> int:
    """What a packet of an epoch's probe carries."""
    return epoch * SLOTS + slot


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_long),  # with the padding behind it
        ("sent", ctypes.c_long),
    )


class Flood(AbstractContextManager["Flood"]):
    """Senders in a pod's namespace of a fabric, one per CPU; quiet until the first `show`."""

    def __init__(self, fabric: Fabric, key: str, to: bytes) -> None:
        self._controls: list[Connection] = []
        self._processes: list[int] = []
        for number, cpu in enumerate(sorted(os.sched_getaffinity(0))):
            ours, theirs = Pipe()
            child = os.fork()
            if child == 0:
                ours.close()
                _life(fabric, key, to, theirs, cpu, 1024 + number * PORTS)
            theirs.close()
            self._controls.append(ours)
            self._processes.append(child)

    def show(self, epoch: int, probes: Sequence[Probe]) -> None:
        """Send these and nothing else, as slots 0, 1, … of the epoch; nothing at all when there are none."""
        assert len(probes) <= SLOTS
        for control in self._controls:
            control.send((epoch, list(probes)))
        for control in self._controls:
            control.recv()

    def pause(self) -> None:
        self.show(0, ())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for control in self._controls:
            control.close()
        for process in self._processes:
            os.waitpid(process, 0)


def _life(fabric: Fabric, key: str, to: bytes, control: Connection, cpu: int, first_port: int) -> NoReturn:
    try:
        os.sched_setaffinity(0, {cpu})
        os.nice(5)
        with fabric.inside(key):
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.bind(("eth0", 0))
        sender.setsockopt(_SOL_PACKET, _QDISC_BYPASS, 1)
        _send(sender, to, control, cpu, first_port)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    finally:
        os._exit(1)


def _send(sender: socket.socket, to: bytes, control: Connection, cpu: int, first_port: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = bytearray(BATCH * STRIDE)
    start = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    vectors = (_Iovec * BATCH)()
    messages = (_Message * BATCH)()
    for number in range(BATCH):
        vectors[number].base = start + number * STRIDE
        messages[number].iov = ctypes.addressof(vectors[number])
        messages[number].iov_length = 1
    places: list[int] = []
    turn = 0
    while True:
        if not places or control.poll():
            epoch, probes = control.recv()
            _drain(cpu)
            places = []
            for number in range(BATCH if probes else 0):
                slot = number % len(probes)
                if number < len(probes):
                    data, varies = frame(to, probes[slot], mark(epoch, slot))
                    buffer[number * STRIDE : number * STRIDE + len(data)] = data
                    places.append(number * STRIDE + varies)
                    vectors[number].length = len(data)
                else:
                    before = number - len(probes)
                    buffer[number * STRIDE : (number + 1) * STRIDE] = buffer[before * STRIDE : (before + 1) * STRIDE]
                    places.append(places[before] + len(probes) * STRIDE)
                    vectors[number].length = vectors[before].length
            control.send(True)
            continue
        for place in places:
            turn = turn + 1 if turn < PORTS - 1 else 0
            port = first_port + turn
            buffer[place] = port >> 8
            buffer[place + 1] = port & 255
        if libc.sendmmsg(sender.fileno(), messages, BATCH, 0) < 0:
            raise OSError(ctypes.get_errno(), "sendmmsg")


def _drain(cpu: int) -> None:
    """Wait until nothing is queued on this CPU for the network stack.

    Each packet is carried through on the CPU that sent it, mostly within the call that sends; when the kernel
    puts it off it is in this queue."""
    while True:
        with open("/proc/net/softnet_stat", encoding="ascii") as lines:
            rows = [line.split() for line in lines]
        queued = next((int(row[11], 16) for row in rows if int(row[12], 16) == cpu), 0)
        if not queued:
            return
        os.sched_yield()
