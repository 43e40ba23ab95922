"""What the kernel holds of ours, as read back or as last written: the mirror that deltas are made against."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton

from agent.core.addresses import V4, Address, Prefix, parse_address
from agent.core.policy import EGRESS, INGRESS
from agent.core.rules import Member, SetKind
from agent.dataplane.render import BUCKETS, JUMP, bucket_name, is_ours

CanonicalRule = tuple[str, ...]


@dataclass
class AppliedSet:
    """A set in the kernel. `odd` when it or a member has an option that ours have not: timeout, nomatch, netmask …"""

    kind: str
    family: int
    maxelem: int
    members: set[Member] = field(default_factory=set)
    odd: bool = False


@dataclass
class AppliedTable:
    """Our chains in the filter table of one family.

    `jumps` are the rules in FORWARD that jump to us, as printed; `first` whether exactly one does, and comes first.
    `strays` are rules of other chains that lead into ours."""

    chains: dict[str, tuple[CanonicalRule, ...]] = field(default_factory=dict)
    jumps: list[str] = field(default_factory=list)
    first: bool = False
    strays: list[str] = field(default_factory=list)


@dataclass
class Applied:
    """All of ours in this network namespace, on one backend."""

    sets: dict[str, AppliedSet] = field(default_factory=dict)
    tables: dict[int, AppliedTable] = field(default_factory=dict)


def canonical(rule: str) -> CanonicalRule:
    """A rule without what differs between what is written and what `iptables-save` prints of it.

    Order of matches, implied `-m`, full masks, address spelling, quotes and names of ICMPv6 types all differ."""
    tokens = _TOKEN.findall(rule)
    items = []
    negated = ""
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token == "!":
            negated = "! "
            continue
        values = []
        while position < len(tokens) and tokens[position] != "!" and not _is_option(tokens[position]):
            values.append(tokens[position])
            position += 1
        if token != "-m" or not _MATCHES.issuperset(values):
            items.append(f"{negated}{token} {_canonical_value(token, ' '.join(values))}")
        negated = ""
    return tuple(sorted(items))


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_MATCHES = {"comment", "conntrack", "icmp6", "multiport", "physdev", "pkttype", "sctp", "set", "tcp", "udp"}
"""Matches that our rules use; each shows by its options. One more, even without options, makes another rule."""


def _is_option(token: str) -> bool:
    return len(token) > 1 and token[0] == "-" and not token[1].isdigit()


_PROTOCOLS = {"1": "icmp", "6": "tcp", "17": "udp", "58": "ipv6-icmp", "icmpv6": "ipv6-icmp", "132": "sctp"}
_ICMP6 = {
    "router-solicitation": "133",
    "router-advertisement": "134",
    "neighbour-solicitation": "135",
    "neighbor-solicitation": "135",
    "neighbour-advertisement": "136",
    "neighbor-advertisement": "136",
    "redirect": "137",
}


def _canonical_value(option: str, value: str) -> str:
    if option in ("-s", "-d"):
        return _canonical_address(value)
    if option == "--comment":
        return value.strip('"')
    if option == "-p":
        return _PROTOCOLS.get(value, value)
    if option == "--icmpv6-type":
        return _ICMP6.get(value, value)
    return value


@lru_cache(maxsize=4096)
def _canonical_address(text: str) -> str:
    address, _, mask = text.partition("/")
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return text  # no address: the word behind an unquoted comment
    if not mask or mask == str(number.max_prefixlen):
        return str(number)
    return f"{number}/{mask if mask.isdigit() else ipaddress.ip_address(mask)}"


CANONICAL_JUMP = canonical(JUMP)


def parse_save(lines: Iterable[str]) -> AppliedTable:
    """Our part of what `iptables-save -t filter` prints; lines without NPA- or a rule of FORWARD may be missing."""
    table = AppliedTable()
    rules: dict[str, list[CanonicalRule]] = {}
    forward: list[str] = []
    for line in lines:
        if line.startswith("-A FORWARD "):
            forward.append(line.removeprefix("-A FORWARD "))
        elif "NPA-" not in line:
            continue
        elif line.startswith(":"):
            name = line[1:].partition(" ")[0]
            if is_ours(name):
                rules.setdefault(name, [])
        elif line.startswith("-A "):
            name, _, rule = line[3:].partition(" ")
            if is_ours(name):
                rules.setdefault(name, []).append(canonical(rule))
            elif _leads_to_us(rule):
                table.strays.append(line)
    table.chains = {name: tuple(chain) for name, chain in rules.items()}
    table.jumps = [rule for rule in forward if "NPA-" in rule and _leads_to_us(rule)]
    table.first = len(table.jumps) == 1 and forward[0] == table.jumps[0] and canonical(forward[0]) == CANONICAL_JUMP
    return table


def _leads_to_us(rule: str) -> bool:
    return any(item[:3] in ("-j ", "-g ") and is_ours(item[3:]) for item in canonical(rule))


def parse_ipset_save(lines: Iterable[str]) -> dict[str, AppliedSet]:
    """Our part of what `ipset save` prints; lines that do not hold our prefix may be missing."""
    sets: dict[str, AppliedSet] = {}
    for line in lines:
        verb, _, rest = line.partition(" ")
        if not _OURS.match(rest):
            continue
        name, first, *words = rest.split(" ")
        if verb == "add":
            held = sets[name]
            held.members.add(_parse_member(held, first))
            held.odd |= bool(words)
        elif verb == "create":
            options = dict(zip(words[::2], words[1::2]))
            family = 6 if options.get("family") == "inet6" else V4
            odd = not _CREATE_OPTIONS.issuperset(words[::2])
            sets[name] = AppliedSet(first, family, 0 if odd else int(options["maxelem"]), odd=odd)
    return sets


_OURS = re.compile(r"npa(?:4|6|-t)-")
_CREATE_OPTIONS = {"family", "hashsize", "maxelem", "bucketsize", "initval"}


def _parse_member(held: AppliedSet, entry: str) -> Member:
    inet = AF_INET if held.family == V4 else AF_INET6
    if held.kind == SetKind.IP.value:
        return inet_pton(inet, entry)
    if held.kind == SetKind.IP_PORT.value:
        address, _, port = entry.partition(",")
        protocol, _, number = port.partition(":")
        return inet_pton(inet, address), protocol.upper(), int(number)
    if held.kind == SetKind.NET.value:
        address, _, length = entry.partition("/")
        packed = parse_address(address)
        return Prefix(held.family, int.from_bytes(packed, "big"), int(length) if length else len(packed) * 8)
    return entry.encode()  # a set of ours in a form that is not: its header differs, so it is replaced


def canonical_chain(rules: Iterable[str]) -> tuple[CanonicalRule, ...]:
    """The rules of a chain, comparable with what was read back."""
    return tuple(canonical(rule) for rule in rules)


def dispatched(table: AppliedTable) -> dict[Address, str]:
    """The addresses that the buckets in the kernel dispatch, with the pods that their comments name."""
    found: dict[Address, str] = {}
    for direction, own in ((EGRESS, "-s "), (INGRESS, "-d ")):
        for number in range(BUCKETS):
            for rule in table.chains.get(bucket_name(direction, number), ()):
                address = next((item[len(own) :] for item in rule if item.startswith(own)), "")
                pods = next((item[len("--comment ") :] for item in rule if item.startswith("--comment ")), None)
                if pods is not None:
                    with suppress(ValueError):  # somebody's rule, for a block or nothing
                        found[parse_address(address)] = pods
    return found
