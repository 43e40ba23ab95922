"""From the bytes of objects and events to the programmed kernel. Each function runs alone in a process and namespaces
of its own, and answers with plain data for the report."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from statistics import median
from threading import Thread
from time import perf_counter, sleep
from typing import IO, Any

from agent.core.addresses import format_address
from agent.core.node import Node
from agent.core.objects import decode_pod
from agent.core.rules import PeerSet, SetKind
from agent.dataplane import ipset
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from agent.dataplane.plan import AddMembers, CreateSet, DeleteMembers
from agent.dataplane.report import Report
from agent.lab.namespaces import CLONE_NEWNET, unshare
from tests.bench.measure import Watch, memory, settle, spread
from tests.bench.world import APPLY, LOCAL, REPLICAS, World, policy_bytes, read

Result = dict[str, Any]
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
PAUSE = 0.02
KINDS = ("namespaces", "pods", "policies")


class Spool:
    """A world's objects as bytes, one a line, in a file without a name: reading them back costs next to nothing."""

    def __init__(self, world: World) -> None:
        self._files: dict[str, IO[bytes]] = {}
        for kind in KINDS:
            file = self._files[kind] = tempfile.TemporaryFile()  # noqa: SIM115 (kept open as long as the spool)
            for data in getattr(world, kind)():
                file.write(data + b"\n")
            file.flush()

    def lines(self, kind: str) -> Iterator[bytes]:
        file = self._files[kind]
        file.seek(0)
        return iter(file)

    @property
    def descriptors(self) -> dict[str, int]:
        """The files, to be inherited by another process."""
        return {kind: file.fileno() for kind, file in self._files.items()}

    @property
    def bytes(self) -> int:
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())


def start(spool: Spool, backend: str, watch: Watch) -> tuple[Node, Dataplane, Report]:
    """From bytes to the programmed kernel, as the agent starts."""
    with watch.stage("objects"):
        node = Node(LOCAL)
        for kind in KINDS:
            apply = APPLY[kind]
            for line in spool.lines(kind):
                apply(node, line)
    with watch.stage("compile"):
        node.compile()
    with watch.stage("kernel"):
        dataplane = Dataplane(Backend(backend))
        report = dataplane.sync(node)
    return node, dataplane, report


def sizes(node: Node) -> Result:
    """How much this node has to enforce."""
    return {
        "pods": len(node.cluster.pods),
        "groups": sum(1 for _ in node.cluster.groups()),
        "isolated": len({a for table in node.dispatch.values() for a in table}),
        "chains": len(node.chains),
        "sets": len(node.sets.active),
        "members": sum(len(set(s.members())) for s in node.sets.active.values()),
    }


def cold(pods: int, policies: int, local: int, backend: str = "nft") -> Result:
    spool = Spool(World(pods, policies, local))
    before = memory()
    settle()
    watch = Watch()
    node, dataplane, report = start(spool, backend, watch)
    after = memory()
    dataplane.close()
    return {
        "seconds": watch.total,
        "stages": watch.seconds,
        "sync": report.seconds,
        "before": before,
        "memory": after,
        "bytes": spool.bytes,
        "sizes": sizes(node),
    }


# --- 640 policies at once --------------------------------------------------------------------------------------------


def many_policies(backend: str, times: int, policies: int = 640) -> Result:
    """As many deployments of two pods on this node, each selected by a policy of its own: nothing, then everything."""
    world = World(REPLICAS * policies, 0, REPLICAS * policies)
    pods = [world.pod(n) for n in range(2 * policies)]  # the first two of each deployment
    specs = []
    for n in range(policies):
        pod, peer = decode_pod(pods[n]), decode_pod(pods[(n + 1) % policies])
        own = "pod-template-hash"
        spec = {
            "podSelector": {"matchLabels": {own: pod.labels[own]}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {own: peer.labels[own]}}}],
                    "ports": [{"protocol": "TCP", "port": 8080}],
                }
            ],
        }
        specs.append(policy_bytes(pod.namespace, f"own-{n}", spec))
    whole, alone = [], []
    for _ in range(times):
        unshare(CLONE_NEWNET)
        settle()
        begin = perf_counter()
        node = Node(LOCAL)
        for data in world.namespaces():
            APPLY["namespaces"](node, data)
        for data in pods:
            APPLY["pods"](node, data)
        middle = perf_counter()
        for data in specs:
            APPLY["policies"](node, data)
        node.compile()
        dataplane = Dataplane(Backend(backend))
        dataplane.sync(node)
        end = perf_counter()
        dataplane.close()
        whole.append(end - begin)
        alone.append(end - middle)
    return {"seconds": spread(whole), "policies": spread(alone), "sizes": sizes(node)}


