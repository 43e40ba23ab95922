"""`python -m tests.bench.live.churn --minutes 20`: everything changes as fast as the API server accepts, while an agent
runs; afterwards what is programmed is compared with what the same objects give from scratch.

Pods come, go, finish and are relabelled, namespaces are relabelled, policies are edited, deleted and created. Prints
the agent's memory over time, its slope after the first minutes, and what the agent has counted."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from threading import Event as Flag
from threading import Thread
from time import monotonic, sleep
from typing import Any

from tests.bench.live.api import MERGE, Api, ApiRefused
from tests.bench.live.load import (
    NAMESPACES,
    NOW,
    PODS,
    POLICIES,
    LiveWorld,
    create,
    load,
    path,
    relabel,
    unload,
)
from tests.bench.live.node import Agent, Node

FAMILY, NET = "churn-", 11
SAMPLE = 10.0
WARM = 180.0
"""Seconds that are not part of the slope; a third of the run if that is less."""
LOCAL = 0.15
"""Share of the changes of pods that are of this node's."""
FULL = 1 << 30
"""Bytes of the API server's storage at which we slow down: it compacts every five minutes."""
QUIET = 5.0


class Churner(Thread):
    """Changes every n-th pod, policy and namespace at random, as long as it may."""

    def __init__(self, api: Api, world: LiveWorld, number: int, of: int, stop: Flag, hold: Flag) -> None:
        super().__init__(daemon=True)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._api, self._world, self._end, self._held = api, world, stop, hold
        self._random = Random(number)
        self._pods = list(range(number, world.world.pod_count, of))
        here = set(world.world.local_pods())
        self._here = [pod for pod in self._pods if pod in here] or self._pods
        self._policies = list(range(number, world.world.policy_count, of))
        self._namespaces = [one["metadata"]["name"] for one in world.namespaces()][number::of]
        self._incarnation: dict[int, int] = {}
        self._absent: set[int] = set()
        self._ways: list[tuple[int, Callable[[], str]]] = [
            (35, self._replace),
            (40, self._relabel),
            (5, self._finish),
            (10, self._edit),
            (5, self._come_and_go),
            (5, self._move_namespace),
        ]

    def run(self) -> None:
        weights, ways = zip(*self._ways)
        while not self._end.is_set():
            if self._held.is_set():
                sleep(0.5)
                continue
            try:
                self.done[self._random.choices(ways, weights)[0]()] += 1
            except (ApiRefused, OSError) as error:
                self.refused[str(error)[:120]] += 1

    def _pod(self) -> tuple[int, dict[str, Any]]:
        number = self._random.choice(self._here if self._random.random() < LOCAL else self._pods)
        return number, self._world.pod(number, incarnation=self._incarnation.get(number, 0))

    def _replace(self) -> str:
        number, one = self._pod()
        self._api.insist("DELETE", f"{path(one)}?{NOW}", fine=(404,))
        self._incarnation[number] = (self._incarnation.get(number, 0) + 1) % 64
        create(self._api, self._world.pod(number, incarnation=self._incarnation[number], app=self._app()))
        return "pods replaced"

    def _relabel(self) -> str:
        relabel(self._api, path(self._pod()[1]), {"app": f"app-{self._app()}"})
        return "pods relabelled"

    def _finish(self) -> str:
        phase = self._random.choice(("Running", "Failed"))
        body = {"status": {"phase": phase, "message": str(self._random.random())}}
        with suppress(ApiRefused):  # a pod that has failed stays so
            self._api.ask("PATCH", path(self._pod()[1]) + "/status", body, MERGE)
        return "statuses changed"

    def _edit(self) -> str:
        number = self._random.choice(self._policies)
        if number in self._absent:
            return self._come_and_go()
        one = self._world.policy(number, port=self._random.choice((8080, 8081, 8082)))
        if self._random.random() < 0.3:
            one["spec"]["ingress"][0]["from"].pop()
        self._api.insist("PUT", path(one), one)
        return "policies edited"

    def _come_and_go(self) -> str:
        number = self._random.choice(self._policies)
        one = self._world.policy(number)
        if number in self._absent:
            create(self._api, one)
            self._absent.discard(number)
            return "policies created"
        self._api.insist("DELETE", path(one), fine=(404,))
        self._absent.add(number)
        return "policies deleted"

    def _move_namespace(self) -> str:
        name = self._random.choice(self._namespaces)
        team = f"t-{self._random.randrange(10)}"
        relabel(self._api, f"{NAMESPACES}/{name}", {"team": team, "stage": self._random.choice(("production", None))})
        return "namespaces relabelled"

    def _app(self) -> int:
        return self._random.randrange(self._world.world.deployments // self._world.world.spaces or 1)


def slope(samples: list[tuple[float, float]]) -> float:
    """Of the line that fits best: units of the second for each minute of the first, which is in seconds."""
    count = len(samples)
    if count < 2:
        return 0.0
    mean_x, mean_y = (sum(values) / count for values in zip(*samples))
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return 60 * sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def churn(minutes: float, pods: int, policies: int, local: int, threads: int) -> int:
    """The exit code."""
    api = Api()
    world = LiveWorld(pods, policies, local, family=FAMILY, net=NET)
    load(api, world)
    node = Node(api, world.node)
    stop, hold = Flag(), Flag()
    with Agent(node) as agent:
        print(f"ready after {agent.ready():.2f} s", flush=True)
        before = agent.metrics()
        churners = [Churner(api, world, n, threads, stop, hold) for n in range(threads)]
        begin = monotonic()
        for one in churners:
            one.start()
        samples: list[tuple[float, float]] = []
        held = 0
        while (now := monotonic() - begin) < minutes * 60:
            samples.append((now, agent.memory()["resident"] * 1024))
            done = sum(sum(c.done.values()) for c in churners)
            if len(samples) % 6 == 1:
                hold.set() if _stored(api) > FULL else hold.clear()
                print(f"{now:5.0f} s: {samples[-1][1]:.0f} kB, {done} changes", flush=True)
            held += hold.is_set()
            sleep(SAMPLE)
        stop.set()
        for one in churners:
            one.join()
        seconds = monotonic() - begin
        _settle(agent)
        code, said = node.status(_everything(api))
        after, memory = agent.metrics(), agent.memory()
        log = agent.log()
    done_each, refused = Counter[str](), Counter[str]()
    for one in churners:
        done_each += one.done
        refused += one.refused
    warm = min(WARM, seconds / 3)
    total = sum(done_each.values())
    print(f"{total} changes in {seconds:.0f} s, {total / seconds:.0f} a second: {_told(done_each)}")
    print(f"refused by the server: {_told(refused) or 'none'}; slowed down for {held * SAMPLE:.0f} s")
    for name in ("events_total", "syncs_total", "sync_retries_total", "watch_restarts_total", "drift_found_total"):
        print(f"{name}: {after.get(name_ := 'netpol_agent_' + name, 0) - before.get(name_, 0):.0f}")
    print(f"restarts: { {k: v for k, v in after.items() if 'watch_restarts_total{' in k and v} }")
    print(f"kernel writes: {_of(after, 'kernel_writes_total') - _of(before, 'kernel_writes_total'):.0f}")
    rate = slope([sample for sample in samples if sample[0] >= warm])
    print(f"memory: {memory['resident']:.0f} MiB, at its highest {memory['peak']:.0f} MiB; ", end="")
    print(f"slope after {warm:.0f} s: {rate:+.1f} kB a minute (n = {sum(s[0] >= warm for s in samples)})")
    for line in log.splitlines():
        if "WARNING" in line or "ERROR" in line:
            print(line[:300])
    print(f"compared with from scratch: {said.strip().splitlines()[-1] if said.strip() else 'nothing'} (exit {code})")
    return code


def _of(metrics: dict[str, float], name: str) -> float:
    return metrics.get(f"netpol_agent_{name}", 0.0)


def _told(counted: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counted.most_common())


def _settle(agent: Agent) -> None:
    """Until no event has come for a while."""
    seen = -1.0
    while (events := _of(agent.metrics(), "events_total")) != seen:
        seen = events
        sleep(QUIET)


def _stored(api: Api) -> float:
    for line in api.ask("GET", "/metrics").decode().splitlines():
        if line.startswith(("apiserver_storage_size_bytes", "apiserver_storage_db_total_size_in_bytes")):
            return float(line.rpartition(" ")[2])
    return 0.0


def _everything(api: Api) -> str:
    """As `kubectl get ns,pods,netpol -A -o json`."""
    items = []
    kinds = (
        ("v1", "Namespace", NAMESPACES),
        ("v1", "Pod", PODS),
        ("networking.k8s.io/v1", "NetworkPolicy", POLICIES),
    )
    for version, kind, where in kinds:
        items += [{"apiVersion": version, "kind": kind, **one} for one in api.list(where)]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.live.churn", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--pods", type=int, default=2_000)
    parser.add_argument("--policies", type=int, default=200)
    parser.add_argument("--local", type=int, default=100, help="pods on the agent's node")
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--keep", action="store_true", help="leave the objects in the API server")
    options = parser.parse_args()
    from tests.bench.live.enclosure import enclosed

    if not enclosed():
        return
    try:
        code = churn(options.minutes, options.pods, options.policies, options.local, options.threads)
    finally:
        if not options.keep:
            unload(Api(), FAMILY)
    sys.exit(code)


if __name__ == "__main__":
    main()
