"""Single probes under way: the sockets and packets of each protocol, and what an answer means."""

import errno
import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from agent.lab import sctp
from agent.lab.fabric import Fabric
from agent.lab.spec import plain

Protocol = Literal["TCP", "UDP", "SCTP", "ICMP"]

_IP_RECVERR = 11
_IPV6_RECVERR = 25
_MSG_ERRQUEUE = 0x2000
_ORIGIN_ICMP = (2, 3)
_TCP_ESTABLISHED = 1
_ECHO = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}
_GREETING_WAIT = 2.0  # seconds: once connected, only a busy server of our own keeps us waiting

# Ports and ICMP identifiers count up, so that no two recent flows of a process share one.
_numbers = itertools.count(random.randrange(1 << 30))


@dataclass(frozen=True)
class Probe:
    """One question. `src` is a key of the fabric; `port` is ignored for ICMP (which is also ICMPv6).

    `source_address` binds one of several addresses of the source; `expected` says that the probe should
    arrive, so that it is asked again, more patiently, before silence is believed.
    """

    src: str
    dst_address: str
    protocol: Protocol
    port: int = 0
    expected: bool = False
    source_address: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a probe.

    `reached`: the destination's host answered, also when nothing listens there ("refused"). `who`: the key
    of who answered, None where nobody said. `milliseconds`: from asking to the answer, or to giving up.
    `detail`: "answered", "refused", "timeout", "rejected by ADDRESS" (an ICMP error that somebody on the
    way sent, as for a Service without endpoints) or the system's error.
    """

    reached: bool
    who: str | None
    milliseconds: float
    detail: str


class Flight:
    """One probe under way, with a socket of its own (TCP, UDP) or on a shared raw one (SCTP, ICMP)."""

    def __init__(self, number: int, asked: Probe, own: socket.socket | None, timeout: float) -> None:
        """`number` is the caller's name for it; `timeout` in seconds."""
        self.number = number
        self.asked = asked
        self.own = own
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.outcome: Outcome | None = None
        self._carrier: Shared | None = None
        self._extended = False

    @property
    def file(self) -> socket.socket:
        """The socket to watch."""
        return self.own if self.own is not None else self.carrier.file

    @property
    def carrier(self) -> "Shared":
        """The shared socket it travels on. Only for SCTP and ICMP."""
        if self._carrier is None:
            raise RuntimeError("this probe has a socket of its own")
        return self._carrier

    @carrier.setter
    def carrier(self, carrier: "Shared") -> None:
        self._carrier = carrier

    def read(self) -> list[int]:
        """Take what the own socket holds; [its number] when that settles it."""
        made = self.own
        if made is None:
            return []
        try:
            data = made.recv(4096)
        except BlockingIOError:
            # An ICMP error that came back while connect() still ran is only in the queue.
            waiting = next(errors(made), None)
            if waiting is None:
                return []
            self.fail(waiting[1], waiting[2])
            return [self.number]
        except OSError as trouble:
            offender = next((origin for _, _, origin in errors(made)), None)
            self.fail(trouble.errno or 0, offender)
            return [self.number]
        if self.asked.protocol == "TCP":
            self.answer(data.decode(errors="replace").strip() or None)
        else:
            self.answer(data.partition(b"\n")[0].decode(errors="replace"))
        return [self.number]

    def answer(self, who: str | None, detail: str = "answered") -> None:
        """The destination has answered."""
        self.outcome = Outcome(True, who, self._elapsed(), detail)

    def fail(self, number: int, offender: str | None) -> None:
        """An error came back; `offender` is the address that sent the ICMP message, None for a reset."""
        # A host that has no such port says so itself; a REJECT rule on the way speaks from its own address.
        if offender is not None and plain(offender) != plain(self.asked.dst_address):
            self.outcome = Outcome(False, None, self._elapsed(), f"rejected by {offender}")
        elif number in (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOPROTOOPT) or offender is not None:
            self.answer(None, "refused")
        else:
            self.outcome = Outcome(False, None, self._elapsed(), os.strerror(number))

    def extend(self) -> bool:
        """Whether to wait on at the deadline: a TCP connection that stands has only not heard who."""
        if self._extended or self.asked.protocol != "TCP" or self.own is None:
            return False
        self._extended = True
        if self.own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED:
            return False
        self.deadline = time.monotonic() + _GREETING_WAIT
        return True

    def give_up(self) -> Outcome:
        """The outcome of silence."""
        if self._extended and self.deadline - self.started > _GREETING_WAIT:
            return Outcome(True, None, self._elapsed(), "connected, but nobody spoke")
        return Outcome(False, None, self._elapsed(), "timeout")

    def _elapsed(self) -> float:
        return (time.monotonic() - self.started) * 1000


