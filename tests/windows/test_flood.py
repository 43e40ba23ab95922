"""Thousands of changes under a flood of new connections: nothing leaks, nothing is lost.

NETPOL_TEST_SCALE multiplies the number of changes: 40 makes more than 5,000 for each backend."""

from __future__ import annotations

import os
import random
from functools import cache

import pytest

from tests.lab.world import BACKENDS, needs_root
from tests.windows.agents import Writer, under_flood
from tests.windows.field import Field
from tests.windows.promise import Step, random_walk

pytestmark = needs_root
SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))


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
        field.count()
        field.expect_clean()

    under_flood(backend, body)
