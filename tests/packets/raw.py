"""Packets that no socket would send: made by hand, and watched for at the other end."""

from __future__ import annotations

import os
import select
import socket
import struct
import time

from agent.lab.fabric import Fabric
from agent.lab.flights import errors

WAIT = {False: 0.25, True: 3.0}
"""Seconds until silence is believed, by whether an answer is expected: the lab answers within milliseconds."""
ACK = 0x10
NUMBERS = {(name, version): number for name, number in (("TCP", 6), ("any", 253)) for version in (4, 6)}
NUMBERS |= {("ICMP", 4): socket.IPPROTO_ICMP, ("ICMP", 6): socket.IPPROTO_ICMPV6}
"""By name and family; 253 is a protocol for experiments."""


def arrives(
    fabric: Fabric,
    source: tuple[str, str],
    destination: tuple[str, str],
    protocol: int,
    data: bytes,
    *,
    expected: bool,
) -> bool:
    """Send one packet from (end, address) to (end, address); whether it, and not just any, is seen there."""
    version = socket.AF_INET6 if ":" in source[1] else socket.AF_INET
    with fabric.inside(destination[0]):
        receiver = socket.socket(version, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    with fabric.inside(source[0]):
        sender = socket.socket(version, socket.SOCK_RAW, protocol)
    with receiver, sender:
        sender.bind((source[1], 0))
        sender.sendto(data, (destination[1], 0))
        deadline = time.monotonic() + WAIT[expected]
        while (left := deadline - time.monotonic()) > 0:
            if select.select([receiver], [], [], left)[0]:
                seen = receiver.recv(65536)
                if seen[(seen[0] & 15) * 4 if version == socket.AF_INET else 0 :] == data:
                    return True
        return False


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    words = struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(source: str, destination: str, protocol: int, length: int) -> bytes:
    """What a transport checksum covers beside its own packet."""
    version = socket.AF_INET6 if ":" in source else socket.AF_INET
    ends = socket.inet_pton(version, source) + socket.inet_pton(version, destination)
    if version == socket.AF_INET:
        return ends + struct.pack(">BBH", 0, protocol, length)
    return ends + struct.pack(">IHBB", length, 0, 0, protocol)


def tcp(source: str, destination: str, port: int, flags: int) -> bytes:
    """A TCP segment of no connection, with a right checksum."""
    numbers = struct.unpack(">II", os.urandom(8))
    own = 40000 + numbers[0] % 20000
    head = struct.pack(">HHIIBBHHH", own, port, *numbers, 5 << 4, flags, 1024, 0, 0)
    right = checksum(pseudo_header(source, destination, socket.IPPROTO_TCP, len(head)) + head)
    return head[:16] + struct.pack(">H", right) + head[18:]


def unreachable(source: str, destination: str) -> bytes:
    """An ICMP error: port unreachable, quoting a UDP datagram that the destination never sent."""
    udp = struct.pack(">HHHH", 40000, 4444, 16, 0) + os.urandom(8)
    if ":" in source:
        head = struct.pack(">IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64)
        head += socket.inet_pton(socket.AF_INET6, destination) + socket.inet_pton(socket.AF_INET6, source)
        body = struct.pack(">BBHI", 1, 4, 0, 0) + head + udp
        right = checksum(pseudo_header(source, destination, socket.IPPROTO_ICMPV6, len(body)) + body)
    else:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0)
        head += socket.inet_aton(destination) + socket.inet_aton(source)
        head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
        body = struct.pack(">BBHI", 3, 3, 0, 0) + head + udp
        right = checksum(body)
    return body[:2] + struct.pack(">H", right) + body[4:]


def expires(fabric: Fabric, source: str, address: str, port: int, hops: int) -> str | None:
    """Send a datagram that lives for so many hops; who says that it has expired."""
    with fabric.inside(source):
        made = _udp(address)
    with made:
        if ":" in address:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
            made.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
        else:
            made.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
            made.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        made.connect((address, port))
        made.send(b"?")
        watch = select.poll()
        watch.register(made, 0)
        watch.poll(1000)
        return next((offender for _, _, offender in errors(made)), None)


def large_datagram(fabric: Fabric, source: str, address: str, port: int, *, expected: bool) -> bool:
    """Whether a datagram in three fragments is answered by the lab's server, which sends it back."""
    with fabric.inside(source):
        made = _udp(address)
    with made:
        made.connect((address, port))
        data = os.urandom(4000)
        made.send(data)
        ready, _, _ = select.select([made], [], [], WAIT[expected])
        return bool(ready) and made.recv(65536).endswith(data)


def active_ftp(fabric: Fabric, client: tuple[str, str], server: tuple[str, str], *, expected: bool) -> bool:
    """A control connection in which the client names a port, and the server's connection to it: is that let in?"""
    version = socket.AF_INET6 if ":" in client[1] else socket.AF_INET
    with fabric.inside(server[0]):
        listener = socket.create_server((server[1], 21), family=version)
        data = socket.socket(version)
    with fabric.inside(client[0]):
        waiting = socket.create_server((client[1], 0), family=version)
        control = socket.create_connection((server[1], 21), timeout=2)
    talk, _ = listener.accept()
    with listener, waiting, control, talk, data:
        port = waiting.getsockname()[1]
        # The helper looks for a command behind the end of a line that it has seen.
        for line in ("USER lab", _port_command(client[1], port)):
            control.sendall(f"{line}\r\n".encode())
            talk.settimeout(2)
            talk.recv(1000)
        data.settimeout(WAIT[expected])
        try:
            data.connect((client[1], port))
        except TimeoutError:
            return False
        return True


def _port_command(address: str, port: int) -> str:
    if ":" in address:
        return f"EPRT |2|{address}|{port}|"
    return f"PORT {address.replace('.', ',')},{port >> 8},{port & 255}"


def _udp(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
