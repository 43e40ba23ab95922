"""From what is desired and what is applied to the ordered kernel operations between them. Pure.

Invariant: whichever operation the process dies after, no packet is let through that old and new state both deny, none
is lost that both allow (semantics.md line 44). It rests on this order, and on adds and deletes being separate batches:

  create and fill new sets → add to peer sets → add to named-port sets → forget released connections
  → one transaction per family → forget what the old rules have let in again → add a pod that starts to others' sets
  → delete from named-port sets → delete from peer sets → forget peers whose address another has → destroy sets

A packet does not see all of this at one moment. One that looks into set B before an address is added to it, and into A
after the address was deleted from it, misses both (seen once in 20,000 moves between 40 sets of a chain, under flood).
So where an address moves between two sets of one chain, every packet on its way is waited for before the deletes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

from agent.core.addresses import Address, Prefix, family
from agent.core.node import Journal, Node
from agent.core.peers import ActiveSet
from agent.core.policy import DIRECTIONS
from agent.core.rules import Member, NamedPortSet, SetKind
from agent.dataplane.applied import Applied, AppliedSet, AppliedTable, canonical, canonical_chain, dispatched
from agent.dataplane.render import (
    COMMENT_BYTES,
    JUMP,
    MAXELEM,
    Options,
    bucket_name,
    bucket_of,
    bucket_rules,
    chain_rules,
    fixed_chains,
    holder_names,
    isolated_directions,
    restore_text,
    table,
)


@dataclass(frozen=True)
class CreateSet:
    """An empty set."""

    name: str
    kind: SetKind
    family: int


@dataclass(frozen=True)
class AddMembers:
    """Members that a set lacks."""

    name: str
    kind: SetKind
    family: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class SwapSets:
    """Exchange the content of two sets, atomically."""

    name: str
    other: str


@dataclass(frozen=True)
class ForgetConnections:
    """Conntrack entries of addresses that changed hands (semantics.md line 46).

    `unanswered` are only those of somebody who sends to the address and was never answered."""

    addresses: tuple[Address, ...]
    unanswered: bool = False


@dataclass(frozen=True)
class Transaction:
    """One `iptables-restore --noflush` of one family: chains written whole, chains removed, the jump set right.

    `insert` holds (chain, position from 1, rule) for chains that only gain rules: where nothing is deleted, nft does
    not wait for a grace period of the kernel (10 to 20 ms) before the program ends."""

    family: int
    write: tuple[tuple[str, tuple[str, ...]], ...]
    insert: tuple[tuple[str, int, str], ...]
    remove: tuple[str, ...]
    jumps_to_delete: tuple[str, ...]
    insert_jump: bool

    @property
    def text(self) -> str:
        rules = [f"-D FORWARD {rule}" for rule in self.jumps_to_delete]
        rules += [f"-I FORWARD 1 {JUMP}"] if self.insert_jump else []
        rules += [f"-I {name} {position} {rule}" for name, position, rule in self.insert]
        return restore_text(write={n: list(r) for n, r in self.write}, remove=self.remove, rules=rules)

    @property
    def chains(self) -> tuple[str, ...]:
        """The chains that are written or gain rules."""
        return tuple(dict.fromkeys((*(name for name, _ in self.write), *(name for name, _, _ in self.insert))))

    @property
    def writes(self) -> int:
        """Chains and rules that change."""
        rules = len(self.insert) + len(self.jumps_to_delete) + int(self.insert_jump)
        return len(self.write) + len(self.remove) + rules


@dataclass(frozen=True)
class AwaitPackets:
    """A pause until no packet is on its way that looked into a set before the adds."""


@dataclass(frozen=True)
class DeleteMembers:
    """Members that a set has too many."""

    name: str
    kind: SetKind
    family: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class DestroySet:
    """A set that no rule uses any more, or that `makes_way` for another of its name at once."""

    name: str
    makes_way: bool = False


Operation = (
    CreateSet | AddMembers | SwapSets | ForgetConnections | Transaction | AwaitPackets | DeleteMembers | DestroySet
)


def plan(
    node: Node,
    journal: Journal,
    applied: Applied,
    options: Options,
    *,
    everything: bool,
    known: Set[Address] | None = None,
) -> list[Operation]:
    """The operations from `applied` to what `node` desires, in order; [] when they agree.

    Only what the journal names is compared, or `everything` after a restart, a refusal, or to find drift. `known` are
    the addresses that pods of this node had at the last sync, None when that is not known."""
    sets = _SetChanges(applied)
    touched = dict.fromkeys({*node.sets.active, *applied.sets}) if everything else journal.sets
    for name in sorted(touched):
        sets.compare(name, node.sets.active.get(name), applied.sets.get(name), touched[name])
    released = set(journal.released)
    transactions = []
    for version, held in sorted(applied.tables.items()):
        if everything:
            released.update(_handed_over(node, held))
            desired: Mapping[str, list[str] | None] = dict.fromkeys(held.chains) | table(node, version, options)
        else:
            desired = _touched_chains(node, journal, version, options)
        transaction = _transaction(desired, held, version)
        if transaction.writes:
            transactions.append(transaction)
    isolated: set[Address] = set()
    if everything or journal.dispatch or released:
        isolated = {address for table in node.dispatch.values() for address in table}
    started = isolated - known if known is not None else set()
    adds, late = _before_and_after(node, sets.adds, started)
    return [
        *sets.creates,
        *_of(adds, SetKind.NET, SetKind.IP),
        *_of(adds, SetKind.IP_PORT),
        *_forgetting(released),
        *transactions,
        *_forgetting(released & isolated),
        *_forgetting(started - released, unanswered=True),
        *late,
        *([AwaitPackets()] if _moves_within_a_chain(node, sets.adds, sets.deletes) else []),
        *_of(sets.deletes, SetKind.IP_PORT),
        *_of(sets.deletes, SetKind.IP, SetKind.NET),
        *_forgetting(journal.inherited - released),
        *sets.destroys.values(),
    ]


def _before_and_after(
    node: Node, adds: Iterable[AddMembers], started: Set[Address]
) -> tuple[list[AddMembers], list[AddMembers]]:
    """The adds before the transaction, and those after it: what others' policies allow a pod that starts.

    Until then it is not isolated (semantics.md line 45). What its own chains look up has to be there with them."""
    before, after = [], []
    for add in adds:
        spec = node.sets.active[add.name].spec
        own = isinstance(spec, NamedPortSet) and spec.local
        late = () if own else tuple(member for member in add.members if _address_of(member) in started)
        if late:
            after.append(replace(add, members=late))
        early = tuple(member for member in add.members if member not in late) if late else add.members
        if early:
            before.append(replace(add, members=early))
    return before, after


def _address_of(member: Member) -> Address | None:
    """The address that a member stands for; a prefix is none."""
    if isinstance(member, Prefix):
        return None
    return member if isinstance(member, bytes) else member[0]


def _forgetting(addresses: Iterable[Address], *, unanswered: bool = False) -> Iterator[ForgetConnections]:
    wanted = tuple(sorted(addresses))
    if wanted:
        yield ForgetConnections(wanted, unanswered)


def _handed_over(node: Node, held: AppliedTable) -> Iterator[Address]:
    """Addresses that the kernel dispatches for pods which do not hold them now: released while we were away."""
    for address, pods in dispatched(held).items():
        holders = set(holder_names(node, address).split())
        *names, last = pods.split() or [""]
        cut = len(pods) >= COMMENT_BYTES - 1  # one less where it was cut behind a blank
        if not holders.issuperset(names) or not any(h == last or (cut and h.startswith(last)) for h in holders):
            yield address


def _of(changes: list[AddMembers] | list[DeleteMembers], *kinds: SetKind) -> Iterator[AddMembers | DeleteMembers]:
    return (change for change in changes if change.kind in kinds)


def _moves_within_a_chain(node: Node, adds: Iterable[AddMembers], deletes: Iterable[DeleteMembers]) -> bool:
    """Whether a chain looks into a set that gains an address, and into one that loses it."""
    gaining, losing = _by_address(adds), _by_address(deletes)
    moves = [(gaining[address], losing[address]) for address in gaining.keys() & losing.keys()]
    if not moves:
        return False
    chains = [{spec.name for spec in chain.sets} for chain in node.chains.values()]
    return any(names & gained and names & lost for names in chains for gained, lost in moves)


def _by_address(changes: Iterable[AddMembers | DeleteMembers]) -> dict[Address, set[str]]:
    """The sets that gain or lose each address."""
    found: dict[Address, set[str]] = {}
    for change in changes:
        for address in map(_address_of, change.members):
            if address is not None:
                found.setdefault(address, set()).add(change.name)
    return found


_BESIDE = "npa-t-"


def is_beside(name: str) -> bool:
    """Whether a set is one that is built beside another, to be swapped."""
    return name.startswith(_BESIDE)


class _SetChanges:
    def __init__(self, applied: Applied) -> None:
        self._applied = applied
        self.creates: list[Operation] = []
        self.adds: list[AddMembers] = []
        self.deletes: list[DeleteMembers] = []
        self.destroys: dict[str, DestroySet] = {}

    def compare(
        self, name: str, active: ActiveSet | None, held: AppliedSet | None, touched: set[Member] | None
    ) -> None:
        if active is None:
            if held is not None:
                self.destroys[name] = DestroySet(name)
            return
        spec = active.spec
        if held is None:
            self._build(name, active)
        elif (held.kind, held.family) != (spec.kind.value, spec.family):
            # Not the set that our rules use, since theirs has this content's type: somebody's of the same name.
            self.creates.append(DestroySet(name, makes_way=True))
            self._build(name, active)
        elif held.odd or held.maxelem < MAXELEM:
            beside = _BESIDE + name.removeprefix("npa")
            if beside in self._applied.sets:
                self.creates.append(DestroySet(beside, makes_way=True))
            self._build(beside, active)
            self.creates.append(SwapSets(beside, name))
            self.destroys[beside] = DestroySet(beside)
        else:
            self._members(name, active, held, touched)

    def _build(self, name: str, active: ActiveSet) -> None:
        spec = active.spec
        self.creates.append(CreateSet(name, spec.kind, spec.family))
        members = tuple(set(active.members()))
        if members:
            self.creates.append(AddMembers(name, spec.kind, spec.family, members))

    def _members(self, name: str, active: ActiveSet, held: AppliedSet, touched: set[Member] | None) -> None:
        spec = active.spec
        if touched is None:
            wanted = set(active.members())
            adds, deletes = wanted - held.members, held.members - wanted
        else:
            adds = {m for m in touched if m not in held.members and active.contains(m)}
            deletes = {m for m in touched if m in held.members and not active.contains(m)}
        if adds:
            self.adds.append(AddMembers(name, spec.kind, spec.family, tuple(adds)))
        if deletes:
            self.deletes.append(DeleteMembers(name, spec.kind, spec.family, tuple(deletes)))


def _transaction(desired: Mapping[str, list[str] | None], applied: AppliedTable, version: int) -> Transaction:
    """From the desired rules of some chains, None for those that must not be."""
    write: list[tuple[str, tuple[str, ...]]] = []
    insert: list[tuple[str, int, str]] = []
    for name, rules in desired.items():
        if rules is None:
            continue
        held, wanted = applied.chains.get(name), canonical_chain(rules)
        if held == wanted:
            continue
        if held is not None and tuple(rule for rule in wanted if rule in held) == held:
            insert += [(name, n, rule) for n, rule in enumerate(rules, 1) if wanted[n - 1] not in held]
        else:
            write.append((name, tuple(rules)))
    stray = {word for rule in applied.strays for word in rule.split()}  # what others lead into cannot be removed yet
    unwanted = (name for name, rules in desired.items() if rules is None and name in applied.chains)
    remove = tuple(sorted(name for name in unwanted if name not in stray))
    jumps = () if applied.first else tuple(applied.jumps)
    return Transaction(version, tuple(write), tuple(insert), remove, jumps, not applied.first)


def _touched_chains(node: Node, journal: Journal, version: int, options: Options) -> dict[str, list[str] | None]:
    """What the journal names: name → rules, or None for chains that are no longer wanted."""
    chains: dict[str, list[str] | None] = {}
    for chain_family, name in sorted(journal.chains):
        if chain_family == version:
            chain = node.chains.get((version, name))
            chains[name] = chain_rules(chain) if chain else None
    for direction in DIRECTIONS:
        # Who holds an address is in the comment, so it is written again when another pod of the same name does.
        renamed = {(direction, address) for address in journal.released if address in node.dispatch[direction]}
        changed = journal.dispatch | renamed
        numbers = {bucket_of(a) for d, a in changed if d == direction and family(a) == version}
        for number in sorted(numbers):
            entries = (
                (address, dispatch._replace(pods=holder_names(node, address)))
                for address, dispatch in node.dispatch[direction].items()
                if family(address) == version and bucket_of(address) == number
            )
            chains[bucket_name(direction, number)] = bucket_rules(direction, entries)
    if journal.dispatch:
        directions = isolated_directions(node, version)
        chains.update(fixed_chains(version, isolates=node.isolates, directions=directions, options=options))
    return chains


def record(applied: Applied, operation: Operation) -> None:
    """Bring the mirror up to date with an operation that the kernel has carried out."""
    match operation:
        case CreateSet(name, kind, version):
            applied.sets[name] = AppliedSet(kind.value, version, MAXELEM)
        case AddMembers(name, _, _, members):
            applied.sets[name].members.update(members)
        case DeleteMembers(name, _, _, members):
            applied.sets[name].members.difference_update(members)
        case SwapSets(name, other):
            applied.sets[name], applied.sets[other] = applied.sets[other], applied.sets[name]
        case DestroySet(name):
            applied.sets.pop(name, None)
        case Transaction():
            held = applied.tables[operation.family]
            for name, rules in operation.write:
                held.chains[name] = canonical_chain(rules)
            for name, position, rule in operation.insert:
                before = held.chains[name]
                held.chains[name] = (*before[: position - 1], canonical(rule), *before[position - 1 :])
            for name in operation.remove:
                del held.chains[name]
            if operation.insert_jump:
                held.jumps, held.first = [JUMP], True
        case ForgetConnections() | AwaitPackets():
            pass


def removal(applied: Applied) -> Iterable[Operation]:
    """What takes all of ours away, and nothing else: rules first, sets after."""
    for version, held in sorted(applied.tables.items()):
        if held.chains or held.jumps:
            yield Transaction(version, (), (), tuple(sorted(held.chains)), tuple(held.jumps), False)
    for name in sorted(applied.sets):
        yield DestroySet(name)