@dataclass
class Shared:
    """A raw socket in one source's namespace: the flights on it, by source port or ICMP identifier."""

    file: socket.socket
    protocol: Protocol
    family: socket.AddressFamily
    fabric: Fabric
    flights: dict[int, Flight] = field(default_factory=dict)

    def send(self, flight: Flight) -> None:
        """Ask. Raises OSError when the kernel knows at once that it cannot be sent."""
        for number in _numbers:
            label = 32768 + number % 28000 if self.protocol == "SCTP" else number % 65536
            if label not in self.flights:
                break
        self.flights[label] = flight
        if self.protocol == "SCTP":
            packet = sctp.Packet(label, flight.asked.port, 0, sctp.INIT, label << 8 | 1).encode()
        else:
            packet = _echo(_ECHO[self.family][0], label)
        extra = _source(flight.asked)
        self.file.sendmsg([packet], extra, 0, (flight.asked.dst_address, 0))

    def read(self) -> list[int]:
        """Take what has come; the numbers of the flights that are settled by it."""
        settled = []
        for _ in range(4096):
            try:
                data, _, _, peer = self.file.recvmsg(4096)
            except BlockingIOError:
                break
            except OSError:
                for payload, number, offender in errors(self.file):
                    flight = self._sender(payload)
                    if flight is not None:
                        flight.fail(number, offender)
                        settled.append(flight.number)
                continue
            if self.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            flight = self._answered(data, str(peer[0]).partition("%")[0])
            if flight is not None:
                settled.append(flight.number)
        return settled

    def _sender(self, payload: bytes) -> Flight | None:
        """Whose packet an ICMP error quotes."""
        if len(payload) < 8:
            return None
        label = struct.unpack_from(">H", payload, 0 if self.protocol == "SCTP" else 4)[0]
        return self.flights.get(label)

    def _answered(self, data: bytes, peer: str) -> Flight | None:
        if self.protocol == "ICMP":
            if len(data) < 8 or data[0] != _ECHO[self.family][1]:
                return None
            flight = self.flights.get(struct.unpack_from(">H", data, 4)[0])
            if flight is not None:
                flight.answer(self.fabric.owner(peer))
            return flight
        packet = sctp.decode(data)
        flight = self.flights.get(packet.port) if packet else None
        if packet is None or flight is None or packet.verification != packet.port << 8 | 1:
            return None
        if packet.kind == sctp.ABORT:
            flight.answer(None, "refused")
        elif packet.kind == sctp.INIT_ACK:
            flight.answer(packet.cookie.decode(errors="replace"))
            self._hang_up(packet, flight)
        return flight

    def _hang_up(self, packet: sctp.Packet, flight: Flight) -> None:
        # So that conntrack forgets the association, and the server's answers are not repeated.
        abort = sctp.Packet(packet.port, packet.source_port, packet.tag, sctp.ABORT).encode()
        try:
            self.file.sendmsg([abort], _source(flight.asked), 0, (flight.asked.dst_address, 0))
        except OSError:
            return


