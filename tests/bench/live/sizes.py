"""What an agent costs beside a large cluster: its start, its start again, its memory, and its processor time."""

from __future__ import annotations

from random import Random
from threading import Event as Flag
from threading import Thread
from time import perf_counter, sleep
from typing import Any

from tests.bench.live.api import Api
from tests.bench.live.load import LiveWorld, load, path
from tests.bench.live.node import Agent, Node

STRATEGIC = "application/strategic-merge-patch+json"
SETTLE = 12.0
"""Seconds after the start: sets are counted, and the kernel is read for the first time."""
REST = 3.0
"""Seconds that the API server is given after it has shown us everything."""
WRITERS = 8


def start(pods: int, policies: int, local: int) -> dict[str, Any]:
    """On an empty node; then again, where the first has left its rules; then beside one that is told to end."""
    api = Api()
    load(api, LiveWorld(pods, policies, local))
    sleep(REST)
    node = Node(api)
    with Agent(node) as agent:
        cold = agent.ready()
        memory = agent.memory()
        first = agent.metrics()["netpol_agent_kernel_writes_total"]
        sleep(SETTLE)
        later = agent.memory()
    with Agent(node) as agent:
        again = agent.ready()
        sleep(0.2)
        writes = agent.metrics()["netpol_agent_kernel_writes_total"]
        told = "0 kernel writes" in agent.log()
        restarted = agent.memory()
        with Agent(node) as following:
            following.says("everything is known", 3)
            sleep(REST)
            told_to_end = perf_counter()
            agent.stop()
            following.says("enforcing:")
            handover = perf_counter() - told_to_end
            touched = "0 kernel writes" not in following.log()
    assert first > 0, "the node was not empty"
    return {
        "seconds": cold,
        "memory": {"peak": max(memory["peak"], later["peak"]), "resident": later["resident"]},
        "again": {"seconds": again, "writes": writes, "told": told, "memory": restarted},
        "handover": {"seconds": handover, "touched": touched},
    }


def processor(pods: int, policies: int, local: int, seconds: float, rate: float) -> dict[str, Any]:
    """Shares of one core: at rest, and while so many pods a second get a status that means nothing to us."""
    api = Api()
    world = LiveWorld(pods, policies, local)
    load(api, world)
    node = Node(api)
    with Agent(node) as agent:
        agent.ready()
        sleep(SETTLE)
        rest = _share(agent, seconds)
        stop, done = Flag(), [0] * WRITERS
        writers = [Thread(target=_touch, args=(api, world, n, rate / WRITERS, stop, done)) for n in range(WRITERS)]
        for one in writers:
            one.start()
        sleep(2)
        written, begin = sum(done), perf_counter()
        events = agent.metrics()["netpol_agent_events_total"]
        busy = _share(agent, seconds)
        written, took = sum(done) - written, perf_counter() - begin
        stop.set()
        for one in writers:
            one.join()
        events = agent.metrics()["netpol_agent_events_total"] - events
        memory = agent.memory()
    return {
        "rest": rest,
        "busy": busy,
        "rate": written / took,
        "events": events,
        "memory": memory,
    }


def _share(agent: Agent, seconds: float) -> float:
    """Of a core."""
    before, begin = agent.processor_seconds(), perf_counter()
    sleep(seconds)
    return (agent.processor_seconds() - before) / (perf_counter() - begin)


def _touch(api: Api, world: LiveWorld, number: int, rate: float, stop: Flag, done: list[int]) -> None:
    """Give pods a message in a condition, so many a second."""
    random = Random(number)
    due = perf_counter()
    while not stop.is_set():
        where = path(world.pod(random.randrange(world.world.pod_count)))
        condition = {"type": "Ready", "message": f"probe {done[number]}"}
        api.insist("PATCH", f"{where}/status", {"status": {"conditions": [condition]}}, STRATEGIC)
        done[number] += 1
        due = max(due + 1 / rate, perf_counter() - 0.1)
        sleep(max(due - perf_counter(), 0.0))
