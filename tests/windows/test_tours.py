"""Each kind of change by itself, again and again under the flood; and the same with steps swapped, to see it caught."""

from __future__ import annotations

import os

import pytest

from tests.dataplane.scenes import pod
from tests.lab.world import BACKENDS, needs_root
from tests.windows import swapped
from tests.windows.agents import Writer, under_flood
from tests.windows.field import Field, Tally
from tests.windows.promise import Step, promised, tour
from tests.windows.tours import TOURS

pytestmark = needs_root
SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_kind_of_change(backend: str) -> None:
    def body(field: Field, writer: Writer) -> None:
        for title, (worlds, probes) in TOURS.items():
            before = field.tally.allowed, field.tally.denied
            steps = tour(worlds, probes, title, round(6 * SCALE))
            writer.walk(steps)
            field.count()
            assert field.tally.allowed > before[0], f"nothing that is allowed was asked in: {title}"
            if any(asked.shut for step in steps for asked in step.asked):
                assert field.tally.denied > before[1], f"nothing that is denied was asked in: {title}"
        field.expect_clean()

    under_flood(backend, body)


PEER_MOVES = "a peer moves between two rules of a policy"
OTHER_PEERS = "a policy gets other peers"
STARTS = "a pod with a named port starts and stops"
SWAPPED = [
    (swapped.deletes_before_adds, PEER_MOVES, "losses"),
    (swapped.flush_and_refill, "a peer moves beside others", "losses"),
    (swapped.rules_before_members, OTHER_PEERS, "losses"),
    (swapped.adds_after_rules, STARTS, "losses"),
    (swapped.deletes_before_rules, STARTS, "losses"),
    (swapped.two_transactions, OTHER_PEERS, "leaks"),
    (swapped.rules_of_classes_last, OTHER_PEERS, "leaks"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_count_finds_steps_that_are_swapped(backend: str) -> None:
    def body(field: Field, writer: Writer) -> None:
        for reorder, title, what in SWAPPED:
            field.tally = Tally()
            for _ in range(20):
                with swapped.writing(reorder):
                    writer.walk(tour(*TOURS[title], title, 10), check=False)
                field.count()
                if getattr(field.tally, what):
                    break
            print(f"{reorder.__name__}: {field.tally}")
            assert getattr(field.tally, what), f"{reorder.__name__} was not found: {field.tally}"

    under_flood(backend, body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_grows_and_shrinks(backend: str) -> None:
    """Thousands of members come and go in bulk beside the peer's: the kernel's table is made anew several times."""
    small, probes = (
        TOURS["a peer moves between two rules of a policy"].worlds[0],
        TOURS["a namespace is relabelled"].probes,
    )
    crowd = [pod(f"p{number}", 3 + number // 250, 1 + number % 250, role="a") for number in range(3000)]
    states = [small, [*small, *crowd]]
    promise = tuple(promised(probe, [small]) for probe in probes)

    def body(field: Field, writer: Writer) -> None:
        steps = [Step(f"{len(states[n % 2])} objects", states[n % 2], promise) for n in range(1, 1 + round(4 * SCALE))]
        writer.walk([Step("start", small, ()), *steps])
        field.count()
        field.expect_clean()

    under_flood(backend, body)
