"""Label selectors: compiled once, compared by content, found by a label that they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

Labels = Mapping[str, str]


class Requirement(NamedTuple):
    """One line of a selector. `operator` is In, NotIn, Exists or DoesNotExist; `values` are sorted and distinct."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Labels) -> bool:
        """semantics.md line 13: negating operators hold when the key is missing."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return self.key not in labels or labels[self.key] not in self.values
            case "Exists":
                return self.key in labels
            case _:
                return self.key not in labels


class Selector(NamedTuple):
    """All of its requirements must hold; without any it matches everything. Equal content is equal."""

    requirements: tuple[Requirement, ...] = ()

    @classmethod
    def of(cls, requirements: set[Requirement]) -> Selector:
        """The selector with its requirements in canonical order."""
        return cls(tuple(sorted(requirements)))

    def matches(self, labels: Labels) -> bool:
        for requirement in self.requirements:  # noqa: SIM110 (all() takes twice as long)
            if not requirement.holds(labels):
                return False
        return True

    @property
    def anchors(self) -> tuple[tuple[str, str], ...]:
        """Labels of which a match has at least one; empty when no such promise can be made."""
        for requirement in self.requirements:
            if requirement.operator == "In":
                return tuple((requirement.key, value) for value in requirement.values)
        return ()

    def __str__(self) -> str:
        words = {"In": " in ", "NotIn": " notin ", "Exists": "", "DoesNotExist": ""}
        return (
            ",".join(
                ("!" if r.operator == "DoesNotExist" else "")
                + (
                    f"{r.key}={r.values[0]}"
                    if r.operator == "In" and len(r.values) == 1
                    else r.key + words[r.operator] + (f"({' '.join(r.values)})" if r.values else "")
                )
                for r in self.requirements
            )
            or "everything"
        )


EVERYTHING = Selector()
T = TypeVar("T")


class SelectorIndex(Generic[T]):
    """Items by their selector, so that a set of labels meets only the selectors that can match it.

    Invariant: an item stands under each anchor of its selector, or under None when it has no anchor.
    """

    def __init__(self) -> None:
        self._items: dict[tuple[str, str] | None, dict[T, Selector]] = {}

    def add(self, item: T, selector: Selector) -> None:
        for anchor in selector.anchors or (None,):
            self._items.setdefault(anchor, {})[item] = selector

    def discard(self, item: T, selector: Selector) -> None:
        for anchor in selector.anchors or (None,):
            bucket = self._items.get(anchor, {})
            bucket.pop(item, None)
            if not bucket:
                self._items.pop(anchor, None)

    def matching(self, labels: Labels) -> Iterator[T]:
        """The items whose selector matches, each once."""
        for anchor in (None, *labels.items()):
            for item, selector in self._items.get(anchor, {}).items():
                if selector.matches(labels):
                    yield item

    def __bool__(self) -> bool:
        return bool(self._items)
