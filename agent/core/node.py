"""The desired state of one node: sets, chains and the dispatch of its isolated pods, kept up with every change."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from agent.core.addresses import Address, family
from agent.core.compile import compile_chain
from agent.core.objects import Namespace, Pod
from agent.core.peers import PeerSets
from agent.core.policies import PolicyIndex
from agent.core.policy import DIRECTIONS, Policy
from agent.core.rules import Chain, Member
from agent.core.state import Cluster, PodChange


class Dispatch(NamedTuple):
    """One isolated address of this node: the chain that judges it, and the pods that hold it."""

    chain: Chain
    pods: str


class Journal(NamedTuple):
    """What may have changed since the last one; the dataplane compares these only.

    `sets` are names with the members to compare, None for all of them; `chains` (family, name); `dispatch` (direction,
    address). `released` are addresses that a local pod gave up, with connections that nobody may inherit
    (semantics.md line 46); `inherited` those of peers elsewhere that another pod has now."""

    sets: dict[str, set[Member] | None]
    chains: set[tuple[int, str]]
    dispatch: set[tuple[str, Address]]
    released: set[Address]
    inherited: AbstractSet[Address] = frozenset()


class Node:
    """What one node has to enforce. Depends on the objects only, never on the order in which they came.

    `apply_*` and `delete_*` take watch events; `compile` brings the desired state up to date; `journal` hands over what
    to compare. `node` None judges every pod of the cluster, as the lab and the explaining verbs do.
    """

    def __init__(self, node: str | None) -> None:
        self.cluster = Cluster(node)
        self.policies = PolicyIndex()
        self.sets = PeerSets(self.cluster)
        self.chains: dict[tuple[int, str], Chain] = {}
        self.dispatch: dict[str, dict[Address, Dispatch]] = {d: {} for d in DIRECTIONS}
        self._uses: dict[tuple[int, str], int] = {}
        self._classes: dict[tuple[str, int, tuple[Policy, ...]], Chain] = {}
        self._class_of: dict[tuple[str, Address], tuple[str, int, tuple[Policy, ...]]] = {}
        self._class_uses: dict[tuple[str, int, tuple[Policy, ...]], int] = {}
        self._by_namespace: dict[str, set[Address]] = {}  # judged addresses by the namespaces of their holders
        self._known: set[Address] = set()  # addresses that were judged when their holders last changed
        self._dirty: set[Address] = set()
        self._chains_changed: set[tuple[int, str]] = set()
        self._dispatch_changed: set[tuple[str, Address]] = set()
        self._released: set[Address] = set()
        self._departed: set[Address] = set()  # of peers elsewhere that have gone; nobody has them yet
        self._inherited: set[Address] = set()

    @property
    def isolates(self) -> bool:
        """Whether any pod of the node is isolated, in whatever family and direction."""
        return any(self.dispatch.values())

    @property
    def isolated_pods(self) -> set[str]:
        """namespace/name of this node's pods that are isolated in a family and direction."""
        return {pod for table in self.dispatch.values() for one in table.values() for pod in one.pods.split()}

    @property
    def enforced_policies(self) -> set[str]:
        """namespace/name of the policies that isolate a pod of this node."""
        return {key for chain in self.chains.values() for key in chain.rules[-1].origin.policies}

    # --- events ------------------------------------------------------------------------------------------------------

    def apply_namespace(self, namespace: Namespace) -> None:
        change = self.cluster.apply_namespace(namespace)
        if change:
            self.sets.apply_namespace(change)

    def delete_namespace(self, name: str) -> None:
        change = self.cluster.delete_namespace(name)
        if change:
            self.sets.apply_namespace(change)

    def apply_pod(self, pod: Pod) -> None:
        self._pod_changed(self.cluster.apply_pod(pod))

    def delete_pod(self, key: str) -> None:
        self._pod_changed(self.cluster.delete_pod(key))

    def apply_policy(self, policy: Policy) -> bool:
        """Whether that concerns a pod of this node, as the policy was or as it is."""
        before = self.policies.replace(policy.key, policy)
        return before != policy and self._policy_changed(before, policy)

    def delete_policy(self, key: str) -> bool:
        """Whether that concerns a pod of this node."""
        return self._policy_changed(self.policies.replace(key, None), None)

    def _pod_changed(self, change: PodChange | None) -> None:
        if change is None:
            return
        before, after = change
        was_peer = before is not None and before.group is not None and bool(before.group.selections)
        self.sets.apply_pod(change)
        same = after if before and after and before.uid == after.uid else None
        if before is not None and before.local:
            kept = same.addresses if same and same.local else ()
            self._released.update(a for a in before.addresses if a not in kept)
        elif before is not None and was_peer:
            for address in before.addresses:
                if same is None or address not in same.addresses:
                    (self._inherited if self.cluster.holders(address) else self._departed).add(address)
        if after is not None and same is None and self._departed:
            taken = self._departed.intersection(after.addresses)
            self._departed -= taken
            self._inherited |= taken
        for pod in (before, after):
            for address in pod.addresses if pod else ():
                self._address_changed(address, change)

    def _address_changed(self, address: Address, change: PodChange) -> None:
        judged = address in self.cluster.judged
        if not judged and address not in self._known:
            return  # nearly all of the cluster's pods end here
        (self._known.add if judged else self._known.discard)(address)
        holders = self.cluster.holders(address)
        present = {h.group.namespace for h in holders if h.group} if judged else set()
        for namespace in {p.group.namespace for p in (*change, *holders) if p and p.group}:
            addresses = self._by_namespace.setdefault(namespace, set())
            if namespace in present:
                addresses.add(address)
            else:
                addresses.discard(address)
                if not addresses:
                    del self._by_namespace[namespace]
        self._dirty.add(address)

    def _policy_changed(self, before: Policy | None, after: Policy | None) -> bool:
        policy = after or before
        if policy is None:
            return False
        concerned = False
        selectors = [p.selector for p in (before, after) if p]
        for address in self._by_namespace.get(policy.namespace, ()):
            for holder in self.cluster.holders(address):
                group = holder.group
                if group and group.namespace == policy.namespace and any(s.matches(group.labels) for s in selectors):
                    self._dirty.add(address)
                    concerned = True
        return concerned

    # --- compiling ---------------------------------------------------------------------------------------------------

    def compile(self) -> None:
        """Bring chains, sets and dispatch up to date with all events so far."""
        dirty, self._dirty = self._dirty, set()
        for address in sorted(dirty):
            holders = self.cluster.holders(address) if address in self.cluster.judged else ()
            policies = self.policies.selecting(h.group for h in holders if h.group)
            pods = " ".join(sorted(h.key for h in holders))
            for direction in DIRECTIONS:
                isolating = tuple(p for p in policies if p.rules(direction) is not None)
                self._assign(direction, address, isolating, pods)

    def _assign(self, direction: str, address: Address, policies: tuple[Policy, ...], pods: str) -> None:
        old = self._class_of.pop((direction, address), None)
        table = self.dispatch[direction]
        before = table.pop(address, None)
        if policies:
            new = (direction, family(address), policies)
            table[address] = Dispatch(self._use(new), pods)
            self._class_of[direction, address] = new
        if old is not None:
            self._drop(old)
        if table.get(address) != before:
            self._dispatch_changed.add((direction, address))

    def _use(self, key: tuple[str, int, tuple[Policy, ...]]) -> Chain:
        chain = self._classes.get(key)
        if chain is None:
            direction, version, policies = key
            chain = self._classes[key] = compile_chain(policies, direction, version)
            self._class_uses[key] = 0
            name = (version, chain.name)
            if name not in self.chains:
                self.chains[name] = chain
                self._chains_changed.add(name)
                for spec in chain.sets:
                    self.sets.acquire(spec)
            self._uses[name] = self._uses.get(name, 0) + 1
        self._class_uses[key] += 1
        return chain

    def _drop(self, key: tuple[str, int, tuple[Policy, ...]]) -> None:
        self._class_uses[key] -= 1
        if self._class_uses[key]:
            return
        del self._class_uses[key]
        chain = self._classes.pop(key)
        name = (chain.family, chain.name)
        self._uses[name] -= 1
        if not self._uses[name]:
            del self._uses[name], self.chains[name]
            self._chains_changed.add(name)
            for spec in chain.sets:
                self.sets.release(spec)

    def forget_departed(self) -> None:
        """Count the addresses of peers elsewhere that have gone, and that nobody has taken, as inherited: what is
        left of their connections goes with the next journal. Called now and then, else they are remembered for ever."""
        self._inherited |= self._departed
        self._departed = set()

    def journal(self) -> Journal:
        """Hand over what to compare, and begin anew; call after `compile`."""
        taken = Journal(
            self.sets.take_touched(), self._chains_changed, self._dispatch_changed, self._released, self._inherited
        )
        self._chains_changed = set()
        self._dispatch_changed, self._released, self._inherited = set(), set(), set()
        return taken

    def policies_selecting(self, address: Address) -> tuple[Policy, ...]:
        """The policies that select any holder of an address, whether the node judges it or not."""
        return self.policies.selecting(h.group for h in self.cluster.holders(address) if h.group)


def load(node: Node, namespaces: Iterable[Namespace], pods: Iterable[Pod], policies: Iterable[Policy]) -> Node:
    """Apply whole lists, and compile."""
    for namespace in namespaces:
        node.apply_namespace(namespace)
    for pod in pods:
        node.apply_pod(pod)
    for policy in policies:
        node.apply_policy(policy)
    node.compile()
    return node
