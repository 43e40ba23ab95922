"""The agent is killed in the middle of a change, hundreds of times and under flood; the next one goes on from there."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from functools import cache
from typing import NoReturn

import pytest

from tests import worlds
from tests.lab.world import BACKENDS, needs_root
from tests.loop.live import Live
from tests.nodes import Kernel, change, node_of
from tests.windows.agents import Writer, under_flood
from tests.windows.field import NODE, Asked, Field
from tests.windows.promise import Objects, meanwhile, promised, telling

pytestmark = needs_root
SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))
SEED = os.environ.get("NETPOL_TEST_SEED", "")

Round = tuple[Objects, list[Objects], tuple[Asked, ...]]
"""What is enforced before, what the objects become while one agent after another is killed, what is asked meanwhile."""


@cache
def rounds() -> list[Round]:
    """Changes of every kind, of which most are tried more than once; some change again between two tries."""
    rng = random.Random(f"killed {SEED}")
    found: list[Round] = []
    while len(found) < round(12 * SCALE):
        world = worlds.random_world(rng, pods=10, nodes=2, policies=6)
        for _ in range(25):
            before, later = world, []
            for _ in range(rng.choice((1, 1, 2))):
                _, world = worlds.random_event(rng, world)
                later += [world] * rng.choice((1, 1, 2))
            states = meanwhile([before, *later])
            if len(states) <= 16 and _writes(before, later[0]):
                probes = telling(before, world, rng)
                found.append((before, later, tuple(promised(probe, states) for probe in probes)))
    return found


def _writes(before: Objects, after: Objects) -> bool:
    """Whether the change is one for the node's kernel."""
    node, kernel = node_of(before, NODE), Kernel()
    kernel.sync(node, everything=True)
    change(node, before, after)
    return bool(kernel.operations(node))


def _life(backend: str, before: Objects | None, after: Objects, told: int, group: bool) -> NoReturn:
    """A live agent that makes the change, or one that starts when the change has been made; it says when."""
    code = 1
    try:
        if group:
            os.setpgid(0, 0)
        live = Live(backend, node=NODE)

        def play() -> None:
            live.begin(before or after)
            if before is None:
                os.write(told, b"!")
            else:
                live.settle()
                os.write(told, b"!")
                live.become(before, after)
            live.settle()

        live.run(play)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill_one(backend: str, before: Objects | None, after: Objects, rng: random.Random) -> bool:
    """Whether the agent was killed before it was through. The tools that it runs die with it every other time."""
    group = rng.random() < 0.5
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _life(backend, before, after, told, group)
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    # From here on it works; mostly it needs longer than this.
    time.sleep(rng.uniform(0, 0.02 if before else 0.05))
    if group:
        os.killpg(child, signal.SIGKILL)
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the agent failed; see above"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_in_the_middle_of_a_change(backend: str) -> None:
    rng = random.Random(SEED)

    def body(field: Field, writer: Writer) -> None:
        killed = tried = 0
        for before, later, asked in rounds():

            def become(before: Objects = before, later: list[Objects] = later) -> None:
                nonlocal killed, tried
                for number, after in enumerate(later):
                    tried += 1
                    killed += _kill_one(backend, None if number else before, after, rng)
                writer.restart(later[-1])

            writer.begin(before)
            field.under_flood("killed", asked, become)
            writer.check(look=True)
        field.count()
        print(f"{killed} of {tried} killed before they were through")
        assert killed > tried / 3
        field.expect_clean()

    under_flood(backend, body)
