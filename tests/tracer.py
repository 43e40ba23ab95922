"""Walks one packet through iptables rules and ipsets that are given as text.

It judges what the agent renders, so it shares no code with it and never guesses: whatever it does not
know (a match, an option, a target, a type of set) raises `Unknown`; what the kernel or its tools would not
take raises `Refused`. Where the two iptables backends differ in what they take, the stricter one counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

__all__ = ["IpSet", "Packet", "Refused", "Rule", "Sets", "Step", "Tables", "Trace", "Unknown", "trace"]


class Unknown(Exception):
    """The tracer does not know this, and will not guess."""


class Refused(Exception):
    """The kernel, iptables or ipset would not do this."""


PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "ipv6-icmp": 58, "sctp": 132}
WITH_PORTS = {6: "tcp", 17: "udp", 132: "sctp"}
STATES = frozenset({"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"})
PACKET_TYPES = ("unicast", "broadcast", "multicast")
BASE_CHAINS = ("INPUT", "FORWARD", "OUTPUT")
VERDICTS = ("ACCEPT", "DROP", "RETURN")
OTHER_TARGETS = frozenset(
    {
        "AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK", "CT", "DNAT", "DNPT", "DSCP", "ECN",
        "HL", "HMARK", "IDLETIMER", "LED", "LOG", "MASQUERADE", "NETMAP", "NFQUEUE", "NOTRACK", "QUEUE",
        "RATEEST", "REDIRECT", "REJECT", "SECMARK", "SET", "SNAT", "SNPT", "SYNPROXY", "TCPMSS",
        "TCPOPTSTRIP", "TEE", "TOS", "TPROXY", "TRACE", "TTL", "ULOG",
    }
)  # fmt: skip
ICMP_NAMES = {"echo-reply": 0, "pong": 0, "echo-request": 8, "ping": 8}
ICMPV6_NAMES = {
    "echo-request": 128, "ping": 128, "echo-reply": 129, "pong": 129,
    "router-solicitation": 133, "router-advertisement": 134,
    "neighbour-solicitation": 135, "neighbor-solicitation": 135,
    "neighbour-advertisement": 136, "neighbor-advertisement": 136,
    "redirect": 137,
}  # fmt: skip
MAX_CHAIN, MAX_SET, MAX_COMMENT, MAX_PREFIX, MAX_PORTS, MAX_DEPTH = 28, 31, 255, 63, 15, 15
MASK32 = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------- packets


@dataclass(frozen=True)
class Packet:
    """One packet as a chain sees it. A field that is None and that a rule asks for raises `Unknown`."""

    src: str
    dst: str
    protocol: str | int = "tcp"
    _: KW_ONLY
    sport: int | None = None
    dport: int | None = None
    state: str = "NEW"
    icmp_type: int | None = None
    icmp_code: int = 0
    bridged: bool = False
    pkttype: str = "unicast"
    in_iface: str | None = None
    out_iface: str | None = None
    mark: int = 0

    def __post_init__(self) -> None:
        if self.source[0] != self.destination[0]:
            raise ValueError(f"addresses of two families: {self.src}, {self.dst}")
        if self.number in WITH_PORTS:
            if self.dport is None:
                raise ValueError(f"a packet of protocol {self.protocol} needs a dport")
        elif self.sport is not None or self.dport is not None:
            raise ValueError(f"a packet of protocol {self.protocol} has no ports")
        if self.state not in STATES or self.pkttype not in PACKET_TYPES:
            raise ValueError(f"no such state or packet type: {self.state}, {self.pkttype}")

    @cached_property
    def source(self) -> tuple[int, int]:
        return _address(self.src)

    @cached_property
    def destination(self) -> tuple[int, int]:
        return _address(self.dst)

    @cached_property
    def number(self) -> int:
        if isinstance(self.protocol, int):
            return self.protocol
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"no such protocol: {self.protocol}")
        return PROTOCOLS[self.protocol]

    @property
    def version(self) -> int:
        return self.source[0]

    def side(self, side: str) -> int:
        return (self.source if side == "src" else self.destination)[1]

    def port(self, side: str) -> int:
        port = self.sport if side == "src" else self.dport
        if port is None:
            raise Unknown(f"a rule asks for the {side} port, and the packet does not say it: {self}")
        return port


def _address(text: str) -> tuple[int, int]:
    """(4 or 6, the number); ValueError for anything else."""
    if "%" in text:
        raise ValueError(f"an address with a zone: {text}")
    address = ip_address(text)
    return address.version, int(address)


def _bits(version: int) -> int:
    return 32 if version == 4 else 128


def _number(text: str, top: int, base: int = 10) -> int:
    if not re.fullmatch(r"[0-9]+" if base == 10 else r"0|[1-9][0-9]*|0x[0-9a-fA-F]+", text):
        raise Unknown(f"not a number: {text!r}")
    value = int(text, base)
    if value > top:
        raise Refused(f"out of range: {text}")
    return value


# ------------------------------------------------------------------------------------------------------- sets

DIMENSIONS = {"hash:ip": 1, "hash:net": 1, "hash:ip,port": 2, "hash:ip,port,ip": 3}


@dataclass
class IpSet:
    """One set; `content` maps an element's key to its nomatch flag."""

    type: str
    family: int = 4
    maxelem: int = 65536
    timeout: int | None = None
    comment: bool = False
    counters: bool = False
    content: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type not in DIMENSIONS:
            raise Unknown(f"set type {self.type!r}")

    @property
    def dimensions(self) -> int:
        return DIMENSIONS[self.type]

    @property
    def members(self) -> frozenset[str]:
        """The elements as `ipset save` prints them."""
        return frozenset(self._text(key) + " nomatch" * flag for key, flag in self.content.items())

    @property
    def create_options(self) -> tuple[object, ...]:
        return self.type, self.family, self.maxelem, self.timeout, self.comment, self.counters

    def copy(self) -> IpSet:
        return replace(self, content=dict(self.content))

    def add(self, element: str, exist: bool = False, nomatch: bool = False) -> None:
        if element.endswith(" nomatch"):
            element, nomatch = element.removesuffix(" nomatch"), True
        if nomatch and self.type != "hash:net":
            raise Refused(f"{self.type} knows no nomatch")
        for key in self._keys(element):
            if key in self.content:
                if not exist:
                    raise Refused(f"element {element} is already added")
            elif len(self.content) >= self.maxelem:
                raise Refused(f"the set is full: {self.maxelem}")
            self.content[key] = nomatch

    def delete(self, element: str, exist: bool = False) -> None:
        for key in self._keys(element.removesuffix(" nomatch")):
            if key not in self.content and not exist:
                raise Refused(f"element {element} is not added")
            self.content.pop(key, None)

    def __contains__(self, element: object) -> bool:
        return isinstance(element, str) and all(key in self.content for key in self._keys(element))

    def matches(self, packet: Packet, sides: tuple[str, ...]) -> bool:
        if len(sides) != self.dimensions or packet.version != self.family:
            raise Unknown(f"{self.type} of IPv{self.family} looked up by {','.join(sides)} for {packet}")
        value = packet.side(sides[0])
        if self.type == "hash:ip":
            return (value,) in self.content
        if self.type == "hash:net":
            for shift in range(_bits(self.family)):
                nomatch = self.content.get((_bits(self.family) - shift, value >> shift << shift))
                if nomatch is not None:
                    return not nomatch
            return False
        if packet.number not in WITH_PORTS:
            return False
        key = (value, packet.number, packet.port(sides[1]))
        return (key if len(sides) == 2 else (*key, packet.side(sides[2]))) in self.content

    def _ip(self, text: str) -> int:
        try:
            version, value = _address(text)
        except ValueError:
            raise Unknown(f"address {text!r}") from None
        if version != self.family:
            raise Refused(f"{text} in a set of IPv{self.family}")
        return value

    def _host(self, text: str) -> int:
        value = self._ip(text)
        if not value:
            raise Refused(f"a null address: {text}")
        return value

    def _keys(self, element: str) -> list[tuple[int, ...]]:
        bits = _bits(self.family)
        first, *rest = element.split(",")
        if len(rest) != self.dimensions - 1:
            raise Refused(f"{element!r} in a {self.type}")
        if not rest:
            text, slash, length = first.partition("/")
            prefix = _number(length, bits) if slash else bits
            if not prefix:
                raise Refused(f"a prefix of length 0: {element}")
            base = self._ip(text) >> (bits - prefix) << (bits - prefix)
            if self.type == "hash:net":
                return [(prefix, base)]
            if bits - prefix > 16 or (bits == 128 and prefix != bits):
                raise Unknown(f"{element} in a hash:ip")
            self._host(text)
            return [(base + step,) for step in range(1 << (bits - prefix))]
        name, colon, text = rest[0].rpartition(":")
        number = PROTOCOLS.get(name) if colon else 6
        if number not in WITH_PORTS:
            raise Unknown(f"protocol of {element!r}")
        low, dash, high = text.partition("-")
        start = _number(low, 65535)
        ports = range(start, (_number(high, 65535) if dash else start) + 1)
        last = tuple(self._host(other) for other in rest[1:])
        return [(self._host(first), number, port, *last) for port in ports]

    def _text(self, key: tuple[int, ...]) -> str:
        def ip(value: int) -> str:
            return str(IPv4Address(value) if self.family == 4 else IPv6Address(value))

        if self.type == "hash:ip":
            return ip(key[0])
        if self.type == "hash:net":
            return ip(key[1]) if key[0] == _bits(self.family) else f"{ip(key[1])}/{key[0]}"
        return ",".join([ip(key[0]), f"{WITH_PORTS[key[1]]}:{key[2]}", *map(ip, key[3:])])