# --- single events ---------------------------------------------------------------------------------------------------


class Commits(Thread):
    """Takes down when nf_tables commits: a transaction is in force then, though its program may still have to wait."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.last = 0.0
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._netlink.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        self.start()

    def run(self) -> None:
        while True:
            with suppress(OSError):  # more came than fits: the next one tells the time as well
                self._netlink.recv(1 << 16)
            self.last = perf_counter()


class Live:
    """A node that has started, and takes events."""

    def __init__(self, world: World, backend: str) -> None:
        self.world = world
        self.commits = Commits()
        watch = Watch()
        self.node, self.dataplane, _ = start(Spool(world), backend, watch)
        self.started = watch.total
        settle()

    def timed(self, event: Callable[[], None], pause: float = 0) -> tuple[float, Report]:
        """Seconds from an event's bytes until all of it is done. `in_force` is when the last rules were in.

        `pause` lets be over what the last event left to the kernel."""
        sleep(pause)
        begin = perf_counter()
        event()
        self.node.compile()
        report = self.dataplane.sync(self.node)
        end = perf_counter()
        self.in_force = (self.commits.last if begin < self.commits.last < end else end) - begin
        return end - begin, report

    def apply_pod(self, data: bytes, pause: float = 0) -> tuple[float, Report]:
        return self.timed(lambda: self.node.apply_pod(decode_pod(data)), pause)

    def delete_pod(self, data: bytes, pause: float = 0) -> tuple[float, Report]:
        return self.timed(lambda: self.node.delete_pod(decode_pod(data).key), pause)

    def apply_policy(self, data: bytes) -> tuple[float, Report]:
        return self.timed(lambda: self.node.apply_policy(read(data)), PAUSE)

    def in_sync(self) -> bool:
        """Whether the kernel, read anew, is what the node desires."""
        return self.dataplane.resync(self.node).writes == 0


def remote(pods: int, policies: int, local: int, times: int, backend: str = "nft") -> Result:
    """Pods elsewhere that are peers here: another of a deployment comes, changes its app, goes."""
    live = Live(World(pods, policies, local), backend)
    seconds: dict[str, list[float]] = {"added": [], "relabelled": [], "deleted": []}
    writes: list[int] = []
    apps = live.world.deployments // live.world.spaces
    for number, pod in enumerate(_peers(live, times)):
        came = live.world.pod(pod, incarnation=1 + number % 7)
        other = live.world.pod(pod, incarnation=1 + number % 7, app=(live.world.app(pod) + 1) % apps)
        for name, step, data in (
            ("added", live.apply_pod, came),
            ("relabelled", live.apply_pod, other),
            ("relabelled", live.apply_pod, came),
            ("deleted", live.delete_pod, came),
        ):
            took, report = step(data)
            assert report.transactions == 0, "a pod elsewhere must not run iptables"
            seconds[name].append(took)
            assert report.writes, "the event must reach the kernel"
            writes.append(report.members_added + report.members_deleted)
    assert live.in_sync()
    return {
        **{name: spread(values) for name, values in seconds.items()},
        "writes": sum(writes) / len(writes),
        "memory": memory(),
    }


def _peers(live: Live, times: int) -> Iterator[int]:
    """Pods elsewhere that are in some set here, spread over all of the cluster."""
    peers = []
    for pod in live.world.remote_pods():
        decoded = decode_pod(live.world.pod(pod))
        record = live.node.cluster.pods[decoded.key]
        if record.group is not None and any(_drawn(selection) for selection in record.group.selections):
            peers.append(pod)
        if len(peers) >= 4 * times:
            break
    step = max(len(peers) // times, 1)
    return islice((peers[i % len(peers)] for i in range(0, len(peers) * step, step)), times)


def _drawn(selection: Any) -> bool:
    """Whether a set holds the addresses of this selection's pods."""
    return any(isinstance(active.spec, PeerSet) for active in selection.sets)


