"""Sets in the kernel: netlink for a few changes, one `ipset restore` for many, `ipset save` to read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import ENOENT
from functools import partial
from socket import AF_INET, AF_INET6, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP
from typing import Any

from pyroute2 import IPSet
from pyroute2.ipset import IPSetError, PortEntry

from agent.core.addresses import V4, format_address
from agent.core.rules import Member
from agent.dataplane.applied import AppliedSet, parse_ipset_save
from agent.dataplane.errors import KernelError, refused
from agent.dataplane.iptables import run_all, said, spawn
from agent.dataplane.plan import AddMembers, CreateSet, DeleteMembers, DestroySet, SwapSets
from agent.dataplane.render import HASHSIZE, MAXELEM, create_text, format_member

SetOperation = CreateSet | AddMembers | DeleteMembers | SwapSets | DestroySet

BULK = 6
"""From so many entries on, `ipset restore` is faster than netlink; measured by `make bench` (docs/benchmarks.md)."""
IPSET_ERR_HASH_FULL = 4352
_PROTOCOLS = {"TCP": IPPROTO_TCP, "UDP": IPPROTO_UDP, "SCTP": IPPROTO_SCTP}


class Ipset:
    """The sets of the network namespace in which it is made."""

    def __init__(self) -> None:
        self._netlink: Any = None

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def read(self) -> dict[str, AppliedSet]:
        """Our sets with their members. Raises KernelError."""
        return parse_ipset_save(self.save())

    @staticmethod
    def save() -> list[str]:
        """The lines of `ipset save` that are ours. Raises KernelError."""
        return [line for line in run_all([["ipset", "save"]])[0].splitlines() if " npa" in line]

    def write(self, operations: Sequence[SetOperation]) -> None:
        """Carry out operations in order. Raises KernelError; what was done before it stays."""
        entries = sum(len(o.members) if isinstance(o, AddMembers | DeleteMembers) else 1 for o in operations)
        if entries >= BULK:
            _restore(operations)
            return
        for operation in operations:
            self._one(operation)

    def _one(self, operation: SetOperation) -> None:
        netlink = self._open()
        match operation:
            case CreateSet(name, kind, version):
                form = {"stype": kind.value, "family": _inet(version), "hashsize": HASHSIZE, "maxelem": MAXELEM}
                self._ask(f"set {name}", partial(netlink.create, name, exclusive=False, **form))
            case AddMembers(name, kind, version, members) | DeleteMembers(name, kind, version, members):
                change = netlink.add if isinstance(operation, AddMembers) else netlink.delete
                etype = kind.value.partition(":")[2]
                for member in members:
                    what = f"set {name}, entry {format_member(member)}"
                    form = {"family": _inet(version), "exclusive": False, "etype": etype}
                    self._ask(what, partial(change, name, _entry(member), **form))
            case SwapSets(name, other):
                self._ask(f"sets {name} and {other}", lambda: netlink.swap(name, other))
            case DestroySet(name):
                self._ask(f"set {name}", lambda: netlink.destroy(name), missing_is_fine=True)

    def _open(self) -> Any:
        if self._netlink is None:
            try:
                self._netlink = IPSet()
            except (IPSetError, OSError) as error:
                raise refused("ipset", _words(error)) from error
        return self._netlink

    def _ask(self, what: str, call: Callable[[], object], *, missing_is_fine: bool = False) -> None:
        try:
            call()
        except (IPSetError, OSError) as error:
            if missing_is_fine and isinstance(error, IPSetError) and error.code == ENOENT:
                return
            raise refused(what, _words(error)) from error


def _words(error: Exception) -> str:
    if isinstance(error, IPSetError) and error.code == IPSET_ERR_HASH_FULL:
        return "the set is full"  # pyroute2 has no words for it
    return str(error.args[-1] if error.args else error)


def _inet(version: int) -> int:
    return AF_INET if version == V4 else AF_INET6


def _entry(member: Member) -> Any:
    if isinstance(member, tuple) and isinstance(member[0], bytes):
        address, protocol, number = member
        return format_address(address), PortEntry(number, protocol=_PROTOCOLS[str(protocol)])
    return (format_member(member),)


def _restore(operations: Sequence[SetOperation]) -> None:
    lines: list[str] = []
    for operation in operations:
        match operation:
            case CreateSet(name, kind, version):
                lines.append(create_text(name, kind, version))
            case AddMembers(name, _, _, members):
                lines += [f"add {name} {format_member(member)}" for member in members]
            case DeleteMembers(name, _, _, members):
                lines += [f"del {name} {format_member(member)}" for member in members]
            case SwapSets(name, other):
                lines.append(f"swap {name} {other}")
            case DestroySet(name):
                lines.append(f"destroy {name}")
    process = spawn(["ipset", "restore", "-exist"], "\n".join([*lines, ""]))
    _, errors = process.communicate()
    if process.returncode != 0:
        raise _refusal(lines, said(process, errors))


def _refusal(lines: list[str], errors: str) -> KernelError:
    number = errors.partition("line ")[2].partition(":")[0]
    line = lines[int(number) - 1] if number.isdigit() and 0 < int(number) <= len(lines) else ""
    return refused(f"ipset restore: {line}" if line else "ipset restore", errors)
