"""Which policies select which pods."""

from __future__ import annotations

from collections.abc import Iterable

from agent.core.policy import Policy
from agent.core.selectors import SelectorIndex
from agent.core.state import Group


class PolicyIndex:
    """All policies of the cluster, found by the namespace and labels of a pod."""

    def __init__(self) -> None:
        self.policies: dict[str, Policy] = {}
        self._by_namespace: dict[str, SelectorIndex[str]] = {}

    def replace(self, key: str, policy: Policy | None) -> Policy | None:
        """Put a policy in the place of what stood under its key, None to delete; answers what stood there."""
        before = self.policies.pop(key, None)
        namespace = key.partition("/")[0]
        index = self._by_namespace.setdefault(namespace, SelectorIndex())
        if before is not None:
            index.discard(key, before.selector)
        if policy is not None:
            self.policies[key] = policy
            index.add(key, policy.selector)
        elif not index:
            del self._by_namespace[namespace]
        return before

    def selecting(self, groups: Iterable[Group]) -> tuple[Policy, ...]:
        """The policies that select any of the groups, by key; several groups are holders of one address (line 24)."""
        keys: set[str] = set()
        for group in groups:
            index = self._by_namespace.get(group.namespace)
            if index is not None:
                keys.update(index.matching(group.labels))
        return tuple(self.policies[key] for key in sorted(keys))
