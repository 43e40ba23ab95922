"""What is programmed, told from the kernel alone, and how it differs from what should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from agent.core.node import Journal, Node
from agent.core.policy import EGRESS, INGRESS
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
    plan,
)
from agent.dataplane.render import BUCKETS, ROOT, Options, bucket_name, fixed_chains, format_member

_LETTER = {"NPA-E-": EGRESS, "NPA-I-": INGRESS}


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
                _option(rule, "--comment")
                for number in range(BUCKETS)
                for rule in table.chains.get(bucket_name(direction, number), ())
                if _option(rule, "-g") == name
            )
            policies = _option(rules[-1], "--comment").split()[2:] if rules else []
            found.append(ProgrammedClass(name, version, direction, tuple(pods), tuple(policies), len(rules)))
    return found


def _option(rule: CanonicalRule, option: str) -> str:
    return next((item[len(option) + 1 :] for item in rule if item.startswith(f"{option} ")), "")


def drift(applied: Applied) -> Iterator[str]:
    """What is not as it was programmed, as far as the kernel alone can tell."""
    for version, table in sorted(applied.tables.items()):
        family = f"IPv{version}"
        if not table.chains:
            continue
        if not table.first:
            yield f"{family}: the jump to {ROOT} is not once and first in FORWARD"
        isolates = bool(dispatched(table)) or any(dispatched(t) for t in applied.tables.values())
        options = [Options(multicast=flag) for flag in (False, True)]
        forms = [fixed_chains(version, isolates=isolates, options=o) for o in options]
        for name in forms[0]:
            if table.chains.get(name) not in [canonical_chain(form[name]) for form in forms]:
                yield f"{family}: the chain {name} was changed"
        targets = set()
        for direction in (EGRESS, INGRESS):
            for number in range(BUCKETS):
                name = bucket_name(direction, number)
                if name not in table.chains:
                    yield f"{family}: the chain {name} is missing"
                for rule in table.chains.get(name, ()):
                    targets.add(_option(rule, "-g"))
        for name, rules in sorted(table.chains.items()):
            judges = _LETTER.get(name[:6])
            if judges and chain_name(judges, version, [_option(r, "--comment")[:10] for r in rules]) != name:
                yield f"{family}: the chain {name} was changed"
            if judges and name not in targets:
                yield f"{family}: the chain {name} is used by no pod"


def drift_from(node: Node, applied: Applied, options: Options) -> Iterator[str]:
    """What differs from what the node should have."""
    for operation in plan(node, Journal({}, set(), set(), set()), applied, options, everything=True):
        yield from _told(operation)


def _told(operation: Operation) -> Iterator[str]:
    match operation:
        case CreateSet(name):
            yield f"the set {name} is missing"
        case AddMembers(name, _, _, members):
            yield f"the set {name} lacks {_some([format_member(m) for m in members])}"
        case DeleteMembers(name, _, _, members):
            yield f"the set {name} holds {_some([format_member(m) for m in members])} too many"
        case DestroySet(name):
            yield f"the set {name} should not be there"
        case SwapSets(_, other):
            yield f"the set {other} is too small"
        case Transaction():
            family = f"IPv{operation.family}"
            if operation.insert_jump:
                yield f"{family}: the jump to {ROOT} is not once and first in FORWARD"
            for name, _ in operation.write:
                yield f"{family}: the chain {name} is missing or was changed"
            for name in operation.remove:
                yield f"{family}: the chain {name} should not be there"


def _some(texts: list[str]) -> str:
    shown = sorted(texts)[:3]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
