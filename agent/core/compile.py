"""From the policies that isolate a pod in one direction to the ordered rules of its class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.core.addresses import Prefix, reduce_blocks
from agent.core.peers import ALL_PODS
from agent.core.policy import EGRESS, BlockPeer, PodPeer, Policy, PolicyRule, PortName, PortRange
from agent.core.rules import (
    Chain,
    Match,
    NamedPortSet,
    Origin,
    PeerSet,
    PrefixSet,
    Rule,
    Verdict,
    port_spans,
)

NATIVE_PREFIXES = 8
"""Up to so many prefixes are matched one by one (4 to 10 ns each); more are a set (155 to 230 ns)."""
MULTIPORT = 15
"""Slots of one multiport match; a range takes two."""


class _Peer(NamedTuple):
    """One alternative of a rule's peers in one family: pods, prefixes, or anyone (both None)."""

    indices: tuple[int, ...]
    pods: tuple[PodPeer, ...] | None = None
    prefixes: tuple[Prefix, ...] | None = None


def compile_chain(policies: Iterable[Policy], direction: str, family: int) -> Chain:
    """The chain of a class: what its policies allow, then the isolation itself.

    `policies` are those that isolate in the direction, in order of their keys."""
    rules: list[Rule] = []
    keys = []
    for policy in policies:
        keys.append(policy.key)
        for rule in policy.rules(direction) or ():
            for match, peers, ports in _matches(rule, direction, family):
                origin = Origin(direction, (policy.key,), rule.ordinal, peers, ports)
                rules.append(Rule(match, Verdict.ALLOW, origin))
    rules.append(Rule(Match(), Verdict.DENY, Origin(direction, tuple(keys))))
    return Chain(family, direction, tuple(rules))


def _matches(rule: PolicyRule, direction: str, family: int) -> Iterator[tuple[Match, tuple[int, ...], tuple[int, ...]]]:
    """Each (match, indices of peers, indices of ports) of one rule: every peer with every port."""
    peers = list(_peers(rule, family))
    if rule.ports is None:
        for peer in peers:
            for match in _peer_matches(peer, family, Match()):
                yield match, peer.indices, ()
        return
    for protocol in dict.fromkeys(port.protocol for port in rule.ports):
        numbered = [(i, p) for i, p in enumerate(rule.ports) if isinstance(p, PortRange) and p.protocol == protocol]
        if numbered:
            indices = tuple(i for i, _ in numbered)
            for chunk in _chunks(port_spans([p for _, p in numbered])):
                for peer in peers:
                    for match in _peer_matches(peer, family, Match(protocol, chunk)):
                        yield match, peer.indices, indices
    for index, port in enumerate(rule.ports):
        if isinstance(port, PortName):
            for peer in peers:
                for match in _named_matches(port, peer, direction, family):
                    yield match, peer.indices, (index,)


def _peers(rule: PolicyRule, family: int) -> Iterator[_Peer]:
    if rule.peers is None:
        yield _Peer(())
        return
    pods: dict[PodPeer, list[int]] = {}
    blocks: list[BlockPeer] = []
    block_indices: list[int] = []
    for index, peer in enumerate(rule.peers):
        if isinstance(peer, PodPeer):
            pods.setdefault(peer, []).append(index)
        else:
            blocks.append(peer)
            block_indices.append(index)
    prefixes = tuple(p for p in reduce_blocks(blocks) if p.family == family)
    if prefixes:
        yield _Peer(tuple(block_indices), prefixes=None if prefixes[0].length == 0 else prefixes)
    if pods:
        yield _Peer(tuple(sorted(n for indices in pods.values() for n in indices)), pods=tuple(sorted(pods, key=repr)))


def _peer_matches(peer: _Peer, family: int, ports: Match) -> Iterator[Match]:
    if peer.pods is not None:
        yield Match(ports.protocol, ports.ports, ports.named, PeerSet(family, peer.pods))
    elif peer.prefixes is None:
        yield ports
    elif len(peer.prefixes) <= NATIVE_PREFIXES:
        for prefix in peer.prefixes:
            yield Match(ports.protocol, ports.ports, ports.named, prefix)
    else:
        yield Match(ports.protocol, ports.ports, ports.named, PrefixSet(family, peer.prefixes))


def _named_matches(port: PortName, peer: _Peer, direction: str, family: int) -> Iterator[Match]:
    """A named port is a set of (address, number), never a chain of its own (semantics.md lines 29 to 31)."""
    if direction == EGRESS:
        pods = peer.pods or (ALL_PODS,)
        yield Match(port.protocol, (), NamedPortSet(family, port.name, port.protocol, pods, peer.prefixes))
        return
    named = NamedPortSet(family, port.name, port.protocol, (ALL_PODS,), local=True)
    yield from _peer_matches(peer, family, Match(port.protocol, (), named))


def _chunks(spans: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Spans cut into what one multiport match holds; () (every port) stays one."""
    chunk: list[tuple[int, int]] = []
    slots = 0
    for low, high in spans:
        size = 1 if low == high else 2
        if slots + size > MULTIPORT:
            yield tuple(chunk)
            chunk, slots = [], 0
        chunk.append((low, high))
        slots += size
    yield tuple(chunk)
