"""Connections that are open, between sockets in the pods of a fabric; and packets that try to go on with them."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET

from agent.lab.fabric import Fabric

_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_RECEIVED, _SENT = 1, 2
_ALL = 0x0003
LATE, INTRUDER = b"late-from-the-peer", b"intruder-from-the-pod"


@dataclass
class Talk:
    """An open connection between a pod and its peer; `mine` is the pod's socket, `theirs` the peer's.

    `ends` are the pod's own address and port, and those it sees the peer have."""

    title: str
    mine: socket.socket
    theirs: socket.socket
    ends: tuple[tuple[str, int], tuple[str, int]]
    sequence: tuple[int, int] = (0, 0)

    def goes_on(self) -> bool:
        """Whether both ends still hear each other."""
        for one, other in ((self.theirs, self.mine), (self.mine, self.theirs)):
            try:
                one.send(b"again")
                other.settimeout(2)
                if other.recv(100) != b"again":
                    return False
            except OSError:
                return False
        return True

    def late(self) -> None:
        """The peer sends, as if nothing had happened."""
        try:
            self.theirs.send(LATE)
        except OSError:
            return  # told by ICMP or a reset that there is nobody

    def intrude(self, fabric: Fabric, pod: str) -> None:
        """The pod that has the address now sends what the one before it would have sent next."""
        (address, port), (peer, peer_port) = self.ends
        version = AF_INET6 if ":" in address else AF_INET
        with fabric.inside(pod):
            if self.mine.type == SOCK_DGRAM:
                with socket.socket(version, SOCK_DGRAM) as sender:
                    sender.bind((address, port))
                    sender.sendto(INTRUDER, (peer, peer_port))
                return
            with socket.socket(version, socket.SOCK_RAW, IPPROTO_TCP) as raw:
                raw.bind((address, 0))
                header = struct.pack("!HHIIHHHH", port, peer_port, *self.sequence, 5 << 12 | 0x18, 500, 0, 0)
                pseudo = socket.inet_pton(version, address) + socket.inet_pton(version, peer)
                pseudo += struct.pack("!HH", IPPROTO_TCP, len(header) + len(INTRUDER))
                total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
                data = header + INTRUDER + b"\0" * (len(INTRUDER) % 2)
                total += sum(struct.unpack(f"!{len(data) // 2}H", data))
                while total >> 16:
                    total = (total & 0xFFFF) + (total >> 16)
                raw.sendto(header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:] + INTRUDER, (peer, 0))

    def close(self) -> None:
        """Without a word to the other end."""
        for one in (self.mine, self.theirs):
            one.close()


def talk(
    title: str, fabric: Fabric, kind: int, client: str, server: str, port: int, ask: tuple[str, int], *, mine: str
) -> Talk:
    """A connection from one pod to another, asked for at `ask`, that has been answered. `mine` is client or server."""
    version = AF_INET6 if ":" in ask[0] else AF_INET
    with fabric.inside(server):
        listener = socket.socket(version, kind)
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listener.bind(("", port))
    with fabric.inside(client):
        asker = socket.socket(version, kind)
    asker.settimeout(2)
    if kind == SOCK_STREAM:
        listener.listen()
        asker.connect(ask)
        answerer, _ = listener.accept()
        listener.close()
        asker.send(b"hello")
        assert answerer.recv(100) == b"hello"
    else:
        asker.connect(ask)
        asker.send(b"hello")
        listener.settimeout(2)
        _, seen = listener.recvfrom(100)
        answerer = listener
        answerer.connect(seen)
    answerer.send(b"welcome")
    assert asker.recv(100) == b"welcome"
    own, other = (asker, answerer) if mine == client else (answerer, asker)
    found = Talk(title, own, other, (own.getsockname()[:2], own.getpeername()[:2]))
    if kind == SOCK_STREAM:
        time.sleep(0.05)  # for the last acknowledgement
        found.sequence = _sequence(own, _SENT), _sequence(own, _RECEIVED)
    return found


def _sequence(one: socket.socket, queue: int) -> int:
    """The next number to be sent or received."""
    one.setsockopt(IPPROTO_TCP, _TCP_REPAIR, 1)
    one.setsockopt(IPPROTO_TCP, _TCP_REPAIR_QUEUE, queue)
    number = one.getsockopt(IPPROTO_TCP, _TCP_QUEUE_SEQ)
    one.setsockopt(IPPROTO_TCP, _TCP_REPAIR, 0)
    return number & 0xFFFFFFFF


class Ear:
    """All that arrives in a pod, from when it is made on."""

    def __init__(self, fabric: Fabric, key: str) -> None:
        with fabric.inside(key):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.bind(("eth0", _ALL))
        self._socket.setblocking(False)

    def heard(self, text: bytes) -> list[bytes]:
        """The frames with this text that have come since the last call."""
        found = []
        while True:
            try:
                data, where = self._socket.recvfrom(65536)
            except BlockingIOError:
                return found
            if where[2] != socket.PACKET_OUTGOING and text in data:  # type: ignore[attr-defined]
                found.append(data)

    def close(self) -> None:
        self._socket.close()
