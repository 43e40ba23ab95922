"""Writers that are wrong on purpose: each takes a right plan and does two of its steps in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from agent.core.node import Node
from agent.dataplane import dataplane
from agent.dataplane.applied import Applied
from agent.dataplane.plan import AddMembers, CreateSet, DeleteMembers, DestroySet, Operation, Transaction, plan

Reorder = Callable[[Sequence[Operation], Node, Applied], list[Operation]]


@contextmanager
def writing(reorder: Reorder) -> Iterator[None]:
    """Dataplanes of this process do what `reorder` makes of each plan."""

    def wrong(node: Node, journal: Any, applied: Applied, *arguments: Any, **more: Any) -> list[Operation]:
        return reorder(plan(node, journal, applied, *arguments, **more), node, applied)

    with patch.object(dataplane, "plan", wrong):
        yield


def _first(operations: Sequence[Operation], kind: type | tuple[type, ...]) -> list[Operation]:
    early = [o for o in operations if isinstance(o, kind)]
    return early + [o for o in operations if o not in early]


def deletes_before_adds(operations: Sequence[Operation], _: Node, __: Applied) -> list[Operation]:
    """A member leaves its old set before it is in the new one."""
    return _first(operations, DeleteMembers)


def deletes_before_rules(operations: Sequence[Operation], _: Node, __: Applied) -> list[Operation]:
    """Sets lose members that the rules still there have need of."""
    late = [o for o in operations if isinstance(o, Transaction | DestroySet)]
    return [*(o for o in operations if o not in late), *late]


def rules_before_members(operations: Sequence[Operation], _: Node, __: Applied) -> list[Operation]:
    """New sets are made, and filled after the rules that use them are in force."""
    return _first(_first(operations, Transaction), CreateSet)


def _is_new(operation: Operation, applied: Applied) -> bool:
    return isinstance(operation, AddMembers) and operation.name not in applied.sets


def adds_after_rules(operations: Sequence[Operation], _: Node, applied: Applied) -> list[Operation]:
    """Sets that are there gain members only after the rules that have need of them."""
    late = [o for o in operations if isinstance(o, AddMembers) and not _is_new(o, applied)]
    return [*(o for o in operations if o not in late), *late]


def flush_and_refill(operations: Sequence[Operation], node: Node, applied: Applied) -> list[Operation]:
    """A set that changes is emptied and filled anew."""
    found: list[Operation] = []
    for operation in operations:
        if isinstance(operation, AddMembers | DeleteMembers) and operation.name in applied.sets:
            form = operation.name, operation.kind, operation.family
            found.append(DeleteMembers(*form, tuple(applied.sets[operation.name].members)))
            found.append(AddMembers(*form, tuple(set(node.sets.active[operation.name].members()))))
        else:
            found.append(operation)
    return found


def two_transactions(operations: Sequence[Operation], _: Node, __: Applied) -> list[Operation]:
    """Chains that change are emptied in one transaction and written in the next."""
    found: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Transaction):
            emptied = tuple((name, ()) for name, _ in operation.write)
            found.append(Transaction(operation.family, emptied, (), (), (), False))
        found.append(operation)
    return found


def rules_of_classes_last(operations: Sequence[Operation], _: Node, applied: Applied) -> list[Operation]:
    """Pods are sent to their new chains in one transaction, and these get their rules in the next."""
    found: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Transaction):
            held = applied.tables[operation.family].chains
            early = tuple((name, () if name not in held else rules) for name, rules in operation.write)
            found.append(Transaction(operation.family, early, (), (), (), False))
        found.append(operation)
    return found
