"""Real connections out of pods and nodes, very many at once.

`kubectl exec` takes a tenth of a second for each; here the sockets are made in the pods' network namespaces, so that
what they send takes the way of what the pods send, and are all waited for together.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

from agent.lab.servers import raise_file_limit
from tests.cluster.places import Places

REACHED = (0, errno.ECONNREFUSED)
"""A host that refuses has got the packet, and its answer came back; what a policy denies is dropped in silence."""
HELLO = b"echo netpol-agent"
"""agnhost sends it back; to a DNS server it is a kind of question that it answers to say that it has no such."""
_numbers = itertools.count(1)


class Question(NamedTuple):
    """`place` is an address of who asks. ICMP means ICMPv6 to an IPv6 address."""

    place: str
    address: str
    protocol: str
    port: int
    expected: bool


def probe(places: Places, questions: Sequence[Question], least: float = 0.4, most: float = 1.5) -> list[bool]:
    """Which of them were answered. All are given `least` seconds, and those of which it is expected up to `most`."""
    raise_file_limit()
    found = [False] * len(questions)
    waiting: dict[int, tuple[int, socket.socket]] = {}
    poller = select.epoll()
    try:
        order = sorted(range(len(questions)), key=lambda number: questions[number].place)
        for place, numbers in itertools.groupby(order, key=lambda number: questions[number].place):
            with places.inside(place):
                for number in numbers:
                    made = _depart(questions[number])
                    waiting[made.fileno()] = number, made
                    events = select.EPOLLOUT if questions[number].protocol == "TCP" else select.EPOLLIN
                    poller.register(made.fileno(), events)
        begin = monotonic()
        expected = {number for number, one in enumerate(questions) if one.expected}
        while waiting and (left := begin + (most if expected else least) - monotonic()) > 0:
            for descriptor, _ in poller.poll(left):
                number, made = waiting[descriptor]
                answered = _answered(questions[number], made)
                if answered is None:
                    continue
                found[number] = answered
                expected.discard(number)
                del waiting[descriptor]
                poller.unregister(descriptor)
                made.close()
    finally:
        poller.close()
        for _, made in waiting.values():
            made.close()
    return found


def connect(address: str, port: int) -> socket.socket:
    """The beginning of a TCP connection out of where this thread is. Raises OSError when it cannot be sent at all."""
    made = socket.socket(_family(address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    trouble = made.connect_ex((address, port))
    if trouble not in (0, errno.EINPROGRESS):
        made.close()
        raise OSError(trouble, f"{os.strerror(trouble)} on the way to {address}:{port}")
    return made


def _depart(asked: Question) -> socket.socket:
    if asked.protocol == "TCP":
        return connect(asked.address, asked.port)
    family = _family(asked.address)
    if asked.protocol == "UDP":
        made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.connect((asked.address, asked.port))
        made.send(HELLO)
        return made
    number = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, number)
    made.connect((asked.address, 0))
    made.send(_echo(family))
    return made


def _answered(asked: Question, made: socket.socket) -> bool | None:
    """Whether it reached; None when what came is no answer."""
    if asked.protocol == "TCP":
        return made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in REACHED
    try:
        data = made.recv(2048)
    except BlockingIOError:
        return None
    except OSError as error:
        return error.errno in REACHED
    if asked.protocol == "UDP":
        return True
    body = data[(data[0] & 15) * 4 :] if ":" not in asked.address else data
    return True if body[0] in (0, 129) else None  # another one's echo reply from there proves the same


def _echo(family: socket.AddressFamily) -> bytes:
    label = next(_numbers) & 0xFFFF
    if family == socket.AF_INET6:  # the kernel fills in the checksum
        return struct.pack(">BBHHH", 128, 0, 0, label, 1)
    total = 0x800 + label + 1
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">BBHHH", 8, 0, ~total & 0xFFFF, label, 1)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
