"""The 45 upstream cases of TCP and UDP against `netpol-agent run` on both nodes of a real cluster: real pods and
policies, the full matrix of each step in both families. SCTP is for `tests/packets`: agnhost does not serve it on all
kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kube import NODES, needs_cluster
from tests.cluster.live import Agents
from tests.cluster.places import Places
from tests.cluster.stage import Serving, Stage, staged
from tests.upstream import CASES, Case

pytestmark = needs_cluster

PLAYED = [case for case in CASES if case.protocol != "SCTP"]


@pytest.fixture(scope="module")
def stage(agents: Agents, places: Places) -> Iterator[Stage]:
    assert set(agents) == set(NODES)
    with staged(Stage("upstream-", PLAYED, places, Serving(((80, 80), (81, 81))))) as made:
        yield made


@pytest.mark.parametrize("case", PLAYED, ids=lambda case: f"{case.number}-{case.title}")
def test_case(stage: Stage, case: Case) -> None:
    try:
        stage.play(case)
    finally:
        stage.end()


def test_all_45_are_there() -> None:
    assert len(PLAYED) == 45