class Sets(dict[str, IpSet]):
    """The sets of a host by name. Timeouts do not run: an element with one stays until it is deleted."""

    @classmethod
    def of(cls, content: Mapping[str, tuple[str, Iterable[str]]]) -> Sets:
        """From name → (type, members); the family is that of the members, IPv4 when there are none."""
        sets = cls()
        for name, (kind, given) in content.items():
            members = list(given)
            sets.create(name, kind, family=6 if members and members[0].count(":") > 1 else 4)
            for member in members:
                sets.add(name, member)
        return sets

    def copy(self) -> Sets:
        return Sets({name: one.copy() for name, one in self.items()})

    def __missing__(self, name: str) -> IpSet:
        raise Refused(f"the set {name} does not exist")

    def create(
        self,
        name: str,
        type: str,
        family: int = 4,
        maxelem: int = 65536,
        timeout: int | None = None,
        comment: bool = False,
        counters: bool = False,
        exist: bool = False,
    ) -> None:
        new = IpSet(type, family, maxelem, timeout, comment, counters)
        if not 0 < len(name.encode()) <= MAX_SET:
            raise Refused(f"set name {name!r} is longer than {MAX_SET} bytes or empty")
        if name not in self:
            self[name] = new
        elif not exist or self[name].create_options != new.create_options:
            raise Refused(f"the set {name} exists already" + " with other properties" * exist)

    def add(self, name: str, element: str, exist: bool = False, nomatch: bool = False) -> None:
        self[name].add(element, exist, nomatch)

    def delete(self, name: str, element: str, exist: bool = False) -> None:
        self[name].delete(element, exist)

    def flush(self, name: str) -> None:
        self[name].content.clear()

    def swap(self, one: str, other: str) -> None:
        a, b = self[one], self[other]
        if (a.type, a.family) != (b.type, b.family):
            raise Refused(f"swap of {one} and {other}: not of one type")
        self[one], self[other] = b, a

    def destroy(self, name: str, tables: Tables | Iterable[Tables] = ()) -> None:
        given = [tables] if isinstance(tables, Tables) else tables
        if any(name in one.sets_used() for one in given):
            raise Refused(f"the set {name} is in use by a rule")
        if name not in self:
            raise Refused(f"the set {name} does not exist")
        del self[name]

    def apply_restore(self, text: str, tables: Tables | Iterable[Tables] = (), exist: bool = False) -> None:
        """What `ipset restore` does: not atomic, the lines before a refused one stay done."""
        given = [tables] if isinstance(tables, Tables) else list(tables)
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                with _Where(number, line):
                    self._apply(_words(line), given, exist)

    def _apply(self, words: list[str], tables: list[Tables], exist: bool) -> None:
        command, *args = words
        exist = exist or "-exist" in args or "-!" in args
        args = [arg for arg in args if arg not in ("-exist", "-!")]
        match command, args:
            case "create", [name, kind, *options]:
                self.create(name, kind, exist=exist, **_create_options(options))  # type: ignore[arg-type]
            case "add", [name, element, *options]:
                self.add(name, element, exist, _add_options(options, self[name]))
            case "del", [name, element]:
                self.delete(name, element, exist)
            case "flush", names if len(names) < 2:
                for name in names or self:
                    self.flush(name)
            case "destroy", [name]:
                self.destroy(name, tables)
            case "destroy", []:
                if any(one.sets_used() for one in tables):
                    raise Refused("a set is in use by a rule")
                self.clear()
            case "swap", [one, other]:
                self.swap(one, other)
            case (("COMMIT" | "quit"), []):
                pass
            case _:
                raise Unknown(f"ipset command {words}")


