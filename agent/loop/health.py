"""Whether the agent lives, and whether it enforces what the cluster asks for; when not, why."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

STUCK = 60.0
"""Seconds without a turn of the writer after which it counts as stuck; there is one a second at least."""
NOT_YET = "nothing has been enforced yet"


class Health:
    """Set by the writer, read by `/livez` and `/readyz`. `watching` tells why the cluster is not known, if so."""

    def __init__(self, watching: Callable[[], list[str]]) -> None:
        self._watching = watching
        self._turn = monotonic()
        self.enforcing = NOT_YET  # why the kernel is not as desired, "" when it is
        self.unenforceable: tuple[str, ...] = ()  # what of this host passes by the rules

    def turned(self) -> None:
        """The writer came round."""
        self._turn = monotonic()

    def dead(self) -> str:
        """Why the process should be started anew; "" when it should not."""
        still = monotonic() - self._turn
        return f"the writer has been stuck for {still:.0f} s" if still > STUCK else ""

    def reasons(self) -> list[str]:
        """Why what the cluster asks for is not enforced here; [] when it is."""
        return [*self._watching(), *([self.enforcing] if self.enforcing else []), *self.unenforceable]
