"""The compiled form: sets of members, matches, and ordered (match, verdict) rules with their origin.

Names are hashes of content, so equal content is found again after a restart, and edited content stands beside the old.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from hashlib import sha256

from agent.core.addresses import Address, Prefix
from agent.core.policy import EGRESS, INGRESS, PodPeer, PortRange

FORMAT = 1
"""Part of every name: raised when the same content is programmed in another form, so that nothing old is adopted."""

IpPort = tuple[Address, str, int]
"""A member of a named-port set: address, protocol, number."""
Member = Address | IpPort | Prefix


class SetKind(Enum):
    """The ipset type."""

    IP = "hash:ip"
    IP_PORT = "hash:ip,port"
    NET = "hash:net"


def _name(prefix: str, *content: object) -> str:
    return prefix + sha256(repr((FORMAT, *content)).encode()).hexdigest()[:20]


class SetSpec:
    """What a set holds, by content. Subclasses are frozen dataclasses; `name` is at most 31 characters."""

    family: int
    kind: SetKind

    @property
    def name(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class PeerSet(SetSpec):
    """The addresses of one family of the pods that any of the peers selects: one look-up for all peers of a rule."""

    family: int
    peers: tuple[PodPeer, ...]
    kind = SetKind.IP

    @cached_property
    def name(self) -> str:
        return _name(f"npa{self.family}-p-", self.peers)


@dataclass(frozen=True)
class NamedPortSet(SetSpec):
    """(address, protocol, number) of destination pods that declare the named port (semantics.md lines 29 to 31).

    `peers` say which pods; `within` keeps only addresses in these prefixes (a named port beside an ipBlock);
    `local` keeps only the addresses that this node judges (an ingress rule resolves on the selected pod)."""

    family: int
    port: str
    protocol: str
    peers: tuple[PodPeer, ...]
    within: tuple[Prefix, ...] | None = None
    local: bool = False
    kind = SetKind.IP_PORT

    @cached_property
    def name(self) -> str:
        return _name(f"npa{self.family}-n-", self.port, self.protocol, self.peers, self.within, self.local)


@dataclass(frozen=True)
class PrefixSet(SetSpec):
    """The exact union of a rule's ipBlocks. Never holds a /0: a union that covers everything is no match at all."""

    family: int
    prefixes: tuple[Prefix, ...]
    kind = SetKind.NET

    @cached_property
    def name(self) -> str:
        return _name(f"npa{self.family}-b-", self.prefixes)


class Verdict(Enum):
    """ALLOW ends this direction, DENY drops the packet, PASS leaves the decision to the tier below."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"


@dataclass(frozen=True)
class Match:
    """All that is given must hold. `protocol` None is any. `ports` are ranges of the destination port, () is any.

    `named` is matched on (destination address, destination port). `peer` is the other end: the source for
    ingress, the destination for egress; a PeerSet or PrefixSet, or one Prefix matched natively."""

    protocol: str | None = None
    ports: tuple[tuple[int, int], ...] = ()
    named: NamedPortSet | None = None
    peer: PeerSet | PrefixSet | Prefix | None = None

    @property
    def sets(self) -> tuple[SetSpec, ...]:
        return tuple(s for s in (self.named, self.peer) if isinstance(s, SetSpec))


@dataclass(frozen=True)
class Origin:
    """Why a rule is there: the policies, and for an allowance the rule's, peers' and ports' indices in the manifest.

    `rule` None is the isolation itself: what none of the policies allows."""

    direction: str
    policies: tuple[str, ...]
    rule: int | None = None
    peers: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.rule is None:
            return f"{self.direction.lower()} {' '.join(self.policies)}"
        return f"{self.policies[0]} {self.direction.lower()}[{self.rule}]"


@dataclass(frozen=True)
class Rule:
    """One (match, verdict), with its origin."""

    match: Match
    verdict: Verdict
    origin: Origin

    @cached_property
    def digest(self) -> str:
        """10 hex digits that stand first in the rule's comment."""
        match = self.match
        named = match.named and match.named.name
        peer = match.peer.name if isinstance(match.peer, SetSpec) else match.peer
        content = (FORMAT, match.protocol, match.ports, named, peer, self.verdict.value, self.origin)
        return sha256(repr(content).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Chain:
    """The rules of one class of pods in one direction and family, shared by all pods of equal allowance."""

    family: int
    direction: str
    rules: tuple[Rule, ...]

    @cached_property
    def name(self) -> str:
        return chain_name(self.direction, self.family, [rule.digest for rule in self.rules])

    @cached_property
    def sets(self) -> frozenset[SetSpec]:
        return frozenset(s for rule in self.rules for s in rule.match.sets)


def chain_name(direction: str, family: int, digests: list[str]) -> str:
    """The name of a class chain, at most 28 characters, from the digests that stand first in its rules' comments."""
    letter = {INGRESS: "I", EGRESS: "E"}[direction]
    return _name(f"NPA-{letter}-", family, *digests)


def port_spans(ranges: list[PortRange]) -> tuple[tuple[int, int], ...]:
    """Ranges of one protocol merged into the fewest, sorted; () when they are every port."""
    merged: list[tuple[int, int]] = []
    for _, low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return () if merged and merged[0][0] <= 0 and merged[0][1] >= 65535 else tuple(merged)
