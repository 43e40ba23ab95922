"""The sets that this node's rules use, kept from the selectors' point of view.

A set's members follow from the cluster's present state; nothing is remembered of the past. What is kept beside is a
journal of members that may have changed, so that a delta costs what was touched and not the size of the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from agent.core.addresses import Address, Prefix, family
from agent.core.policy import PodPeer
from agent.core.rules import Member, NamedPortSet, PeerSet, PrefixSet, SetSpec
from agent.core.selectors import EVERYTHING, SelectorIndex
from agent.core.state import Cluster, Group, NamespaceChange, PodChange, PodRecord


class ActiveSet:
    """A set in use on this node. `touched` None means that all of it is to be compared."""

    __slots__ = ("_cluster", "selections", "spec", "touched", "uses")

    def __init__(self, spec: SetSpec, selections: tuple[Selection, ...], cluster: Cluster) -> None:
        self.spec = spec
        self.selections = selections
        self.uses = 0
        self.touched: set[Member] | None = None
        self._cluster = cluster

    def members(self) -> Iterator[Member]:
        """All members, perhaps with doubles."""
        spec = self.spec
        if isinstance(spec, PrefixSet):
            yield from spec.prefixes
            return
        for group, address in self._candidates():
            member = self.member_of(group, address)
            if member is not None:
                yield member

    def _candidates(self) -> Iterator[tuple[Group, Address]]:
        if isinstance(self.spec, NamedPortSet) and self.spec.local:
            for address in self._cluster.judged:  # the node's own, not the cluster's
                for holder in self._cluster.holders(address):
                    if holder.group is not None and self._selects(holder.group):
                        yield holder.group, address
            return
        for selection in self.selections:
            for group in selection.groups:
                for pod in group.pods:
                    for address in pod.addresses:
                        yield group, address

    def _selects(self, group: Group) -> bool:
        return any(group in selection.groups for selection in self.selections)

    def member_of(self, group: Group, address: Address) -> Member | None:
        """What a pod of a selected group adds to the set by holding the address, if anything."""
        spec = self.spec
        if family(address) != spec.family:
            return None
        if isinstance(spec, NamedPortSet):
            number = group.resolve(spec.port, spec.protocol)
            if number is None or (spec.local and address not in self._cluster.judged):
                return None
            if spec.within is not None and not any(prefix.holds(address) for prefix in spec.within):
                return None
            return address, spec.protocol, number
        return address

    def contains(self, member: Member) -> bool:
        """Whether the member belongs into the set now (line 24: any of the address's holders will do)."""
        if isinstance(self.spec, PrefixSet):
            return member in self.spec.prefixes
        address = member[0] if isinstance(member, tuple) and not isinstance(member, Prefix) else member
        assert isinstance(address, bytes)
        return any(
            self._selects(h.group) and self.member_of(h.group, address) == member
            for h in self._cluster.holders(address)
            if h.group is not None
        )

    def touch(self, group: Group, address: Address) -> None:
        if self.touched is None or family(address) != self.spec.family:
            return
        if isinstance(self.spec, NamedPortSet):
            number = group.resolve(self.spec.port, self.spec.protocol)
            if number is not None:
                self.touched.add((address, self.spec.protocol, number))
        else:
            self.touched.add(address)


class Selection:
    """The groups that one peer selects now, and the sets drawn from them."""

    __slots__ = ("groups", "peer", "sets")

    def __init__(self, peer: PodPeer) -> None:
        self.peer = peer
        self.groups: set[Group] = set()
        self.sets: list[ActiveSet] = []


class PeerSets:
    """All sets in use, by name. `acquire` and `release` count uses; changes of the cluster mark what they touch.

    Invariant: selection in group.selections ⇔ group in selection.groups ⇔ the peer selects the group now.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._selections: dict[PodPeer, Selection] = {}
        self._index: dict[str | None, SelectorIndex[Selection]] = {}
        self.active: dict[str, ActiveSet] = {}
        self._changed: set[str] = set()  # names of sets made, dropped or touched

    # --- sets come and go --------------------------------------------------------------------------------------------

    def acquire(self, spec: SetSpec) -> None:
        active = self.active.get(spec.name)
        if active is None:
            peers = spec.peers if isinstance(spec, PeerSet | NamedPortSet) else ()
            selections = tuple(self._select(peer) for peer in peers)
            active = self.active[spec.name] = ActiveSet(spec, selections, self._cluster)
            for selection in selections:
                selection.sets.append(active)
            self._changed.add(spec.name)
        active.uses += 1

    def release(self, spec: SetSpec) -> None:
        active = self.active[spec.name]
        active.uses -= 1
        if active.uses:
            return
        del self.active[spec.name]
        self._changed.add(spec.name)
        for selection in active.selections:
            selection.sets.remove(active)
            if not selection.sets:
                self._forget(selection)

    def _select(self, peer: PodPeer) -> Selection:
        selection = self._selections.get(peer)
        if selection is None:
            selection = self._selections[peer] = Selection(peer)
            self._index.setdefault(peer.namespace, SelectorIndex()).add(selection, peer.pods)
            for group in self._candidates(peer):
                if peer.pods.matches(group.labels):
                    selection.groups.add(group)
                    group.selections.add(selection)
        return selection

    def _candidates(self, peer: PodPeer) -> Iterable[Group]:
        groups = self._cluster.candidates(peer.namespace, peer.pods.anchors)
        if peer.namespaces is None:
            return groups
        spaces = self._cluster.namespaces.values()
        selected = {namespace.name for namespace in spaces if peer.namespaces.matches(namespace.labels)}
        return (group for group in groups if group.namespace in selected)

    def _forget(self, selection: Selection) -> None:
        peer = selection.peer
        del self._selections[peer]
        self._index[peer.namespace].discard(selection, peer.pods)
        for group in selection.groups:
            group.selections.discard(selection)

    def take_touched(self) -> dict[str, set[Member] | None]:
        """The members that may have changed since the last call, by set; None is all, of a set made or dropped."""
        taken: dict[str, set[Member] | None] = {}
        for name in self._changed:
            active = self.active.get(name)
            if active is None:
                taken[name] = None
            else:
                taken[name], active.touched = active.touched, set()
        self._changed = set()
        return taken

    # --- the cluster changes -----------------------------------------------------------------------------------------

    def apply_pod(self, change: PodChange) -> None:
        before, after = change
        if after is not None and after.group is not None and len(after.group.pods) == 1:
            self._enter(after.group)
        for pod in (before, after):
            if pod is not None:
                self._touch_pod(pod)
        if before is not None and before.group is not None and not before.group.pods:
            self._leave(before.group)

    def _touch_pod(self, pod: PodRecord) -> None:
        for address in pod.addresses:
            holders = [h for h in self._cluster.holders(address) if h is not pod]
            for holder in (pod, *holders):  # another holder's named port counts here only while the node judges it
                assert holder.group is not None
                for selection in holder.group.selections:
                    assert isinstance(selection, Selection)
                    self._touch(selection, holder.group, address)

    def _touch(self, selection: Selection, group: Group, address: Address) -> None:
        for active in selection.sets:
            active.touch(group, address)
            self._changed.add(active.spec.name)

    def _enter(self, group: Group) -> None:
        labels = group.labels
        namespace = self._cluster.namespaces.get(group.namespace)
        own = self._index.get(group.namespace, SelectorIndex())
        for selection in chain(own.matching(labels), self._index.get(None, SelectorIndex()).matching(labels)):
            wanted = selection.peer.namespaces
            if wanted is None or (namespace is not None and wanted.matches(namespace.labels)):
                selection.groups.add(group)
                group.selections.add(selection)

    def _leave(self, group: Group) -> None:
        for selection in group.selections:
            assert isinstance(selection, Selection)
            selection.groups.discard(group)
        group.selections.clear()

    def apply_namespace(self, change: NamespaceChange) -> None:
        """A namespace appears, is relabelled or goes: its groups join and leave namespaceSelectors (line 16)."""
        present = change.after or change.before
        assert present is not None
        index = self._index.get(None)
        if index is None:
            return
        for group in self._cluster.groups(present.name):
            for selection in index.matching(group.labels):
                wanted = selection.peer.namespaces
                if wanted is None:
                    continue
                member = change.after is not None and wanted.matches(change.after.labels)
                if member == (group in selection.groups):
                    continue
                if member:
                    selection.groups.add(group)
                    group.selections.add(selection)
                else:
                    selection.groups.discard(group)
                    group.selections.discard(selection)
                for pod in group.pods:
                    for address in pod.addresses:
                        self._touch(selection, group, address)


ALL_PODS = PodPeer(None, None, EVERYTHING)
"""Every pod of the cluster, of namespaces not yet seen too: what a named port without `to` resolves on (line 31)."""
