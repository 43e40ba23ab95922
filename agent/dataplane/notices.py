"""Notices of nf_tables: the kernel tells at once when somebody changes our chains, or puts a rule into FORWARD.

A notice does not say reliably whose work it was (process numbers are those of the host, not of a container). But each
transaction that changes a table ends with one message of its own, and we know how many we made.
There are no notices from ipset, nor from legacy iptables: what changes there is found by looking.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from agent.dataplane.netlink import NETLINK_NETFILTER, attributes
from agent.dataplane.render import is_ours

GROUP = 1 << (7 - 1)
"""NFNLGRP_NFTABLES."""
SUBSYSTEM = 10
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, DELETE_CHAIN, NEW_RULE, DELETE_RULE, NEW_GENERATION = 0, 2, 3, 5, 6, 8, 15
TABLE, RULE_CHAIN, CHAIN_NAME = 1, 2, 3
_CHAIN = {NEW_CHAIN: CHAIN_NAME, DELETE_CHAIN: CHAIN_NAME, NEW_RULE: RULE_CHAIN, DELETE_RULE: RULE_CHAIN}
_INET = (socket.AF_INET, socket.AF_INET6)
_RECEIVE = 1 << 20
_BUFFER = 4 << 20


class Notices:
    """Of the network namespace in which it is made; `fileno` is readable when something was told."""

    def __init__(self) -> None:
        """Raises OSError where the kernel has no nf_tables, or does not let us listen."""
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            self._netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._netlink.bind((0, GROUP))
            self._netlink.setblocking(False)
        except OSError:
            self._netlink.close()
            raise
        self._concerned = False  # whether the transaction that is being told touches us

    def fileno(self) -> int:
        return self._netlink.fileno()

    def close(self) -> None:
        self._netlink.close()

    def transactions(self) -> int | None:
        """How many transactions that touch us were told since the last time; None when some were lost."""
        number = 0
        while True:
            try:
                data = self._netlink.recv(_RECEIVE)
            except BlockingIOError:
                return number
            except OSError:  # ENOBUFS: more was told than we could take
                while self._drop():
                    pass
                return None
            for kind, inet, body in _messages(data):
                if kind == NEW_GENERATION:
                    number += self._concerned
                    self._concerned = False
                elif not self._concerned:
                    self._concerned = inet in _INET and _concerns_us(kind, body)

    def _drop(self) -> bool:
        try:
            self._netlink.recv(_RECEIVE)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(kind, family, attributes) of each message about nf_tables."""
    position = 0
    while position + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, position)
        if length < 20:
            return
        if kind >> 8 == SUBSYSTEM:
            yield kind & 0xFF, data[position + 16], data[position + 20 : position + length]
        position += (length + 3) & ~3


def _concerns_us(kind: int, body: bytes) -> bool:
    if kind in (NEW_TABLE, DELETE_TABLE):
        return kind == DELETE_TABLE and _text(body, TABLE) == "filter"
    if kind not in _CHAIN or _text(body, TABLE) != "filter":
        return False
    chain = _text(body, _CHAIN[kind])
    return chain == "FORWARD" or is_ours(chain)


def _text(body: bytes, wanted: int) -> str:
    value = next((value for kind, value in attributes(body) if kind == wanted), b"")
    return value.rstrip(b"\0").decode(errors="replace")
