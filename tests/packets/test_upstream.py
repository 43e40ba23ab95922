"""The 48 upstream cases as packets: expectations written by hand, through the real dataplane, changed live."""

from __future__ import annotations

from functools import partial

import pytest

from agent.lab.spec import Mode
from tests.lab.world import BACKENDS, MODES, needs_root
from tests.packets.cases import play_all
from tests.packets.lanes import dealt, run_lanes, said
from tests.upstream import CASES

pytestmark = needs_root

LANES = 6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_cases(backend: str, mode: Mode) -> None:
    wrong = run_lanes([partial(play_all, cases, backend, mode) for cases in dealt(CASES, LANES)])
    assert not wrong, said(wrong)


def test_all_48_are_there() -> None:
    assert [case.number for case in CASES] == list(range(1, 49))
