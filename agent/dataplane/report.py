"""What a sync did to the kernel, as numbers and in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from agent.dataplane.errors import KernelError


@dataclass
class Report:
    """What a sync did, as counters of kernel writes, and how long it took, in seconds by stage.

    `refused` counts what the kernel refused at first, by stage; `attempts` are one more than that."""

    sets_created: int = 0
    sets_destroyed: int = 0
    members_added: int = 0
    members_deleted: int = 0
    transactions: int = 0
    chains_written: int = 0
    chains_removed: int = 0
    jumps_set: int = 0
    connections_forgotten: int = 0
    attempts: int = 1
    refused: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Add another report's writes."""
        for name, value in vars(other).items():
            if isinstance(value, int) and name != "attempts":
                setattr(self, name, getattr(self, name) + value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        begin = perf_counter()
        try:
            yield
        except KernelError as error:
            error.stage = error.stage or name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begin

    @property
    def writes(self) -> int:
        """Kernel writes in all; 0 means that nothing was touched."""
        return (
            self.sets_created
            + self.sets_destroyed
            + self.members_added
            + self.members_deleted
            + self.transactions
            + self.connections_forgotten
        )

    def __str__(self) -> str:
        """The writes in words."""
        parts = [
            _changed("set", self.sets_created, self.sets_destroyed),
            _changed("set member", self.members_added, self.members_deleted),
            _changed("chain", self.chains_written, self.chains_removed, verb="written"),
            f"{plural(self.connections_forgotten, 'connection')} forgotten" if self.connections_forgotten else "",
        ]
        return ", ".join(part for part in parts if part) or "rules put back in place"


def plural(number: int, noun: str) -> str:
    """`1 policy`, `2 policies`, `3 classes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _changed(noun: str, more: int, fewer: int, *, verb: str = "added") -> str:
    plus = f"{plural(more, noun)} {verb}" if more else ""
    minus = f"{plural(fewer, noun)} removed" if fewer else ""
    return ", ".join(part for part in (plus, minus) if part)
