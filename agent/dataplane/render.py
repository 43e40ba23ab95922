"""The desired state as iptables and ipset text. Pure: the same node always renders the same text.

The shape of the chains, and why, is in docs/adr/0002-dataplane.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from socket import AF_INET, AF_INET6, inet_ntop
from typing import NamedTuple

from agent.core.addresses import FAMILIES, V4, Address, Prefix, family, format_address
from agent.core.node import Dispatch, Node
from agent.core.policy import DIRECTIONS, EGRESS, INGRESS
from agent.core.rules import Chain, Member, Rule, SetKind, SetSpec, Verdict

ROOT = "NPA-FORWARD"
JUMP = f"-j {ROOT}"
"""In FORWARD; without a comment, which every packet of the host would pay for."""
BRANCH = {EGRESS: "NPA-EGRESS", INGRESS: "NPA-INGRESS"}
BUCKETS = 16
MAXELEM = 1_048_576
HASHSIZE = 64
COMMENT_BYTES = 255
"""Where the kernel cuts a comment, in silence: so it is cut before."""
_TARGET = {Verdict.ALLOW: "-j RETURN", Verdict.DENY: "-j DROP"}
_NEIGHBOUR_DISCOVERY = range(133, 138)


class Options(NamedTuple):
    """How the node wants it. `multicast` leaves bridged broadcast and multicast open (semantics.md line 42)."""

    multicast: bool = False


OPTIONS = Options()
"""What a node gets that asks for nothing else."""


# --- chains ----------------------------------------------------------------------------------------------------------


def bucket_name(direction: str, number: int) -> str:
    return f"NPA-{'E' if direction == EGRESS else 'I'}B-{number}"


def bucket_of(address: Address) -> int:
    """The bucket that dispatches an address: its last four bits."""
    return address[-1] % BUCKETS


def is_ours(chain: str) -> bool:
    return chain.startswith("NPA-")


def fixed_chains(
    version: int, *, isolates: bool, directions: Collection[str], options: Options
) -> dict[str, list[str]]:
    """The chains that every node has, without the buckets: name → rules.

    `isolates` tells whether any pod of the node is isolated, `directions` in which ones an address of this family is:
    a new connection costs nothing in the other."""
    chains = {ROOT: list(_root_rules(version, isolates=isolates, directions=directions, options=options))}
    for direction, name in BRANCH.items():
        side = "-s" if direction == EGRESS else "-d"
        chains[name] = [
            f"{side} {_low_bits(version, number)} -g {bucket_name(direction, number)}" for number in range(BUCKETS)
        ]
    return chains


def _low_bits(version: int, number: int) -> str:
    return f"0.0.0.{number}/0.0.0.15" if version == V4 else f"::{number:x}/::f"


def isolated_directions(node: Node, version: int) -> set[str]:
    """The directions in which an address of the family is isolated on the node."""
    return {d for d in DIRECTIONS if any(family(address) == version for address in node.dispatch[d])}


def _root_rules(version: int, *, isolates: bool, directions: Collection[str], options: Options) -> Iterator[str]:
    yield "-m conntrack --ctstate ESTABLISHED -j RETURN"
    icmp = "icmp" if version == V4 else "ipv6-icmp"
    yield f"-p {icmp} -m conntrack --ctstate RELATED -j RETURN"
    if version != V4:
        for kind in _NEIGHBOUR_DISCOVERY:
            yield f"-p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j RETURN"
    if isolates:
        yield from _bridged_rules(version, options)
    for direction in (EGRESS, INGRESS):
        if direction in directions:
            yield f"-j {BRANCH[direction]}"


def _bridged_rules(version: int, options: Options) -> Iterator[str]:
    """An isolated pod on a bridge is reached neither on a link-local address nor by broadcast or multicast.

    Nor does it reach anybody from its link-local address, by which it is not dispatched. A packet to everybody can
    come in a frame to one, from a pod that makes its own frames: hence addresses beside the packet type."""
    bridged = "-m physdev --physdev-is-bridged"
    if version != V4:
        yield f"-d fe80::/10 {bridged} -j DROP"
        yield f"-s fe80::/10 ! -d ff00::/8 {bridged} -j DROP"
    if options.multicast:
        return
    if version == V4:
        yield f"-m pkttype ! --pkt-type unicast {bridged} -j DROP"
        yield f"-d 224.0.0.0/4 {bridged} -j DROP"
        yield f"-d 255.255.255.255 {bridged} -j DROP"
    else:
        yield f"-d ff00::/8 {bridged} -j DROP"


def holder_names(node: Node, address: Address) -> str:
    """Who holds an address: NAMESPACE/NAME/UID, of the uid its beginning.

    It stands in the dispatch's comment, so that an agent that starts again sees whether the address has changed hands
    meanwhile. A pod that was made anew under its old name is another (semantics.md line 46)."""
    holders = sorted(
        (holder.key, re.sub("[^A-Za-z0-9]", "_", holder.uid[:8])) for holder in node.cluster.holders(address)
    )
    return " ".join(f"{key}/{uid}" if uid else key for key, uid in holders)


def bucket_rules(direction: str, entries: Iterable[tuple[Address, Dispatch]]) -> list[str]:
    """The dispatch of the isolated addresses of one bucket; a pod reaches itself (semantics.md line 37)."""
    own, peer = ("-s", "-d") if direction == EGRESS else ("-d", "-s")
    rules = []
    for address, dispatch in sorted(entries):
        text = format_address(address)
        ends = f"{own} {text} ! {peer} {text}"
        rules.append(f"{ends} {_comment(dispatch.pods)} -g {dispatch.chain.name}")
    return rules


def chain_rules(chain: Chain) -> list[str]:
    """The rules of a class chain."""
    return [_rule(rule, chain.direction) for rule in chain.rules]


def _rule(rule: Rule, direction: str) -> str:
    match = rule.match
    peer_side, peer_flag = ("src", "-s") if direction == INGRESS else ("dst", "-d")
    parts = []
    if isinstance(match.peer, Prefix):
        parts.append(f"{peer_flag} {match.peer}")
    if match.protocol is not None:
        parts.append(f"-p {match.protocol.lower()}")
    if match.ports:
        parts.append(_ports(match.protocol, match.ports))
    if match.named is not None:
        parts.append(f"-m set --match-set {match.named.name} dst,dst")
    if isinstance(match.peer, SetSpec):
        parts.append(f"-m set --match-set {match.peer.name} {peer_side}")
    parts.append(_comment(f"{rule.digest} {rule.origin}"))
    parts.append(_TARGET[rule.verdict])
    return " ".join(parts)


def _ports(protocol: str | None, ports: tuple[tuple[int, int], ...]) -> str:
    spans = [str(low) if low == high else f"{low}:{high}" for low, high in ports]
    if len(spans) == 1 and protocol:
        return f"-m {protocol.lower()} --dport {spans[0]}"
    return f"-m multiport --dports {','.join(spans)}"


def _comment(text: str) -> str:
    """Nothing in it can end the quotes."""
    clean = re.sub(r"[^A-Za-z0-9 ._/\[\]-]", "_", text)[:COMMENT_BYTES].rstrip()
    return f'-m comment --comment "{clean}"'


def table(node: Node, version: int, options: Options) -> dict[str, list[str]]:
    """All our chains of one family: name → rules."""
    directions = isolated_directions(node, version)
    chains = fixed_chains(version, isolates=node.isolates, directions=directions, options=options)
    for direction in DIRECTIONS:
        buckets: dict[int, list[tuple[Address, Dispatch]]] = {n: [] for n in range(BUCKETS)}
        for address, dispatch in node.dispatch[direction].items():
            if family(address) == version:
                named = dispatch._replace(pods=holder_names(node, address))
                buckets[bucket_of(address)].append((address, named))
        for number, entries in buckets.items():
            chains[bucket_name(direction, number)] = bucket_rules(direction, entries)
    for (chain_family, name), chain in sorted(node.chains.items()):
        if chain_family == version:
            chains[name] = chain_rules(chain)
    return chains


def restore_text(*, write: dict[str, list[str]], remove: Iterable[str] = (), rules: Iterable[str] = ()) -> str:
    """One transaction for `iptables-restore --noflush`: chains written whole, single rules, chains removed."""
    removed = sorted(remove)
    lines = ["*filter"]
    lines += [f":{name} - [0:0]" for name in write]
    lines += [f"-A {name} {rule}" for name, chain in write.items() for rule in chain]
    lines += rules
    lines += [f"-F {name}" for name in removed]
    lines += [f"-X {name}" for name in removed]
    return "\n".join([*lines, "COMMIT", ""])


# --- sets ------------------------------------------------------------------------------------------------------------


def create_text(name: str, kind: SetKind, version: int) -> str:
    inet = "inet" if version == V4 else "inet6"
    return f"create {name} {kind.value} family {inet} hashsize {HASHSIZE} maxelem {MAXELEM}"


def format_member(member: Member) -> str:
    """A member as `ipset save` prints it."""
    if isinstance(member, bytes):
        return inet_ntop(AF_INET if len(member) == 4 else AF_INET6, member)
    if isinstance(member, Prefix):
        full = member.length == member.bits
        return str(member).partition("/")[0] if full else str(member)
    address, protocol, number = member
    return f"{format_member(address)},{protocol.lower()}:{number}"


def ipset_text(node: Node) -> str:
    """All sets, for `ipset restore`."""
    lines = []
    for name, active in sorted(node.sets.active.items()):
        lines.append(create_text(name, active.spec.kind, active.spec.family))
        lines += [f"add {name} {text}" for text in sorted({format_member(m) for m in active.members()})]
    return "\n".join([*lines, ""])


def iptables_text(node: Node, version: int, options: Options) -> str:
    """The transaction that brings an empty kernel to the desired state of one family."""
    return restore_text(write=table(node, version, options), rules=[f"-I FORWARD 1 {JUMP}"])


def render(node: Node, options: Options) -> str:
    """What `apply` would load into an empty kernel, as text to read and to load."""
    parts = ["# ipset restore", ipset_text(node)]
    for version in FAMILIES:
        tool = "iptables" if version == V4 else "ip6tables"
        parts += [f"# {tool}-restore --noflush", iptables_text(node, version, options)]
    return "\n".join(parts)