def _create_options(options: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    rest = iter(options)
    for option in rest:
        if option in ("comment", "counters"):
            found[option] = True
        elif option == "family":
            family = _next(rest, option)
            if family not in ("inet", "inet6"):
                raise Unknown(f"family {family!r}")
            found[option] = 4 if family == "inet" else 6
        elif option in ("maxelem", "timeout"):
            found[option] = _number(_next(rest, option), MASK32)
        elif option in ("hashsize", "bucketsize", "initval"):
            _number(_next(rest, option), MASK32, 0)
        else:
            raise Unknown(f"ipset create option {option!r}")
    return found


def _add_options(options: list[str], one: IpSet) -> bool:
    rest = iter(options)
    nomatch = False
    for option in rest:
        if option == "nomatch":
            nomatch = True
        elif option == "comment":
            _next(rest, option)
            if not one.comment:
                raise Refused("the set was created without comment support")
        elif option == "timeout":
            _number(_next(rest, option), 2147483)
            if one.timeout is None:
                raise Refused("the set was created without timeout support")
        elif option in ("packets", "bytes"):
            _number(_next(rest, option), 1 << 64)
            if not one.counters:
                raise Refused("the set was created without counters")
        else:
            raise Unknown(f"ipset add option {option!r}")
    return nomatch


# ------------------------------------------------------------------------------------------------------- text


class _Where:
    """Adds the line to what is raised within."""

    def __init__(self, number: int, line: str) -> None:
        self.number, self.line = number, line

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, Unknown | Refused):
            raise type(error)(f"{error} (line {self.number}: {self.line.strip()})") from None


