"""May a new connection pass? Answered from the very rules and sets that are programmed, never by a second evaluator."""

from __future__ import annotations

from typing import NamedTuple

from agent.core.addresses import Address, Prefix, family
from agent.core.node import Node
from agent.core.policy import DIRECTIONS, EGRESS, INGRESS
from agent.core.rules import Match, PeerSet, PrefixSet, Rule, Verdict


class Connection(NamedTuple):
    """A new connection as the FORWARD hook sees it: after DNAT, before SNAT (semantics.md line 34).

    `protocol` is TCP, UDP, SCTP or another protocol's name; `port` the destination port, 0 where there is none."""

    source: Address
    destination: Address
    protocol: str
    port: int


class Judgement(NamedTuple):
    """The rule that decided each direction; None where the node does not isolate the address in it."""

    egress: Rule | None
    ingress: Rule | None

    @property
    def allowed(self) -> bool:
        return all(rule is None or rule.verdict is Verdict.ALLOW for rule in self)


def judge(node: Node, connection: Connection) -> Judgement:
    """Both directions of a connection (lines 5 and 6); an address always reaches itself (line 37)."""
    if connection.source == connection.destination:
        return Judgement(None, None)
    decided = {direction: _decide(node, connection, direction) for direction in DIRECTIONS}
    return Judgement(decided[EGRESS], decided[INGRESS])


def _decide(node: Node, connection: Connection, direction: str) -> Rule | None:
    own, peer = connection.source, connection.destination
    if direction == INGRESS:
        own, peer = peer, own
    dispatch = node.dispatch[direction].get(own)
    if dispatch is None:
        return None
    for rule in dispatch.chain.rules:
        if rule.verdict is not Verdict.PASS and matches(node, rule.match, connection, peer):
            return rule
    return None


def matches(node: Node, match: Match, connection: Connection, peer: Address) -> bool:
    """Whether all parts of a match hold; `peer` is the other end in the rule's direction."""
    if match.protocol is not None and match.protocol != connection.protocol:
        return False
    if match.ports and not any(low <= connection.port <= high for low, high in match.ports):
        return False
    if match.named is not None:
        member = (connection.destination, connection.protocol, connection.port)
        if not node.sets.active[match.named.name].contains(member):
            return False
    if isinstance(match.peer, Prefix):
        return match.peer.holds(peer)
    if isinstance(match.peer, PrefixSet):
        return any(prefix.holds(peer) for prefix in match.peer.prefixes)
    if isinstance(match.peer, PeerSet):
        return family(peer) == match.peer.family and node.sets.active[match.peer.name].contains(peer)
    return True
