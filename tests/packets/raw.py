"""Packets that no socket would send: made by hand, and watched for at the other end."""

from __future__ import annotations

import os
import select
import socket
import struct
import time

from agent.lab.fabric import Fabric

WAIT = 0.25  # seconds: the lab answers within milliseconds
ACK = 0x10


def arrives(fabric: Fabric, source: tuple[str, str], destination: tuple[str, str], protocol: int, data: bytes) -> bool:
    """Send one packet from (end, address) to (end, address); whether it, and not just any, is seen there."""
    version = socket.AF_INET6 if ":" in source[1] else socket.AF_INET
    with fabric.inside(destination[0]):
        receiver = socket.socket(version, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    with fabric.inside(source[0]):
        sender = socket.socket(version, socket.SOCK_RAW, protocol)
    with receiver, sender:
        sender.bind((source[1], 0))
        sender.sendto(data, (destination[1], 0))
        deadline = time.monotonic() + WAIT
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