def here(pods: int, policies: int, local: int, times: int, backend: str) -> Result:
    """Isolated pods of this node: one is started beside an equal one, moves to another class, stops."""
    live = Live(World(pods, policies, local), backend)
    world = live.world
    seconds: dict[str, list[float]] = {"started": [], "moved": [], "stopped": []}
    in_force: dict[str, list[float]] = {name: [] for name in seconds}
    locals_ = world.local_pods()
    apps = world.deployments // world.spaces
    for number in range(times):
        pod = locals_[number * 7 % len(locals_)]
        began = _elsewhere(world.pod(pod, incarnation=1), number)
        moved = _elsewhere(world.pod(pod, incarnation=1, app=_other_app(live, pod, apps)), number)
        for name, step, data in (
            ("started", live.apply_pod, began),
            ("moved", live.apply_pod, moved),
            ("stopped", live.delete_pod, moved),
        ):
            took, report = step(data, PAUSE)
            assert report.transactions == 2, f"one transaction for each family, not {report}"
            seconds[name].append(took)
            in_force[name].append(live.in_force)
    assert live.in_sync()
    return {name: {**spread(values), "in force": median(in_force[name])} for name, values in seconds.items()}


def _elsewhere(pod: bytes, number: int) -> bytes:
    """The pod with addresses that nobody has: 10.200.1.2 and fd00:201::2 and so on."""
    decoded = decode_pod(pod)
    host = 2 + number % 250
    for address, new in zip(decoded.addresses, (f"10.200.1.{host}", f"fd00:201::{host:x}")):
        pod = pod.replace(b'"%s"' % format_address(address).encode(), b'"%s"' % new.encode())
    return pod


def _other_app(live: Live, pod: int, apps: int) -> int:
    """An app of the same namespace that another policy selects."""
    current = decode_pod(live.world.pod(pod))
    for app in range(apps):
        other = decode_pod(live.world.pod(pod, app=app))
        if other.labels != current.labels and any(
            p.namespace == other.namespace and p.selector.matches(other.labels)
            for p in live.node.policies.policies.values()
        ):
            return app
    return apps


def edit(pods: int, policies: int, local: int, times: int, backend: str) -> Result:
    """A policy that selects a pod here gets another port."""
    live = Live(World(pods, policies, local), backend)
    seconds, in_force = [], []
    selecting = [number * policies // local for number in range(local)]
    for number in range(times):
        data = live.world.policy(selecting[number % local], port=10_000 + number)
        took, report = live.apply_policy(data)
        assert report.transactions, "the edit must reach the kernel"
        seconds.append(took)
        in_force.append(live.in_force)
    assert live.in_sync()
    return {"edited": {**spread(seconds), "in force": median(in_force)}}


# --- restart, idle, crossover ----------------------------------------------------------------------------------------


def restart(pods: int, policies: int, local: int, backend: str = "nft", times: int = 3) -> Result:
    """A new process finds what another has programmed: from its start until it knows that nothing is to be done."""
    spool = Spool(World(pods, policies, local))
    files = spool.descriptors
    answers = []
    for _ in range(times + 1):
        begin = perf_counter()
        command = [sys.executable, "-m", "tests.bench.again", backend, *(str(files[kind]) for kind in KINDS)]
        done = subprocess.run(command, pass_fds=tuple(files.values()), stdout=subprocess.PIPE, check=True)
        answers.append((perf_counter() - begin, int(done.stdout)))
    assert answers[0][1] > 0
    return {
        "seconds": spread([seconds for seconds, _ in answers[1:]]),
        "first": answers[0][0],
        "writes": max(writes for _, writes in answers[1:]),
    }


def idle(pods: int, policies: int, local: int, backend: str = "nft") -> Result:
    live = Live(World(pods, policies, local), backend)
    return {"memory": memory(), "sizes": sizes(live.node)}


def crossover(times: int) -> Result:
    """Members added to and deleted from one set, by netlink and by `ipset restore`."""
    writer = ipset.Ipset()
    writer.write([CreateSet("npa4-p-crossover", SetKind.IP, 4)])
    counts = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    found: dict[str, list[float]] = {"netlink": [], "restore": []}
    for count in counts:
        members = tuple(bytes((10, 0, n >> 8, n & 255)) for n in range(count))
        seconds: dict[str, list[float]] = {"netlink": [], "restore": []}
        for _ in range(times):
            for way, bulk in (("netlink", 1 << 30), ("restore", 0)):
                ipset.BULK = bulk
                for kind in (AddMembers, DeleteMembers):
                    begin = perf_counter()
                    writer.write([kind("npa4-p-crossover", SetKind.IP, 4, members)])
                    seconds[way].append(perf_counter() - begin)
        for way, values in seconds.items():
            found[way].append(spread(values)["p50"])
    faster = [r < n for n, r in zip(found["netlink"], found["restore"])]
    first = next((c for i, c in enumerate(counts) if all(faster[i:])), None)
    return {"counts": counts, **found, "crossover": first}
