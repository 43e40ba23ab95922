"""Addresses and blocks of addresses, read as the API server reads them, and exact arithmetic on blocks.

An address is packed: 4 bytes for IPv4, 16 for IPv6, so that its length is its family.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

Address = bytes
V4, V6 = 4, 6
FAMILIES = (V4, V6)
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")


def parse_address(text: str) -> Address:
    """The packed form of a pod's or host's address. Raises ValueError when it is none (zones are none either)."""
    if ":" not in text:
        return _parse_v4(text).to_bytes(4, "big")
    if "%" in text:
        raise ValueError("has a zone")
    address = ipaddress.IPv6Address(text)
    return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed


def format_address(address: Address) -> str:
    """The canonical text of a packed address."""
    if len(address) == 4:
        return ".".join(map(str, address))
    return str(ipaddress.IPv6Address(address))


def is_assignable(address: Address) -> bool:
    """Whether a pod could have it: not empty, unspecified, multicast or broadcast. No set takes the unspecified one."""
    return any(address) and not (address[0] == 0xFF if len(address) == 16 else address[0] >= 224 or address[0] == 0)


def family(address: Address) -> int:
    """4 or 6."""
    return V4 if len(address) == 4 else V6


class Prefix(NamedTuple):
    """A block of addresses without host bits: family (4 or 6), network as a number, length in bits."""

    family: int
    network: int
    length: int

    @property
    def bits(self) -> int:
        return 32 if self.family == V4 else 128

    @property
    def last(self) -> int:
        return self.network | ((1 << (self.bits - self.length)) - 1)

    def holds(self, address: Address) -> bool:
        """Whether the address lies inside; never across families (semantics.md line 21)."""
        if len(address) * 8 != self.bits:
            return False
        return int.from_bytes(address, "big") >> (self.bits - self.length) == self.network >> (self.bits - self.length)

    def __str__(self) -> str:
        return f"{format_address(self.network.to_bytes(self.bits // 8, 'big'))}/{self.length}"


def parse_block(text: str) -> Prefix:
    """Read `cidr` or `except` as Go's ParseCIDRSloppy does (semantics.md line 19).

    Leading zeros are decimal, IPv4-mapped IPv6 blocks of 96 bits and more are IPv4, host bits are masked.
    Raises ValueError for anything else: bare addresses, netmasks, zones, blanks, signs.
    """
    head, slash, tail = text.partition("/")
    if not slash:
        raise ValueError("has no prefix length")
    if not tail or not set(tail) <= _DIGITS or len(tail) > 7:
        raise ValueError("has an unreadable prefix length")
    length = int(tail)
    number, bits = _parse_ip(head)
    if length > bits:
        raise ValueError(f"has a prefix length above {bits}")
    if bits == 128 and length >= 96 and number >> 32 == 0xFFFF:
        number, bits, length = number & 0xFFFFFFFF, 32, length - 96
    mask = ((1 << length) - 1) << (bits - length)
    return Prefix(V4 if bits == 32 else V6, number & mask, length)


def _parse_ip(text: str) -> tuple[int, int]:
    for char in text:
        if char == ".":
            return _parse_v4(text), 32
        if char == ":":
            return _parse_v6(text), 128
    raise ValueError("has no readable address")


def _parse_v4(text: str) -> int:
    parts = text.split(".")
    number = 0
    if len(parts) != 4:
        raise ValueError("has no readable address")
    for part in parts:
        if not part or not set(part) <= _DIGITS or int(part) > 255:
            raise ValueError("has no readable address")
        number = number << 8 | int(part)
    return number


def _parse_v6(text: str) -> int:
    head, ellipsis, tail = text.partition("::")
    if "::" in tail or tail.startswith(":"):
        raise ValueError("has no readable address")
    left = _groups(head, last=not ellipsis)
    right = _groups(tail, last=True)
    if (len(left) + len(right) != 8) if not ellipsis else (len(left) + len(right) > 7):
        raise ValueError("has no readable address")
    number = 0
    for group in left + [0] * (8 - len(left) - len(right)) + right:
        number = number << 16 | group
    return number


def _groups(text: str, *, last: bool) -> list[int]:
    if not text:
        return []
    groups: list[int] = []
    parts = text.split(":")
    for index, part in enumerate(parts):
        if "." in part and last and index == len(parts) - 1:
            v4 = _parse_v4(part)
            groups += [v4 >> 16, v4 & 0xFFFF]
        elif part and set(part) <= _HEX and int(part, 16) <= 0xFFFF:
            groups.append(int(part, 16))
        else:
            raise ValueError("has no readable address")
    return groups


def is_strict_subset(inner: Prefix, outer: Prefix) -> bool:
    """Whether `inner` lies in `outer` and is smaller: what an `except` has to be (semantics.md line 48)."""
    return inner.family == outer.family and inner.length > outer.length and outer.network <= inner.network <= outer.last


def reduce_blocks(blocks: Iterable[tuple[Prefix, tuple[Prefix, ...]]]) -> tuple[Prefix, ...]:
    """The exact union of (block minus its own excepts), as the fewest prefixes, sorted.

    One block's except never cuts another block (semantics.md line 18).
    """
    spans: list[tuple[int, int, int]] = []
    for block, excepts in blocks:
        start = block.network
        for cut in sorted(excepts):
            if cut.network > start:
                spans.append((block.family, start, cut.network - 1))
            start = max(start, cut.last + 1)
        if start <= block.last:
            spans.append((block.family, start, block.last))
    merged: list[tuple[int, int, int]] = []
    for version, first, last in sorted(spans):
        if merged and merged[-1][0] == version and first <= merged[-1][2] + 1:
            merged[-1] = (version, merged[-1][1], max(last, merged[-1][2]))
        else:
            merged.append((version, first, last))
    return tuple(prefix for span in merged for prefix in _cover(*span))


def _cover(version: int, first: int, last: int) -> Iterable[Prefix]:
    bits = 32 if version == V4 else 128
    while first <= last:
        align = bits if first == 0 else (first & -first).bit_length() - 1
        size = min(align, (last - first + 1).bit_length() - 1)
        yield Prefix(version, first, bits - size)
        first += 1 << size