def _words(line: str) -> list[str]:
    """The words of a line as iptables-restore splits them. That is not as a shell does: only "…" quotes, and
    only within it a backslash escapes, whatever character follows."""
    if '"' not in line:
        return line.split()
    words: list[str] = []
    current: str | None = None
    quoted = escaped = False
    for char in line:
        if escaped:
            current, escaped = (current or "") + char, False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            current, quoted = current or "", not quoted
        elif quoted or not char.isspace():
            current = (current or "") + char
        elif current is not None:
            words.append(current)
            current = None
    if quoted:
        raise Refused("a quote is not closed")
    return words if current is None else [*words, current]


def _next(words: Iterator[str], option: str) -> str:
    word = next(words, None)
    if word is None:
        raise Refused(f"{option} needs an argument")
    return word


# ------------------------------------------------------------------------------------------------------ rules


class At(NamedTuple):
    """What a match looks at; the mark is the packet's as it is now."""

    packet: Packet
    sets: Sets
    mark: int


@dataclass(frozen=True)
class Match:
    negated: bool

    def holds(self, at: At) -> bool:
        return self.test(at) != self.negated

    def test(self, at: At) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class Address(Match):
    side: str
    version: int
    value: int
    mask: int

    def test(self, at: At) -> bool:
        if at.packet.version != self.version:
            raise Unknown(f"an IPv{self.version} address in a rule for {at.packet}")
        return at.packet.side(self.side) & self.mask == self.value


@dataclass(frozen=True)
class Protocol(Match):
    number: int

    def test(self, at: At) -> bool:
        return at.packet.number == self.number


@dataclass(frozen=True)
class Interface(Match):
    side: str
    name: str

    def test(self, at: At) -> bool:
        name = at.packet.in_iface if self.side == "in" else at.packet.out_iface
        if name is None:
            raise Unknown(f"a rule asks for the {self.side} interface, and the packet does not say it")
        return name.startswith(self.name[:-1]) if self.name.endswith("+") else name == self.name


@dataclass(frozen=True)
class Ports(Match):
    sides: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]

    def holds(self, at: At) -> bool:
        return at.packet.number in WITH_PORTS and super().holds(at)

    def test(self, at: At) -> bool:
        return any(low <= at.packet.port(side) <= high for side in self.sides for low, high in self.ranges)


@dataclass(frozen=True)
class IcmpType(Match):
    type: int | None
    code: int | None

    def test(self, at: At) -> bool:
        if self.type is None:
            return True
        if at.packet.icmp_type is None:
            raise Unknown("a rule asks for the ICMP type, and the packet does not say it")
        return at.packet.icmp_type == self.type and self.code in (None, at.packet.icmp_code)


@dataclass(frozen=True)
class InSet(Match):
    name: str
    sides: tuple[str, ...]

    def test(self, at: At) -> bool:
        if self.name not in at.sets:
            raise Unknown(f"set {self.name}")
        return at.sets[self.name].matches(at.packet, self.sides)


@dataclass(frozen=True)
class State(Match):
    states: frozenset[str]

    def test(self, at: At) -> bool:
        return at.packet.state in self.states


@dataclass(frozen=True)
class Bridged(Match):
    def test(self, at: At) -> bool:
        return at.packet.bridged


@dataclass(frozen=True)
class PacketType(Match):
    kind: str

    def test(self, at: At) -> bool:
        return at.packet.pkttype == self.kind


@dataclass(frozen=True)
class Mark(Match):
    value: int
    mask: int

    def test(self, at: At) -> bool:
        return at.mark & self.mask == self.value


@dataclass(frozen=True)
class Comment(Match):
    text: str

    def test(self, at: At) -> bool:  # noqa: ARG002
        return True


@dataclass(frozen=True)
class Target:
    """`kind` is a verdict, "jump", "goto", "NFLOG", "MARK" or "" (the rule only counts)."""

    kind: str = ""
    chain: str = ""
    value: int = 0
    mask: int = 0
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rule:
    modules: tuple[str, ...]
    matches: tuple[Match, ...]
    target: Target
    text: str = field(compare=False)

    @property
    def comment(self) -> str | None:
        return next((match.text for match in self.matches if isinstance(match, Comment)), None)

    def __str__(self) -> str:
        return self.text


