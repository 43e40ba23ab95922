"""Random worlds as packets: what the oracle says, what the judge says, and what arrives are the same."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from agent.core.addresses import format_address
from agent.core.inventory import Inventory
from agent.core.objects import PROTOCOLS
from agent.dataplane.iptables import Backend
from agent.lab.expectation import Expectation
from agent.lab.fabric import build
from agent.lab.lab import Lab
from agent.lab.probes import Probe, probe
from agent.lab.servers import Servers
from agent.lab.spec import OUTSIDE, FabricSpec, Listen, Mode, NodeSpec, PodSpec
from tests import worlds
from tests.lab.world import BACKENDS, MODES, needs_root
from tests.oracle import allowed
from tests.packets.lanes import dealt, run_lanes, said
from tests.worlds import Object, edge_addresses, interesting_probes, random_event, random_world

pytestmark = needs_root

WORLDS = int(os.environ.get("NETPOL_AGENT_PACKET_WORLDS", "12"))
EVENTS = 5
PROBES = 150
FAULTS = 0.15
LANES = 6

# The addresses that pods of these worlds may have, and the one by which a link knows its routers; the host outside
# leaves them alone.
OF_PODS = re.compile(r"10\.0\.[12]\.\d+|fd00::[12]:[0-9a-f]{1,3}|fd00::")
NODES = tuple(NodeSpec(f"node-{n}", (f"172.16.0.{n}", f"fd16::{n}")) for n in (1, 2))
EVERYWHERE: Listen = tuple((protocol, port) for protocol in PROTOCOLS for port in worlds.PORTS)  # type: ignore[misc]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_oracle_judge_and_packets_agree(backend: str, mode: Mode) -> None:
    lanes = [partial(check_worlds, seeds, backend, mode) for seeds in dealt(range(WORLDS), LANES)]
    wrong = run_lanes(lanes)
    assert not wrong, said(wrong)


def check_worlds(seeds: Sequence[int], backend: str, mode: Mode) -> list[str]:
    """Each world, and what it is after each of some events; a line for each disagreement."""
    return [line for seed in seeds for line in check_world(seed, backend, mode)]


def check_world(seed: int, backend: str, mode: Mode) -> Iterator[str]:
    rng = random.Random(f"{seed} {backend} {mode}")
    world = next(w for w in iter(lambda: random_world(rng, pods=10, policies=6, faults=FAULTS), None) if fits(w, mode))
    lab, servers = start(world, backend, mode)
    try:
        event = "start"
        for number in range(EVENTS + 1):
            enforce(lab, servers, world)
            for line in compare(lab, world, rng):
                yield f"world {seed}, {number} events, the last: {event}: {line}"
            event, world = next_world(rng, world, mode)
    finally:
        servers.stop()
        lab.close()
        lab.fabric.close()


def next_world(rng: random.Random, world: list[Object], mode: Mode) -> tuple[str, list[Object]]:
    """What happens next, of what can be had in a lab."""
    while True:
        event, changed = random_event(rng, world, faults=FAULTS)
        if fits(changed, mode):
            return event, changed


def fits(world: Sequence[Object], mode: Mode) -> bool:
    """Whether the lab can hold its pods: one holder for each address, and on a bridge none that is the gateway's."""
    inventory = read(world)
    held = [a for pod in inventory.pods.values() if pod.live and not pod.host_network for a in pod.addresses]
    return len(held) == len(set(held)) and not (mode == "bridged" and any(a[-1] == 1 for a in held))


def read(world: Sequence[Object]) -> Inventory:
    """As a watch delivers it: no namespace is assumed."""
    inventory = Inventory()
    inventory.read(json.dumps({"apiVersion": "v1", "kind": "List", "items": world}).encode(), "world")
    return inventory


def specs(inventory: Inventory) -> dict[str, PodSpec]:
    """The pods that there are to send and be reached."""
    return {
        pod.key: PodSpec(
            pod.namespace,
            pod.name,
            pod.node,
            tuple(map(format_address, pod.addresses)),
            () if pod.host_network else EVERYWHERE,
            pod.host_network,
        )
        for pod in inventory.pods.values()
        if pod.live
    }


