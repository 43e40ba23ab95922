"""Connections of addresses that changed hands, taken out of the kernel's connection table.

Raw netlink: one dump whatever the number of addresses and families, since the kernel walks its whole table for each.
Messages are searched for the addresses' bytes before anything is decoded, and an entry is deleted by the very tuple
that the kernel sent. (pyroute2 decodes every entry, 100 µs each; the kernel's own filter for the reply direction is
broken before 6.10.)
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from errno import ENOENT

from agent.core.addresses import Address, family
from agent.dataplane.errors import refused
from agent.dataplane.netlink import NETLINK_NETFILTER, attributes

CTNETLINK = 1 << 8
GET, DELETE = CTNETLINK | 1, CTNETLINK | 2
REQUEST, ACK, DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ZONE = 1, 2, 3, 18
IPS_SEEN_REPLY = 2
CTA_TUPLE_IP = 1
SOURCES = (1, 3)
"""CTA_IP_V4_SRC and CTA_IP_V6_SRC."""
INET = {4: socket.AF_INET, 6: socket.AF_INET6}
_END = struct.pack("=IH", 20, NLMSG_DONE)
"""How the last message of a dump begins; it has 20 bytes."""


def forget(addresses: Iterable[Address], *, unanswered: bool = False) -> int:
    """Delete each entry whose original or reply source is one of the addresses; answers how many.

    The reply's source is the pod behind a Service, too. `unanswered` spares all but those that somebody sends to an
    address and that were never answered. Raises KernelError."""
    wanted = set(addresses)
    deleted = 0
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
            netlink.bind((0, 0))
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            for inet, entry in list(_entries(netlink, wanted, unanswered)):
                deleted += _delete(netlink, inet, entry)
    except OSError as error:
        raise refused("conntrack", error.strerror or str(error)) from error
    return deleted


def _entries(netlink: socket.socket, wanted: set[Address], unanswered: bool) -> Iterator[tuple[int, bytes]]:
    """Of each entry of these addresses the family, and what names it: its original tuple, and a zone if it has one."""
    families = {INET[family(address)] for address in wanted}
    inet = families.pop() if len(families) == 1 else socket.AF_UNSPEC
    netlink.send(_message(GET, REQUEST | DUMP, inet, b""))
    while True:
        data = netlink.recv(1 << 18)
        if data[-20:-14] != _END and data[4] != NLMSG_ERROR and not any(address in data for address in wanted):
            continue  # mostly: nothing in it is looked at
        offset = 0
        while offset < len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            body = data[offset + 20 : offset + length]  # behind the netlink and the nfgen headers
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, offset + 16)[0]
                raise OSError(code, f"{os.strerror(code)} (reading the connection table)")
            if any(address in body for address in wanted) and _is_wanted(body, wanted, unanswered):
                found = dict(attributes(body))
                names = (_attribute(k, found[k]) for k in (CTA_TUPLE_ORIG, CTA_ZONE) if k in found)
                yield data[offset + 16], b"".join(names)
            offset += (length + 3) & ~3


def _is_wanted(entry: bytes, wanted: set[Address], unanswered: bool) -> bool:
    found = dict(attributes(entry))
    if unanswered and int.from_bytes(found.get(CTA_STATUS, b""), "big") & IPS_SEEN_REPLY:
        return False
    tuples = (CTA_TUPLE_REPLY,) if unanswered else (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY)
    ends = [dict(attributes(found[key])).get(CTA_TUPLE_IP, b"") for key in tuples if key in found]
    return any(value in wanted for end in ends for kind, value in attributes(end) if kind in SOURCES)


def _delete(netlink: socket.socket, inet: int, entry: bytes) -> int:
    netlink.send(_message(DELETE, REQUEST | ACK, inet, entry))
    data = netlink.recv(1 << 16)
    code = -struct.unpack_from("=i", data, 16)[0]
    if code not in (0, ENOENT):
        raise OSError(code, f"{os.strerror(code)} (deleting from the connection table)")
    return int(code == 0)


def _message(kind: int, flags: int, inet: int, body: bytes) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, flags, 1, 0, inet, 0, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    nested = 0x8000 if kind == CTA_TUPLE_ORIG else 0
    return struct.pack("=HH", len(value) + 4, kind | nested) + value + b"\0" * (-len(value) % 4)
