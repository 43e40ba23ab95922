"""The SCTP packets of a handshake's first half, as bytes (RFC 9260): no kernel support is needed for them.

The checksum is right, since conntrack drops what has a wrong one from its sight.
"""

import struct
from dataclasses import dataclass

PROTOCOL = 132
INIT = 1
INIT_ACK = 2
ABORT = 6

_STATE_COOKIE = 7
_HEADER = struct.Struct(">HHI")
_CHUNK = struct.Struct(">BBH")
_INIT = struct.Struct(">IIHHI")


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_CRC = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class Packet:
    """A packet with one chunk: its ports, verification tag, chunk type; for INIT and INIT ACK the sender's
    tag, and for INIT ACK the cookie."""

    source_port: int
    port: int
    verification: int
    kind: int
    tag: int = 0
    cookie: bytes = b""

    def encode(self) -> bytes:
        """The bytes behind the IP header."""
        body = b""
        if self.kind in (INIT, INIT_ACK):
            body = _INIT.pack(self.tag, 65536, 1, 1, self.tag)
        if self.kind == INIT_ACK:
            size = 4 + len(self.cookie)
            body += struct.pack(">HH", _STATE_COOKIE, size) + self.cookie
        # The length leaves out the padding of the last parameter.
        chunk = _CHUNK.pack(self.kind, 0, 4 + len(body)) + body + b"\0" * (-len(body) % 4)
        header = _HEADER.pack(self.source_port, self.port, self.verification)
        return header + struct.pack("<I", crc32c(header + b"\0\0\0\0" + chunk)) + chunk


def decode(data: bytes) -> Packet | None:
    """The first chunk of a packet (without its IP header); None for what is too short or damaged."""
    if len(data) < 16 or struct.unpack_from("<I", data, 8)[0] != crc32c(data[:8] + b"\0\0\0\0" + data[12:]):
        return None
    source_port, port, verification = _HEADER.unpack_from(data)
    kind, _, length = _CHUNK.unpack_from(data, 12)
    if kind not in (INIT, INIT_ACK):
        return Packet(source_port, port, verification, kind)
    if length < 20 or len(data) < 12 + length:
        return None
    tag = _INIT.unpack_from(data, 16)[0]
    cookie = b""
    at, end = 32, 12 + length
    while at + 4 <= end:
        parameter, size = struct.unpack_from(">HH", data, at)
        if size < 4:
            break
        if parameter == _STATE_COOKIE:
            cookie = data[at + 4 : min(at + size, end)]
        at += size + -size % 4
    return Packet(source_port, port, verification, kind, tag, cookie)