def _side_address(side: str) -> Callable[[bool, str], Match]:
    def parse(negated: bool, text: str) -> Match:
        address, slash, given = text.partition("/")
        try:
            version, value = _address(address)
            full = (1 << _bits(version)) - 1
            if not slash:
                mask = full
            elif given.isdecimal():
                mask = full ^ (full >> _number(given, _bits(version)))
            else:
                of, mask = _address(given)
                if of != version:
                    raise Refused(f"mask of {text}")
        except ValueError:
            raise Unknown(f"address {text!r}") from None
        if negated and not mask:
            raise Refused(f"! {text} never matches")
        return Address(negated, side, version, value & mask, mask)

    return parse


def _protocol(negated: bool, text: str) -> Match | None:
    number = 0 if text == "all" else PROTOCOLS.get(text)
    if number is None:
        number = _number(text, 255)
    if number:
        return Protocol(negated, number)
    if negated:
        raise Refused("the rule would never match a protocol")
    return None


def _interface(side: str) -> Callable[[bool, str], Match | None]:
    def parse(negated: bool, text: str) -> Match | None:
        if negated and text == "+":
            raise Unknown("! +: the backends differ")
        if text == "+":
            return None
        if not 0 < len(text) <= 15 or "+" in text[:-1]:
            raise Unknown(f"interface {text!r}")
        return Interface(negated, side, text)

    return parse


