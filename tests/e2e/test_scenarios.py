"""Scenarios A to D and the upstream cases, enforced by the chart's pods: the tests of tests/cluster, whose agents are
those of the release here."""

from __future__ import annotations

import pytest

from tests.cluster.kube import needs_cluster
from tests.cluster.test_run_scenarios import (
    kitchen,
    test_client_and_server,
    test_recipe,
    test_three_namespaces,
    test_three_tiers,
    tiers,
)
from tests.cluster.test_run_upstream import stage, test_all_45_are_there, test_case

__all__ = [
    "kitchen",
    "stage",
    "test_all_45_are_there",
    "test_case",
    "test_client_and_server",
    "test_recipe",
    "test_three_namespaces",
    "test_three_tiers",
    "tiers",
]

pytestmark = [*needs_cluster, pytest.mark.usefixtures("agents")]
