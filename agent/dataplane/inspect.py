"""What is programmed, told from the kernel alone, and how it differs from what should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from agent.core.addresses import family as family_of
from agent.core.addresses import parse_address
from agent.core.node import Journal, Node
from agent.core.policy import DIRECTIONS, EGRESS, INGRESS
from agent.core.rules import chain_name
from agent.dataplane.applied import Applied, CanonicalRule, canonical_chain, dispatched
from agent.dataplane.plan import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    Operation,
    SwapSets,
    Transaction,
    is_beside,
    plan,
)
from agent.dataplane.render import BUCKETS, ROOT, Options, bucket_name, bucket_of, fixed_chains, format_member

_LETTER = {"NPA-E-": EGRESS, "NPA-I-": INGRESS}
_MISPLACED = f"the jump to {ROOT} is not once and first in FORWARD"


class ProgrammedClass(NamedTuple):
    """A class chain in the kernel, the pods dispatched to it, and the policies that its comments name."""

    chain: str
    family: int
    direction: str
    pods: tuple[str, ...]
    policies: tuple[str, ...]
    rules: int


def programmed_classes(applied: Applied) -> list[ProgrammedClass]:
    """The class chains of all families."""
    found = []
    for version, table in sorted(applied.tables.items()):
        for name, rules in sorted(table.chains.items()):
            direction = _LETTER.get(name[:6])
            if direction is None:
                continue
            pods = sorted(
                " ".join(_without_uid(holder) for holder in _option(rule, "--comment").split())
                for number in range(BUCKETS)
                for rule in table.chains.get(bucket_name(direction, number), ())
                if _option(rule, "-g") == name
            )
            policies = _option(rules[-1], "--comment").split()[2:] if rules else []
            found.append(ProgrammedClass(name, version, direction, tuple(pods), tuple(policies), len(rules)))
    return found


def _without_uid(holder: str) -> str:
    return "/".join(holder.split("/")[:2])


def _option(rule: CanonicalRule, option: str) -> str:
    return next((item[len(option) + 1 :] for item in rule if item.startswith(f"{option} ")), "")


def drift(applied: Applied) -> Iterator[str]:
    """What is not as it was programmed, as far as the kernel alone can tell."""
    programmed = any(table.chains for table in applied.tables.values())
    for version, table in sorted(applied.tables.items()):
        family = f"IPv{version}"
        if programmed and not table.chains:
            yield f"{family}: all chains are missing"
        if not table.chains:
            continue
        if not table.first:
            yield f"{family}: {_MISPLACED}"
        for rule in table.strays:
            yield f"{family}: a rule that is not ours leads into a chain of ours: {rule}"
        isolates = any(dispatched(t) for t in applied.tables.values())
        options = [Options(multicast=flag) for flag in (False, True)]
        directions = {d for d in DIRECTIONS if any(table.chains.get(bucket_name(d, n)) for n in range(BUCKETS))}
        forms = [fixed_chains(version, isolates=isolates, directions=directions, options=o) for o in options]
        for name in forms[0]:
            if table.chains.get(name) not in [canonical_chain(form[name]) for form in forms]:
                yield f"{family}: the chain {name} was changed"
        buckets = {bucket_name(d, number): (d, number) for d in DIRECTIONS for number in range(BUCKETS)}
        targets: set[str] = set()
        for name, (direction, number) in buckets.items():
            if name not in table.chains:
                yield f"{family}: the chain {name} is missing"
            rules = table.chains.get(name, ())
            if not all(_dispatches(rule, direction, number, version) for rule in rules):
                yield f"{family}: the chain {name} was changed"
            targets.update(_option(rule, "-g") for rule in rules)
        for name, rules in sorted(table.chains.items()):
            judges = _LETTER.get(name[:6])
            if judges and chain_name(judges, version, [_option(r, "--comment")[:10] for r in rules]) != name:
                yield f"{family}: the chain {name} was changed"
            if judges and name not in targets:
                yield f"{family}: the chain {name} is used by no pod"
            if not judges and name not in buckets and name not in forms[0]:
                yield f"{family}: the chain {name} should not be there"


def _dispatches(rule: CanonicalRule, direction: str, number: int, version: int) -> bool:
    """Whether a rule is one of a bucket: an address of the bucket to a class of the direction."""
    own, peer = ("-s", "-d") if direction == EGRESS else ("-d", "-s")
    address, chain = _option(rule, own), _option(rule, "-g")
    form = [f"{own} {address}", f"! {peer} {address}", f"--comment {_option(rule, '--comment')}", f"-g {chain}"]
    if rule != tuple(sorted(form)) or _LETTER.get(chain[:6]) != direction or "/" in address:
        return False
    packed = parse_address(address)
    return family_of(packed) == version and bucket_of(packed) == number


def drift_from(node: Node, applied: Applied, options: Options) -> Iterator[str]:
    """What differs from what the node should have."""
    operations = plan(node, Journal({}, set(), set(), set()), applied, options, everything=True)
    made = {operation.name for operation in operations if isinstance(operation, CreateSet)}
    for operation in operations:
        yield from _told(operation, made, applied)


def _told(operation: Operation, made: set[str], applied: Applied) -> Iterator[str]:
    """`made` are the sets that are made anew: their members say nothing, nor does it when the old one goes."""
    match operation:
        case CreateSet(name) if not is_beside(name):
            yield f"the set {name} is {'of another form' if name in applied.sets else 'missing'}"
        case SwapSets(_, other):
            yield f"the set {other} is of another form"
        case AddMembers(name, _, _, members) if name not in made:
            yield f"the set {name} lacks {_some([format_member(m) for m in members])}"
        case DeleteMembers(name, _, _, members):
            yield f"the set {name} holds {_some([format_member(m) for m in members])} too many"
        case DestroySet(name) if name not in made:
            yield f"the set {name} should not be there"
        case Transaction():
            family = f"IPv{operation.family}"
            if operation.insert_jump:
                yield f"{family}: {_MISPLACED}"
            for name in operation.chains:
                yield f"{family}: the chain {name} is missing or was changed"
            for name in operation.remove:
                yield f"{family}: the chain {name} should not be there"


def _some(texts: list[str]) -> str:
    shown = sorted(texts)[:3]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