def _range(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    first = _number(low, 65535) if low or not colon else 0
    last = first if not colon else _number(high, 65535) if high else 65535
    if first > last:
        raise Refused(f"a range from more to less: {text}")
    return first, last


def _ports(*sides: str) -> Callable[[bool, str], Match]:
    def parse(negated: bool, text: str) -> Match:
        low, high = _range(text)
        if negated and (low == 0) != (high == 65535):
            # nft says it the other way round; the protocol is given, so it is the same
            return Ports(False, sides, ((high + 1, 65535) if low == 0 else (0, low - 1),))
        return Ports(negated, sides, ((low, high),))

    return parse


def _multiport(*sides: str) -> Callable[[bool, str], Match]:
    def parse(negated: bool, text: str) -> Match:
        parts = text.split(",")
        if any(part[:1] in ("", ":") or part.endswith(":") for part in parts):
            raise Unknown(f"ports {text!r}")
        if sum(1 + (":" in part) for part in parts) > MAX_PORTS:
            raise Refused(f"more than {MAX_PORTS} ports (a range counts as two): {text}")
        return Ports(negated, sides, tuple(_range(part) for part in parts))

    return parse


def _match_set(negated: bool, name: str, flags: str) -> Match:
    sides = tuple(flags.split(","))
    if not all(side in ("src", "dst") for side in sides):
        raise Unknown(f"--match-set {name} {flags}")
    return InSet(negated, name, sides)


def _ctstate(negated: bool, text: str) -> Match:
    states = frozenset(text.split(","))
    if not states <= STATES:
        raise Unknown(f"--ctstate {text}")
    return State(negated, states)


def _icmp(names: Mapping[str, int]) -> Callable[[bool, str], Match]:
    def parse(negated: bool, text: str) -> Match:
        if text == "any" and names is ICMP_NAMES and not negated:
            return IcmpType(negated, None, None)
        if text in names:
            # a name stands for all its codes or for code 0; these types have no other code
            return IcmpType(negated, names[text], None)
        kind, slash, code = text.partition("/")
        return IcmpType(negated, _number(kind, 254), _number(code, 255) if slash else None)

    return parse


def _pkttype(negated: bool, text: str) -> Match:
    if text not in PACKET_TYPES:
        raise Unknown(f"--pkt-type {text}")
    return PacketType(negated, text)


def _masked(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return _number(value, MASK32, 0), _number(mask, MASK32, 0) if slash else MASK32


def _mark(negated: bool, text: str) -> Match:
    value, mask = _masked(text)
    return Mark(negated, value, mask)


def _comment(negated: bool, text: str) -> Match:
    if negated:
        raise Refused("! --comment")
    if len(text.encode()) > MAX_COMMENT:
        raise Refused(f"a comment of more than {MAX_COMMENT} bytes would be cut in silence")
    return Comment(negated, text)


PORT_OPTIONS = {"--sport": _ports("src"), "--dport": _ports("dst")}
MODULES: dict[str, Mapping[str, Callable[..., Match]]] = {
    "tcp": PORT_OPTIONS,
    "udp": PORT_OPTIONS,
    "sctp": PORT_OPTIONS,
    "multiport": {
        "--sports": _multiport("src"), "--dports": _multiport("dst"), "--ports": _multiport("src", "dst"),
    },
    "set": {"--match-set": _match_set},
    "conntrack": {"--ctstate": _ctstate},
    "icmp": {"--icmp-type": _icmp(ICMP_NAMES)},
    "icmp6": {"--icmpv6-type": _icmp(ICMPV6_NAMES)},
    "physdev": {"--physdev-is-bridged": Bridged},
    "pkttype": {"--pkt-type": _pkttype},
    "comment": {"--comment": _comment},
    "mark": {"--mark": _mark},
}  # fmt: skip
ARGUMENTS = {"--match-set": 2, "--physdev-is-bridged": 0}
NEEDED_PROTOCOLS = {
    "tcp": {6}, "udp": {17}, "sctp": {132}, "multiport": set(WITH_PORTS), "icmp": {1}, "icmp6": {58},
}  # fmt: skip
BASIC: dict[str, Callable[[bool, str], Match | None]] = {
    "-s": _side_address("src"), "-d": _side_address("dst"), "-p": _protocol,
    "-i": _interface("in"), "-o": _interface("out"),
}  # fmt: skip
ALIASES = {
    "--source": "-s", "--src": "-s", "--destination": "-d", "--dst": "-d", "--protocol": "-p",
    "--in-interface": "-i", "--out-interface": "-o", "--match": "-m", "--jump": "-j", "--goto": "-g",
    "--source-port": "--sport", "--destination-port": "--dport",
    "--source-ports": "--sports", "--destination-ports": "--dports",
}  # fmt: skip
MARK_OPTIONS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "--set-xmark": lambda value, mask: (value, mask),
    "--set-mark": lambda value, mask: (value, value | mask),
    "--or-mark": lambda value, _: (value, value),
    "--and-mark": lambda value, _: (0, ~value & MASK32),
    "--xor-mark": lambda value, _: (value, 0),
}
NFLOG_NUMBERS = {
    "--nflog-group": 65535, "--nflog-range": MASK32, "--nflog-size": MASK32, "--nflog-threshold": 65535,
}  # fmt: skip


def _rule(words: list[str], text: str, target_of: Callable[[str, bool], Target]) -> Rule:
    basic: dict[str, Match | None] = {}
    modules: list[tuple[str, dict[str, Match]]] = []
    target: Target | None = None
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        negated = word == "!"
        option = _next(rest, "!") if negated else word
        option = ALIASES.get(option, option)
        if option in BASIC:
            if option in basic:
                raise Refused(f"more than one {option}")
            basic[option] = BASIC[option](negated, _next(rest, option))
            continue
        if negated and option in ("-m", "-j", "-g"):
            raise Refused(f"! {option}")
        if option == "-m":
            modules.append((_next(rest, option), {}))
            if modules[-1][0] not in MODULES:
                raise Unknown(f"match {modules[-1][0]!r}")
            continue
        if option in ("-j", "-g"):
            if target is not None:
                raise Refused("more than one target")
            target = target_of(_next(rest, option), option == "-g")
            continue
        if target is not None and _target_option(target, option) and not negated:
            if option in options:
                raise Refused(f"more than one {option}")
            options[option] = _next(rest, option)
            continue
        protocol = basic.get("-p")
        if option in PORT_OPTIONS and isinstance(protocol, Protocol) and protocol.number in WITH_PORTS:
            name = WITH_PORTS[protocol.number]
            if all(module != name for module, _ in modules):
                modules.append((name, {}))
        found = next((one for one in reversed(modules) if option in MODULES[one[0]]), None)
        if found is None:
            raise Unknown(f"option {option!r}")
        module, given = found
        if option in given:
            raise Refused(f"more than one {option}")
        arguments = [_next(rest, option) for _ in range(ARGUMENTS.get(option, 1))]
        given[option] = MODULES[module][option](negated, *arguments)
    protocol = basic.get("-p")
    for module, given in modules:
        needed = NEEDED_PROTOCOLS.get(module)
        known = protocol.number if isinstance(protocol, Protocol) and not protocol.negated else None
        if needed and known not in needed:
            raise Refused(f"-m {module} without its protocol")
        if not given and module not in WITH_PORTS.values():
            raise Refused(f"-m {module} needs an option")
    matches = [match for option in BASIC if (match := basic.get(option)) is not None]
    for _, given in modules:
        matches += [given[option] for option in sorted(given)]
    target = _with_options(target or Target(), options)
    return Rule(tuple(module for module, _ in modules), tuple(matches), target, text)


def _target_option(target: Target, option: str) -> bool:
    if target.kind == "MARK":
        return option in MARK_OPTIONS
    return target.kind == "NFLOG" and (option in NFLOG_NUMBERS or option == "--nflog-prefix")


def _with_options(target: Target, options: dict[str, str]) -> Target:
    if target.kind == "MARK":
        if len(options) != 1:
            raise Refused("MARK needs one option")
        [(option, text)] = options.items()
        if "/" in text and option not in ("--set-xmark", "--set-mark"):
            raise Refused(f"{option} {text}")
        value, mask = MARK_OPTIONS[option](*_masked(text))
        return Target("MARK", value=value, mask=mask)
    if target.kind == "NFLOG":
        for option, text in options.items():
            if option in NFLOG_NUMBERS:
                _number(text, NFLOG_NUMBERS[option])
            elif len(text.encode()) > MAX_PREFIX:
                raise Refused(f"an NFLOG prefix of more than {MAX_PREFIX} bytes would be cut in silence")
        return Target("NFLOG", options=tuple(sorted({"--nflog-group": "0", **options}.items())))
    return target


# ----------------------------------------------------------------------------------------------------- tables


@dataclass
class Tables:
    """The filter table of one family. `chains` holds the rules, `policies` the base chains' verdicts; with
    `sets` given, a rule that names a set that is not among them is refused."""

    chains: dict[str, list[Rule]] = field(default_factory=lambda: {name: [] for name in BASE_CHAINS})
    policies: dict[str, str] = field(default_factory=lambda: dict.fromkeys(BASE_CHAINS, "ACCEPT"))
    sets: Sets | None = None

    @classmethod
    def parse(cls, text: str, sets: Sets | None = None) -> Tables:
        """From the text of `iptables-save`, or of `iptables-restore` on an empty table."""
        tables = cls(sets=sets)
        tables.apply(text)
        return tables

    def copy(self) -> Tables:
        chains = {name: list(rules) for name, rules in self.chains.items()}
        return Tables(chains, dict(self.policies), self.sets)

    def sets_used(self) -> frozenset[str]:
        return frozenset(
            match.name
            for rules in self.chains.values()
            for rule in rules
            for match in rule.matches
            if isinstance(match, InSet)
        )

    def apply(self, text: str) -> None:
        """What `iptables-restore --noflush` does: each COMMIT wholly or, when something raises, not at all
        (the COMMITs before it stay done)."""
        work: Tables | None = None
        table: str | None = None
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            with _Where(number, line):
                if line.startswith("*"):
                    if table is not None:
                        raise Refused("COMMIT expected")
                    table = line[1:]
                    if table == "filter":
                        work = self.copy()
                elif table is None:
                    raise Refused("outside of a table")
                elif line == "COMMIT":
                    if work is not None:
                        work._check_depth()
                        self.chains, self.policies = work.chains, work.policies
                    work = table = None
                elif work is not None:
                    work._line(line)
        if table is not None:
            raise Refused("COMMIT expected at the end")

    def _line(self, line: str) -> None:
        if line.startswith(":"):
            name, policy, *_ = [*line[1:].split(), ""]
            if name in self.policies:
                if policy != "-":
                    self._policy(name, policy)
            elif policy != "-":
                raise Refused(f"a policy for the user chain {name}")
            elif name in self.chains:
                self.chains[name].clear()
            else:
                self._new(name)
            return
        words = _words(line)
        if words and re.fullmatch(r"\[\d+:\d+\]", words[0]):
            del words[0]
        match words:
            case ["-N", name]:
                if name in self.chains:
                    raise Refused(f"the chain {name} exists already")
                self._new(name)
            case ["-P", name, policy]:
                if name not in self.policies:
                    raise Refused(f"a policy for {name}")
                self._policy(name, policy)
            case ["-F"]:
                for rules in self.chains.values():
                    rules.clear()
            case ["-F", name]:
                self._of(name).clear()
            case ["-X"]:
                for name in [name for name in self.chains if name not in self.policies]:
                    self._delete_chain(name)
            case ["-X", name]:
                self._delete_chain(name)
            case ["-Z"]:
                pass
            case ["-Z", name]:
                self._of(name)
            case ["-A", name, *spec]:
                self._of(name).append(self._parse(name, spec))
            case ["-I", name, *spec]:
                index, spec = _position(spec)
                rules = self._of(name)
                if index is not None and not 1 <= index <= len(rules) + 1:
                    raise Refused(f"{name} has {len(rules)} rules")
                rules.insert((index or 1) - 1, self._parse(name, spec))
            case ["-R", name, *spec]:
                index, spec = _position(spec)
                self._existing(name, index)
                self.chains[name][(index or 1) - 1] = self._parse(name, spec)
            case ["-D", name, *spec]:
                index, rest = _position(spec)
                rules = self._of(name)
                if index is not None and not rest:
                    self._existing(name, index)
                    del rules[index - 1]
                    return
                rule = self._parse(name, spec)
                if rule not in rules:
                    raise Refused(f"no such rule in {name}")
                rules.remove(rule)
            case _:
                raise Unknown(f"command {line!r}")

    def _of(self, name: str) -> list[Rule]:
        if name not in self.chains:
            raise Refused(f"the chain {name} does not exist")
        return self.chains[name]

    def _existing(self, name: str, index: int | None) -> None:
        if index is None or not 1 <= index <= len(self._of(name)):
            raise Refused(f"no rule {index} in {name}")

    def _policy(self, name: str, policy: str) -> None:
        if policy not in ("ACCEPT", "DROP"):
            raise Unknown(f"policy {policy!r}")
        self.policies[name] = policy

    def _new(self, name: str) -> None:
        if not 0 < len(name.encode()) <= MAX_CHAIN or name[0] in "-!" or name in (*VERDICTS, "NFLOG", "MARK"):
            raise Refused(f"chain name {name!r}")
        if name in OTHER_TARGETS:
            raise Unknown(f"a chain with the name of a target: {name}")
        self.chains[name] = []

    def _delete_chain(self, name: str) -> None:
        if name in self.policies or self._of(name):
            raise Refused(f"the chain {name} is a base chain or not empty")
        if any(rule.target.chain == name for rules in self.chains.values() for rule in rules):
            raise Refused(f"the chain {name} is still referenced")
        del self.chains[name]

    def _parse(self, chain: str, spec: list[str]) -> Rule:
        text = " ".join(f'"{word}"' if " " in word or not word else word for word in spec)
        rule = _rule(spec, f"-A {chain} {text}", self._target)
        if self.sets is not None:
            for match in rule.matches:
                if isinstance(match, InSet) and self.sets[match.name].dimensions != len(match.sides):
                    raise Unknown(f"{self.sets[match.name].type} looked up by {','.join(match.sides)}")
        return rule

    def _target(self, name: str, goto: bool) -> Target:
        if name in self.chains and name not in self.policies:
            return Target("goto" if goto else "jump", name)
        if not goto and name in (*VERDICTS, "NFLOG", "MARK"):
            return Target(name)
        if name in OTHER_TARGETS:
            raise Unknown(f"target {name}")
        raise Refused(f"{name} is not a user chain")

    def _check_depth(self) -> None:
        """No loops, and no more than 15 user chains below a base chain (nft, jumps and gotos alike)."""
        heights: dict[str, int | None] = {}

        def height(name: str) -> int:
            if name in heights:
                known = heights[name]
                if known is None:
                    raise Refused(f"a loop through {name}")
                return known
            heights[name] = None
            below = {rule.target.chain for rule in self.chains[name] if rule.target.chain}
            heights[name] = result = 1 + max(map(height, below), default=0)
            return result

        for name in self.chains:
            if height(name) > MAX_DEPTH + 1 and name in self.policies:
                raise Refused(f"more than {MAX_DEPTH} chains below {name}")


def _position(spec: list[str]) -> tuple[int | None, list[str]]:
    return (int(spec[0]), spec[1:]) if spec and spec[0].isdecimal() else (None, spec)


# ------------------------------------------------------------------------------------------------------ trace


class Step(NamedTuple):
    """A rule that matched: the `number`-th (from 1) of `chain`."""

    chain: str
    number: int
    rule: Rule

    def __str__(self) -> str:
        return f"{self.chain}:{self.number} {self.rule.text}"


@dataclass(frozen=True)
class Trace:
    """`rule` is the step that decided, None when it was the policy; `path` all rules that matched."""

    verdict: str
    rule: Step | None
    path: list[Step]
    mark: int

    def __str__(self) -> str:
        return "\n".join([*map(str, self.path), self.verdict + " by the policy" * (self.rule is None)])


def trace(tables: Tables, sets: Sets, packet: Packet, chain: str = "FORWARD") -> Trace:
    if chain not in tables.policies:
        raise Unknown(f"base chain {chain}")
    base, index, mark = chain, 0, packet.mark
    callers: list[tuple[str, int]] = []
    path: list[Step] = []
    while True:
        rules = tables.chains[chain]
        kind = "RETURN"
        if index < len(rules):
            rule = rules[index]
            index += 1
            if not all(match.holds(At(packet, sets, mark)) for match in rule.matches):
                continue
            path.append(Step(chain, index, rule))
            kind = rule.target.kind
            if kind in ("jump", "goto"):
                if kind == "jump":
                    callers.append((chain, index))
                chain, index = rule.target.chain, 0
            elif kind == "MARK":
                mark = mark & ~rule.target.mask & MASK32 ^ rule.target.value
            elif kind in ("ACCEPT", "DROP"):
                return Trace(kind, path[-1], path, mark)
        if kind == "RETURN":
            if not callers:
                return Trace(tables.policies[base], None, path, mark)
            chain, index = callers.pop()
