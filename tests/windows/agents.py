"""The real agent's writer in the field: it makes the steps of a walk, one process after another where that is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from agent.lab import enclosure
from agent.lab.spec import node_key
from tests.dataplane.kernel import Kernel
from tests.dataplane.scenes import Agent, desired
from tests.windows.field import NODE, Field
from tests.windows.promise import Objects, Step


class Writer:
    """An agent on the node of a field. The first world comes before the flood."""

    def __init__(self, field: Field, backend: str) -> None:
        self.field = field
        self.backend = backend
        self._agent: Agent | None = None

    def close(self) -> None:
        if self._agent is not None:
            self._agent.dataplane.close()
            self._agent = None

    def begin(self, objects: Objects) -> None:
        """Enforce a world, whatever was there, while nothing is asked."""
        self.field.count()
        with self.field.fabric.inside(node_key(NODE)):
            self.restart(objects)

    def walk(self, steps: Iterable[Step], *, check: bool = True) -> None:
        """Make the steps under the flood; in the end the kernel must hold what the last world asks for."""
        first, *others = steps
        self.begin(first.after)
        for step in others:
            self.field.under_flood(step.title, step.asked, lambda step=step: self._make(step))  # type: ignore[misc]
        if check:
            self.check()

    def _make(self, step: Step) -> None:
        if step.restart or self._agent is None:
            self.restart(step.after)
        else:
            self._agent.change(step.after)

    def restart(self, objects: Objects) -> None:
        """Another process, which finds what is there."""
        self.close()
        self._agent = Agent(self.backend, objects)
        self._agent.sync()

    def check(self, *, look: bool = False) -> None:
        """The kernel holds what the objects ask for, as if written from scratch.

        `look`: after reading the kernel again, as the live agent does a second after its start: a tool that a killed
        agent had begun may end only then."""
        assert self._agent is not None
        with self.field.fabric.inside(node_key(NODE)):
            if look:
                time.sleep(0.1)
                self._agent.resync()
            self._agent.sync()  # sets that a rule still used a moment ago
            held: dict[str, Any] = Kernel(self.backend).ours()
        wanted = desired(self._agent.objects)
        assert held == wanted, [(k, held.get(k), wanted.get(k)) for k in held | wanted if held.get(k) != wanted.get(k)]


def under_flood(backend: str, body: Callable[[Field, Writer], None]) -> None:
    """Run a body with a field and a writer in an enclosure; its failure is the test's."""

    def work() -> int:
        with Field() as field:
            writer = Writer(field, backend)
            body(field, writer)
            writer.close()
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"
