"""Network namespaces of nodes and pods, found by an address that they hold.

Some process of a node or pod runs there for as long as it lives (of a pod, its sandbox), and what is under /proc of it
says which addresses are its own. This works wherever the nodes' processes are seen from here: in kind, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

from agent.lab.namespaces import CLONE_NEWNET, setns

_HELD = re.compile(r"\|-- (\S+)\n\s+/32 host LOCAL")


class Places:
    """Open files of namespaces, by IPv4 address."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def open(self, *addresses: str) -> None:
        """Find all of these at once. Raises LookupError for those that nobody holds."""
        wanted = {address for address in addresses if address not in self._files}
        seen: set[str] = set()
        for process in Path("/proc").glob("[0-9]*") if wanted else ():
            with suppress(OSError):  # a process that has ended meanwhile
                number = os.readlink(process / "ns" / "net")
                if number in seen:
                    continue
                found = wanted.intersection(_HELD.findall((process / "net" / "fib_trie").read_text()))
                seen.add(number)
                for address in found:
                    self._files[address] = os.open(process / "ns" / "net", os.O_RDONLY | os.O_CLOEXEC)
                wanted -= found
        if wanted:
            raise LookupError(f"no process of this machine runs where {sorted(wanted)} are")

    @contextmanager
    def inside(self, address: str) -> Iterator[None]:
        """This thread is there meanwhile."""
        self.open(address)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._files[address], CLONE_NEWNET)
            yield
        finally:
            setns(home, CLONE_NEWNET)
            os.close(home)

    def fetch(self, address: str, port: int, path: str) -> tuple[int, str]:
        """HTTP on 127.0.0.1 there: the status, and the body. Raises OSError when nobody listens."""
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        with self.inside(address):
            connection.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
