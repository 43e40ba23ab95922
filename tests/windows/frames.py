"""Ethernet frames that open a connection, each with a mark that counters can read."""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_pton

Probe = tuple[str, str, str, int | None]
"""Source and destination address, protocol, port."""

MARK_AT = 8
"""Where the 32-bit mark is, counted from the transport header, whatever the protocol: `@th,64,32` for nft.

In UDP and echo requests it is the first payload; in a SYN the number that it acknowledges, which means nothing
there; in an INIT the checksum, which conntrack is told not to look at."""
PORT_AT = 0
ECHO_ID_AT = 4
_NUMBER = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132}


def frame(to: bytes, probe: Probe, mark: int) -> tuple[bytes, int]:
    """The frame to a hardware address, and where in it the 16 bits are that make it a new connection."""
    source, destination, protocol, port = probe
    segment, varies = _segment(protocol, port or 0, mark)
    number = _NUMBER[protocol]
    if ":" in source:
        addresses = inet_pton(AF_INET6, source) + inet_pton(AF_INET6, destination)
        header = struct.pack("!IHBB", 6 << 28, len(segment), number, 64) + addresses
        kind = 0x86DD
    else:
        addresses = inet_pton(AF_INET, source) + inet_pton(AF_INET, destination)
        start = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(segment), 0, 0x4000, 64, number)
        header = start + struct.pack("!H", _checksum(start + b"\0\0" + addresses)) + addresses
        kind = 0x0800
    whole = to + bytes.fromhex("020000000001") + struct.pack("!H", kind) + header
    return whole + segment, len(whole) + varies


def _segment(protocol: str, port: int, mark: int) -> tuple[bytes, int]:
    """The transport part, and where its varying 16 bits are. Checksums are 0: nobody looks at them."""
    match protocol:
        case "UDP":
            return struct.pack("!HHHHI", 0, port, 12, 0, mark), PORT_AT
        case "TCP":
            return struct.pack("!HHIIHHHH", 0, port, 1, mark, 5 << 12 | 2, 1024, 0, 0), PORT_AT
        case "SCTP":
            chunk = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)
            return struct.pack("!HHII", 0, port, 0, mark) + chunk, PORT_AT
        case "ICMP" | "ICMPv6":
            kind = 8 if protocol == "ICMP" else 128
            return struct.pack("!BBHHHI", kind, 0, 0, 0, 1, mark), ECHO_ID_AT
    raise ValueError(protocol)


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