def start(world: Sequence[Object], backend: str, mode: Mode) -> tuple[Lab, Servers]:
    """A lab of this world in which the host outside has the edges of all its blocks, too."""
    edges = [address for address in edge_addresses(world) if not OF_PODS.fullmatch(address)]
    outside = tuple(dict.fromkeys((*worlds.OUTSIDE, *edges)))
    nodes = tuple(NodeSpec(node.name, node.addresses, EVERYWHERE) for node in NODES)
    spec = FabricSpec(nodes, tuple(specs(read(world)).values()), outside, mode, EVERYWHERE)
    fabric = build(spec)
    return Lab(fabric, Backend(backend)), Servers(fabric).start()


def enforce(lab: Lab, servers: Servers, world: Sequence[Object]) -> None:
    """Pods end and start as the world asks, then the nodes are told."""
    inventory = read(world)
    wanted, there = specs(inventory), lab.pods()
    for key, pod in there.items():
        if wanted.get(key) != pod:
            servers.remove(key)
            lab.fabric.remove_pod(key)
    for key, pod in wanted.items():
        if there.get(key) != pod:
            lab.fabric.add_pod(pod)
            servers.add(key, pod.listen)
    lab.enforce(inventory, inventory.pods)


def compare(lab: Lab, world: Sequence[Object], rng: random.Random) -> Iterator[str]:
    """Probes between the ends that there are: by the oracle, by the judge, and with packets."""
    fabric = lab.fabric
    judge = Expectation(lab.cluster, fabric.spec, ())
    home = {a: node.name for node in fabric.spec.nodes for a in node.addresses}
    home_of_pod = {a: p.node for p in fabric.spec.pods if not p.host_network for a in p.addresses}
    asks = []
    for src, dst, protocol, port in dict.fromkeys(interesting_probes(world, rng, PROBES)):
        source, destination = fabric.owner(src), fabric.owner(dst)
        if source is None or destination is None or source == destination:
            continue
        # Line 36: between a pod and its own node nothing is judged.
        own_node = home_of_pod.get(src, "") == home.get(dst) or home_of_pod.get(dst, "") == home.get(src)
        oracle = own_node or allowed(world, src=src, dst=dst, protocol=protocol, port=port).allowed
        kind = "ICMP" if protocol == "ICMPv6" else protocol
        asks.append((Probe(source, dst, kind, port or 0, oracle, src), oracle))  # type: ignore[arg-type]
    for (ask, oracle), outcome in zip(asks, probe(fabric, [ask for ask, _ in asks])):
        judged = judge.expect(ask.source_address or "", ask.dst_address, ask.protocol, ask.port)
        if not oracle == judged.reaches == outcome.reached:
            yield (
                f"{ask.src} {ask.source_address} -> {fabric.owner(ask.dst_address)} {ask.dst_address} {ask.protocol} "
                f"{ask.port}: oracle {oracle}, judge {judged.reaches} ({judged.why}), packets {outcome.reached} "
                f"({outcome.detail})"
            )


def test_worlds_hold_both_verdicts() -> None:
    """That the sample is worth something: among its probes many are denied, and many are allowed."""
    rng = random.Random(1)
    found = []
    for _ in range(5):
        world = random_world(rng, pods=10, policies=6, faults=FAULTS)
        for src, dst, protocol, port in interesting_probes(world, rng, 100):
            found.append(allowed(world, src=src, dst=dst, protocol=protocol, port=port).allowed)
    assert 0.15 < sum(found) / len(found) < 0.85


def test_outside_is_only_what_no_pod_can_have() -> None:
    assert OF_PODS.fullmatch("10.0.1.2")
    assert OF_PODS.fullmatch("fd00::2:65")
    assert not OF_PODS.fullmatch("10.0.0.255")
    assert not OF_PODS.fullmatch(OUTSIDE)
