"""Several enclosures at once: a denied packet is mostly a wait, and waits can be shared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from agent.lab import enclosure, supervision
from agent.lab.namespaces import die_with_parent

T = TypeVar("T")
Lane = Callable[[], list[str]]
"""Runs in an enclosure; answers with what it found wrong, a line each."""


def dealt(items: Sequence[T], hands: int) -> list[list[T]]:
    """The items, dealt out to so many hands in turn; empty hands are left out."""
    return [list(items[n::hands]) for n in range(min(hands, len(items)))]


def run_lanes(lanes: Sequence[Lane]) -> list[str]:
    """Run each lane in an enclosure of its own, all at once; what they found wrong, their own failure included."""
    started = [_start(lane) for lane in lanes]
    return [line for number, one in enumerate(started) for line in _finish(number, *one)]


def said(wrong: Sequence[str]) -> str:
    """For an assertion: how many lines there are, and the first of them."""
    return "\n".join([f"{len(wrong)} found wrong:", *wrong[:40], *(["…"] if len(wrong) > 40 else [])])


def in_enclosure(lane: Lane) -> list[str]:
    """Run one lane."""
    return run_lanes([lane])


def _start(lane: Lane) -> tuple[int, int, int]:
    results, write = os.pipe()
    alive, life = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(results)
        os.close(life)
        die_with_parent(alive)
        supervision.perform(lambda: enclosure.run(lambda: _report(lane, write)))
    os.close(write)
    os.close(alive)
    return child, results, life


def _report(lane: Lane, write: int) -> int:
    found = lane()
    with open(write, "w", encoding="utf-8") as pipe:
        json.dump(found, pipe)
    return 0


def _finish(number: int, child: int, results: int, life: int) -> list[str]:
    with open(results, encoding="utf-8") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(life)
    if code or not text:
        return [f"lane {number} ended with {code}; its traceback is on standard error"]
    lines: list[str] = json.loads(text)
    return lines
