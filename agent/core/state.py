"""The cluster as last seen: namespaces, pods as groups of equal ones, and who holds which address.

Pure function of the objects, whatever the order in which they came. `apply_*` answers with what really changed;
None means that nothing did, and an update of a status stops here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.core.addresses import Address
from agent.core.objects import NamedPort, Namespace, Pod

LabelItems = tuple[tuple[str, str], ...]


class Group:
    """Live pods of equal namespace, labels and named ports: a selector is evaluated once for all of them."""

    __slots__ = ("labels", "namespace", "pods", "ports", "selections")

    def __init__(self, namespace: str, labels: LabelItems, ports: tuple[NamedPort, ...]) -> None:
        self.namespace = namespace
        self.labels: dict[str, str] = dict(labels)
        self.ports = ports
        self.pods: set[PodRecord] = set()
        self.selections: set[object] = set()  # kept by agent.core.peers: the selections that hold this group

    def resolve(self, name: str, protocol: str) -> int | None:
        """The number of a named port; the first that fits wins (semantics.md line 30)."""
        for port in self.ports:
            if port.name == name and port.protocol == protocol:
                return port.number
        return None

    @property
    def identity(self) -> tuple[str, LabelItems, tuple[NamedPort, ...]]:
        return self.namespace, tuple(self.labels.items()), self.ports


class PodRecord:
    """A known pod. `group` is None unless it is live and has an address of its own (lines 22 and 23)."""

    __slots__ = ("addresses", "group", "key", "local", "uid")

    def __init__(self, key: str, uid: str, local: bool, group: Group | None, addresses: tuple[Address, ...]) -> None:
        self.key = key
        self.uid = uid
        self.local = local
        self.group = group
        self.addresses = addresses


class PodChange(NamedTuple):
    """A pod's membership before and after; either is None when it was or is in no group."""

    before: PodRecord | None
    after: PodRecord | None


class NamespaceChange(NamedTuple):
    """A namespace's labels before and after; None is unseen."""

    before: Namespace | None
    after: Namespace | None


class Cluster:
    """All pods and namespaces. `node` None counts every pod as local: the whole cluster is judged at once."""

    def __init__(self, node: str | None) -> None:
        self.node = node
        self.namespaces: dict[str, Namespace] = {}
        self.pods: dict[str, PodRecord] = {}
        self._groups: dict[str, dict[tuple[LabelItems, tuple[NamedPort, ...]], Group]] = {}
        self._labelled: dict[tuple[str, str], set[Group]] = {}
        self._holders: dict[Address, PodRecord | tuple[PodRecord, ...]] = {}
        self.judged: set[Address] = set()  # addresses that this node judges: a live pod of the node holds them

    # --- questions ---------------------------------------------------------------------------------------------------

    def holders(self, address: Address) -> tuple[PodRecord, ...]:
        """The live pods that hold an address: mostly one, for a moment several (line 24)."""
        found = self._holders.get(address, ())
        return found if isinstance(found, tuple) else (found,)

    def groups(self, namespace: str | None = None) -> Iterator[Group]:
        """The groups of one namespace, or all."""
        if namespace is not None:
            yield from self._groups.get(namespace, {}).values()
            return
        for groups in self._groups.values():
            yield from groups.values()

    def candidates(self, namespace: str | None, anchors: Iterable[tuple[str, str]]) -> Iterable[Group]:
        """Few groups among which are all of a namespace, or of any, that have one of these labels; () asks for none."""
        labelled = [self._labelled.get(anchor, set()) for anchor in anchors]
        if namespace is not None:
            groups = self._groups.get(namespace, {})
            if not labelled or sum(map(len, labelled)) > len(groups):
                return groups.values()
            return [group for group in set().union(*labelled) if group.namespace == namespace]
        return set().union(*labelled) if labelled else self.groups()

    # --- changes -----------------------------------------------------------------------------------------------------

    def apply_namespace(self, namespace: Namespace) -> NamespaceChange | None:
        before = self.namespaces.get(namespace.name)
        if before == namespace:
            return None
        self.namespaces[namespace.name] = namespace
        return NamespaceChange(before, namespace)

    def delete_namespace(self, name: str) -> NamespaceChange | None:
        before = self.namespaces.pop(name, None)
        return NamespaceChange(before, None) if before else None

    def apply_pod(self, pod: Pod) -> PodChange | None:
        """Pods on the host's network are in no group: never selected, never a peer (line 22)."""
        key = pod.key
        before = self.pods.get(key)
        local = self.node is None or pod.node == self.node
        labels = tuple(sorted(pod.labels.items()))
        grouped = pod.live and not pod.host_network
        if before is not None and before.uid == pod.uid and before.local == local:
            group = before.group
            same = (
                group is not None
                and grouped
                and before.addresses == pod.addresses
                and group.ports == pod.ports
                and group.labels == pod.labels
            )
            if same or (group is None and not grouped):
                return None
        group = self._group(pod.namespace, labels, pod.ports) if grouped else None
        after = PodRecord(key, pod.uid, local, group, pod.addresses if grouped else ())
        self.pods[key] = after
        return self._move(before, after)

    def delete_pod(self, key: str) -> PodChange | None:
        before = self.pods.pop(key, None)
        return self._move(before, None) if before else None

    def _group(self, namespace: str, labels: LabelItems, ports: tuple[NamedPort, ...]) -> Group:
        groups = self._groups.setdefault(namespace, {})
        group = groups.get((labels, ports))
        if group is None:
            group = groups[labels, ports] = Group(namespace, labels, ports)
            for label in labels:
                self._labelled.setdefault(label, set()).add(group)
        return group

    def _move(self, before: PodRecord | None, after: PodRecord | None) -> PodChange | None:
        if after is not None and after.group is not None:
            after.group.pods.add(after)
            for address in after.addresses:
                self._set_holders(address, (*self.holders(address), after))
        if before is not None and before.group is not None:
            before.group.pods.discard(before)
            for address in before.addresses:
                self._set_holders(address, (h for h in self.holders(address) if h is not before))
            if not before.group.pods:
                self._drop(before.group)
        old = before if before is not None and before.group is not None else None
        new = after if after is not None and after.group is not None else None
        return PodChange(old, new) if old or new else None

    def _drop(self, group: Group) -> None:
        groups = self._groups[group.namespace]
        del groups[tuple(group.labels.items()), group.ports]
        if not groups:
            del self._groups[group.namespace]
        for label in group.labels.items():
            self._labelled[label].discard(group)
            if not self._labelled[label]:
                del self._labelled[label]

    def _set_holders(self, address: Address, holders: Iterable[PodRecord]) -> None:
        held = tuple(holders)
        if not held:
            self._holders.pop(address, None)
        else:
            self._holders[address] = held[0] if len(held) == 1 else held
        if any(h.local for h in held):
            self.judged.add(address)
        else:
            self.judged.discard(address)
