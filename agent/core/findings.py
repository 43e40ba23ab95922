"""What was found wrong with an object: one typed record for the log, the Event, the metric and `lint`."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True, order=True):
    """One fault of one object, reported once.

    `id` is stable and in kebab-case, `object` reads `Kind namespace/name`, `field` is the path inside the
    object (`spec.ingress[0].from[1]`), `message` is one sentence, `source` is `file:line` where known.
    """

    id: str
    object: str
    field: str
    message: str
    source: str | None = None

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        field = f": {self.field}" if self.field else ""
        return f"{where}{self.object}{field}: {self.message} [{self.id}]"


UNDECODABLE = frozenset({"type-wrong", "null-item", "yaml-broken", "json-broken", "key-twice"})
"""Findings that the API server could not even have decoded: in a file they are bad input, exit 2 (line 53)."""


def where_wrong(error: Exception) -> tuple[str, str]:
    """(field, message) of what msgspec says of a wrong type: `... - at `$.spec.ports[...].port``."""
    message, _, place = str(error).partition(" - at ")
    field = place.strip("`").removeprefix("$").removeprefix(".").replace("[...]", "")
    return field, message[:1].lower() + message[1:]


class BadInput(Exception):
    """Input that cannot be decoded at all (semantics.md line 53); carries what was found, one per object and field."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(str(f) for f in findings))
        self.findings = findings
