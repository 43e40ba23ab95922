"""Thousands of changes under a flood of new connections: nothing leaks, nothing is lost.

NETPOL_TEST_SCALE multiplies the number of changes: 40 makes more than 5,000 for each backend."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache

import pytest

from agent.lab import enclosure
from tests.lab.world import BACKENDS, needs_root
from tests.windows.agents import Writer
from tests.windows.field import Field, Tally
from tests.windows.promise import Step, random_walk

pytestmark = needs_root
SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))


def under_flood(backend: str, body: Callable[[Field, Writer], None]) -> None:
    """Run a body with a field and a writer in an enclosure; its failure is the test's."""

    def work() -> int:
        with Field() as field:
            writer = Writer(field, backend)
            body(field, writer)
            writer.close()
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"


def clean(tally: Tally) -> None:
    """The tally of a flood that has found nothing, and has looked."""
    print(tally)
    assert tally.unseen == 0, "the counters missed packets"
    assert tally.arrived == tally.passed, "packets were lost behind the judgement"
    assert (tally.leaks, tally.losses) == (0, 0), "\n".join([str(tally), *tally.examples])
    assert tally.denied > 1000
    assert tally.allowed > 1000


@cache
def every_kind() -> list[list[Step]]:
    """The same walk for both backends; NETPOL_TEST_SEED gives another."""
    return random_walk(random.Random(os.environ.get("NETPOL_TEST_SEED", "")), round(120 * SCALE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_of_every_kind(backend: str) -> None:
    walks = every_kind()

    def body(field: Field, writer: Writer) -> None:
        for steps in walks:
            writer.walk(steps)
        clean(field.count())

    under_flood(backend, body)
