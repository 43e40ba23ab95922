"""A network namespace as other programs see it, and what they do to it. Shares nothing with the agent."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.tracer import Sets, Tables

NETLINK_NETFILTER = 12
BACKENDS = ("nft", "legacy")
FAMILIES = (4, 6)
BASE = {4: "iptables", 6: "ip6tables"}
OURS = re.compile(r"npa(4|6|-t)-")
_STAMP = re.compile(r"^#.*\n|\[\d+:\d+\]", re.MULTILINE)


def run(*command: str, text: str = "", fine: bool = False) -> str:
    """What a command prints; what it complains of is the test's failure, or with `fine` no matter."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode and not fine:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr or done.stdout}\n{text}")
    return done.stdout


class Kernel:
    """Sets, and on one backend the filter and nat tables of both families."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._marks: dict[int, set[tuple[str, str]]] = {}

    def iptables(self, version: int, *words: str, fine: bool = False) -> str:
        return run(f"{BASE[version]}-{self.backend}", "-w", "5", *words, fine=fine)

    def restore(self, version: int, text: str, *options: str) -> None:
        run(f"{BASE[version]}-{self.backend}-restore", "-w", "5", *options, text=text)

    def save(self, version: int, *options: str, table: str = "filter") -> str:
        return run(f"{BASE[version]}-{self.backend}-save", "-t", table, *options)

    def rules(self, version: int, *lines: str, table: str = "filter") -> None:
        """Lines for `iptables-restore --noflush`."""
        self.restore(version, "\n".join([f"*{table}", *lines, "COMMIT", ""]), "--noflush")

    def ipset(self, *words: str, fine: bool = False) -> str:
        return run("ipset", *words, fine=fine)

    def saved_sets(self) -> str:
        return run("ipset", "save")

    def sets(self) -> Sets:
        sets = Sets()
        sets.apply_restore(self.saved_sets())
        return sets

    def tables(self, version: int) -> Tables:
        return Tables.parse(self.save(version))

    def everything(self) -> dict[str, Any]:
        """All that is here as text without order of sets, counters, comments and empty tables."""
        found: dict[str, Any] = {"sets": {n: (s.create_options, s.members) for n, s in self.sets().items()}}
        for version in FAMILIES:
            for table in ("filter", "nat"):
                text = _STAMP.sub("", self.save(version, table=table))
                lines = [line for line in text.splitlines() if not re.match(r":[A-Z]+ ACCEPT|\*|COMMIT", line)]
                chains = {line for line in lines if line.startswith(":")}
                found[f"IPv{version} {table}"] = sorted(chains) + [line for line in lines if line not in chains]
        return found

    def ours(self) -> dict[str, Any]:
        """What of all that has our names."""
        return ours_of(self.sets(), {version: self.tables(version) for version in FAMILIES})

    def mark(self) -> None:
        """Begin to watch which rules are written again; what they say does not matter."""
        for version in FAMILIES if self.backend == "legacy" else ():
            marked = re.sub(r"^-A ", "[7:7] -A ", self.save(version), flags=re.MULTILINE)
            self.restore(version, marked, "--counters")
        self._marks = {version: self._identities(version) for version in FAMILIES}

    def rewritten(self) -> set[str]:
        """The chains that got a rule since `mark`, as "4 NPA-FORWARD"; a chain that only lost some does not count."""
        found = set()
        for version in FAMILIES:
            for chain, identity in self._identities(version):
                if (chain, identity) not in self._marks[version] or identity == "[0:0]":
                    found.add(f"{version} {chain}")
        return found

    def _identities(self, version: int) -> set[tuple[str, str]]:
        """Each rule's chain, and what it does not keep when it is written again: nft's handle, legacy's counter."""
        if self.backend == "legacy":
            rules = [line.split()[:3] for line in self.save(version, "-c").splitlines() if line.startswith("[")]
            return {(chain, counter) for counter, _, chain in rules}
        table = ("table", "ip" if version == 4 else "ip6", "filter")
        listed = json.loads(run("nft", "-a", "-j", "list", *table))["nftables"]
        return {(item["rule"]["chain"], str(item["rule"]["handle"])) for item in listed if "rule" in item}


def ours_of(sets: Sets, tables: Mapping[int, Tables]) -> dict[str, Any]:
    """Sets, chains and jumps with our names, comparable wherever they were read from."""
    found: dict[str, Any] = {n: (s.create_options, s.members) for n, s in sets.items() if OURS.match(n)}
    for version in FAMILIES:
        chains = tables[version].chains
        found |= {f"IPv{version} {name}": rules for name, rules in chains.items() if name.startswith("NPA-")}
        found[f"IPv{version} jumps"] = [
            (chain, number, rule)
            for chain, rules in chains.items()
            for number, rule in enumerate(rules)
            if rule.target.chain.startswith("NPA-") and not chain.startswith("NPA-")
        ]
    return found


def generation() -> int:
    """How many transactions nf_tables has seen in this namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        get_generation = 10 << 8 | 16
        netlink.send(struct.pack("=IHHIIBBH", 20, get_generation, 1, 1, 0, 0, 0, 0))
        answer = netlink.recv(4096)
    length, kind = struct.unpack_from("=HH", answer, 20)
    assert (length, kind) == (8, 1), answer
    return int(struct.unpack_from(">I", answer, 24)[0])


@dataclass
class Doings:
    """The programs that this process starts and the netlink sockets that it opens, as the interpreter tells them."""

    programs: list[str] = field(default_factory=list)
    sockets: int = 0

    @property
    def writes(self) -> list[str]:
        return [program for program in self.programs if not re.match(r"\S+save( |$)|ipset save$", program)]


_watched: list[Doings] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        for doings in _watched:
            doings.programs.append(" ".join(w.decode() if isinstance(w, bytes) else str(w) for w in arguments[1]))
    elif event == "socket.__new__" and arguments[1] == socket.AF_NETLINK:
        for doings in _watched:
            doings.sockets += 1


sys.addaudithook(_audit)


class watched:
    """`with watched() as doings:` tells what the block does."""

    def __enter__(self) -> Doings:
        self.doings = Doings()
        _watched.append(self.doings)
        return self.doings

    def __exit__(self, *_: object) -> None:
        _watched.remove(self.doings)
