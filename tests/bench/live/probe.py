"""Packets without end from one pod to another, each the first of its flow, and when each of them arrived."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from contextlib import suppress
from multiprocessing import get_context
from time import perf_counter, sleep

from tests.bench.netns import inside

EVERY = 0.0005
RING = 1 << 15
"""Packets that are remembered: 16 seconds."""
LOST = 20
"""Packets in a row that do not arrive when the way is closed."""
_FIRST_PORT, _PORTS = 2048, 60_000
_WORD = 8


class Probe:
    """From the namespace `source` to `target`, UDP. Times are those of `perf_counter`, alike in all processes."""

    def __init__(self, source: str, target: str, address: str, port: int) -> None:
        self._shared = mmap.mmap(-1, _WORD * (1 + 2 * RING))
        self._words = memoryview(self._shared).cast("d")
        context = get_context("fork")
        self._processes = [
            context.Process(target=self._receive, args=(target, address, port), daemon=True),
            context.Process(target=self._send, args=(source, address, port), daemon=True),
        ]
        for process in self._processes:
            process.start()

    def opened(self, since: float, patience: float = 5) -> float | None:
        """When the first packet that was sent after `since` arrived; None when none does."""
        until = perf_counter() + patience
        while perf_counter() < until:
            times = [arrived for sent, arrived in self._latest(since) if arrived]
            if times:
                return min(times)
            sleep(0.001)
        return None

    def closed(self, since: float, patience: float = 5) -> float | None:
        """When the first packet was sent of those that do not arrive any more; None when all do."""
        until = perf_counter() + patience
        while perf_counter() < until:
            packets = self._latest(since)[:-2]  # those last sent may be on their way
            missing = 0
            for _, arrived in reversed(packets):
                if arrived:
                    break
                missing += 1
            if missing >= LOST:
                return packets[-missing][0]
            sleep(0.001)
        return None

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _latest(self, since: float) -> list[tuple[float, float]]:
        """Packets sent after that, in order: when they were sent, and when they arrived, 0 if not."""
        words = self._words
        number = int(words[0])
        found: list[tuple[float, float]] = []
        while number > 0 and len(found) < RING // 2:
            slot = 1 + 2 * (number % RING)
            if words[slot] <= since:
                break
            found.append((words[slot], words[slot + 1]))
            number -= 1
        return found[::-1]

    def _send(self, source: str, address: str, port: int) -> None:
        _ahead()
        with inside(source):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        raw.connect((address, 0))
        words = self._words
        number = 0
        due = perf_counter()
        while True:
            number += 1
            slot = 1 + 2 * (number % RING)
            words[slot + 1] = 0.0
            words[slot] = perf_counter()
            words[0] = number
            header = struct.pack("!HHHH", _FIRST_PORT + number % _PORTS, port, 16, 0)
            with suppress(OSError):
                raw.send(header + struct.pack("=q", number))
            due = max(due + EVERY, perf_counter() - 0.005)
            sleep(max(due - perf_counter(), 0.0))

    def _receive(self, target: str, address: str, port: int) -> None:
        _ahead()
        with inside(target):
            listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((address, port))
        words = self._words
        while True:
            data = listener.recv(64)
            words[2 + 2 * (struct.unpack("=q", data)[0] % RING)] = perf_counter()


def _ahead() -> None:
    """These take little time, but take it at once."""
    with suppress(PermissionError):
        os.nice(-20)