def depart(
    number: int,
    asked: Probe,
    shared: dict[tuple[str, str, socket.AddressFamily], Shared],
    fabric: Fabric,
    timeout: float,
) -> Flight:
    """Send a probe's first packet; the thread must be in the source's namespace.

    The flight has its outcome already when the kernel refused to send. Raw sockets are kept in `shared`.
    """
    family = socket.AF_INET6 if ":" in asked.dst_address else socket.AF_INET
    flight = Flight(number, asked, None, timeout)
    try:
        if asked.protocol in ("TCP", "UDP"):
            _connect(flight, family)
        else:
            place = (asked.src, asked.protocol, family)
            if place not in shared:
                shared[place] = Shared(_raw(asked.protocol, family), asked.protocol, family, fabric)
            flight.carrier = shared[place]
            shared[place].send(flight)
    except OSError as trouble:
        flight.fail(trouble.errno or 0, None)
    return flight


def errors(made: socket.socket) -> Iterator[tuple[bytes, int, str | None]]:
    """The ICMP errors that wait at a socket: the packet they quote, the errno, who sent them."""
    while True:
        try:
            data, extra, _, _ = made.recvmsg(512, 512, _MSG_ERRQUEUE)
        except OSError:
            return
        for _, _, text in extra:
            if len(text) < 16:
                continue
            number, origin = struct.unpack_from("=IB", text)
            offender = None
            if origin in _ORIGIN_ICMP and len(text) >= 32:
                version = struct.unpack_from("=H", text, 16)[0]
                if version == socket.AF_INET:
                    offender = socket.inet_ntop(version, text[20:24])
                elif version == socket.AF_INET6 and len(text) >= 40:
                    offender = socket.inet_ntop(version, text[24:40])
            yield data, number, offender


def _connect(flight: Flight, family: socket.AddressFamily) -> None:
    asked = flight.asked
    kind = socket.SOCK_STREAM if asked.protocol == "TCP" else socket.SOCK_DGRAM
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    flight.own = made
    _report_errors(made, family)
    if asked.protocol == "UDP":
        for number in _numbers:
            try:
                made.bind((asked.source_address or "", 32768 + number % 28000))
                break
            except OSError as trouble:
                if trouble.errno != errno.EADDRINUSE:
                    raise
    elif asked.source_address:
        made.bind((asked.source_address, 0))
    trouble_number = made.connect_ex((asked.dst_address, asked.port))
    if trouble_number not in (0, errno.EINPROGRESS):
        flight.fail(trouble_number, next((origin for _, _, origin in errors(made)), None))
    elif asked.protocol == "UDP":
        made.send(os.urandom(8))


def _raw(protocol: Protocol, family: socket.AddressFamily) -> socket.socket:
    if protocol == "SCTP":
        number = sctp.PROTOCOL
    else:
        number = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, number)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    _report_errors(made, family)
    return made


def _report_errors(made: socket.socket, family: socket.AddressFamily) -> None:
    if family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)


def _source(asked: Probe) -> list[tuple[int, int, bytes]]:
    """The control message that has a raw packet leave from a chosen address."""
    if asked.source_address is None:
        return []
    if ":" in asked.source_address:
        address = socket.inet_pton(socket.AF_INET6, asked.source_address)
        return [(socket.IPPROTO_IPV6, 50, address + bytes(4))]
    address = socket.inet_pton(socket.AF_INET, asked.source_address)
    return [(socket.IPPROTO_IP, 8, struct.pack("=i4s4s", 0, address, address))]


def _echo(kind: int, label: int) -> bytes:
    body = struct.pack(">HH", label, 1) + b"netpol-agent lab"
    if kind == 128:  # the kernel fills in ICMPv6's checksum
        return struct.pack(">BBH", kind, 0, 0) + body
    words = struct.unpack(f">{(len(body) + 4) // 2}H", struct.pack(">BBH", kind, 0, 0) + body)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    total += total >> 16
    return struct.pack(">BBHHH", kind, 0, ~total & 0xFFFF, label, 1) + body[4:]
