"""Thousands of changes under a flood of new connections: nothing leaks, nothing is lost.

NETPOL_TEST_SCALE multiplies the number of changes: 100 makes 6,000 for each backend. NETPOL_TEST_SEED gives others."""

from __future__ import annotations

import os
import random

import pytest

from tests.lab.world import BACKENDS, needs_root
from tests.windows.agents import Writer, under_flood
from tests.windows.field import Field
from tests.windows.promise import random_walk

pytestmark = needs_root
SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))
SEED = os.environ.get("NETPOL_TEST_SEED", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_of_every_kind(backend: str) -> None:
    def body(field: Field, writer: Writer) -> None:
        for number in range(round(2 * SCALE)):
            steps = random_walk(random.Random(f"{SEED} {number}"), 30)
            writer.walk(steps)
            field.count()
        field.expect_clean()

    under_flood(backend, body)
