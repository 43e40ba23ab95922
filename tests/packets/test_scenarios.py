"""Scenarios A to D as packets: verdicts written by hand, through the real dataplane, changed step by step."""

from __future__ import annotations

from functools import partial
from statistics import median
from time import perf_counter

import pytest

from agent.lab.probes import Probe, probe
from agent.lab.services import ServicePort, ServiceSpec
from agent.lab.spec import OUTSIDE, Mode
from tests.lab.world import BACKENDS, MODES, needs_root
from tests.packets.cases import Ask, Player, cast_of, play_all, through
from tests.packets.lanes import dealt, in_enclosure, run_lanes, said
from tests.recipes import CLIENT_AND_SERVER, RECIPES, THREE_NAMESPACES, THREE_TIERS
from tests.upstream import Case, Step

pytestmark = needs_root

PATIENCE = 10.0  # seconds
NODE_PORT = 30080
# Service, its cluster addresses, its port; the pod behind it and the pod's own port.
SERVICES = (
    ("shop/db", ("10.96.0.11", "fd96::11"), ("TCP", 15984), "shop/db", 5984),
    ("shop/api", ("10.96.0.12", "fd96::12"), ("TCP", 8080), "shop/api", 3000),
    ("shop/web", ("10.96.0.13", "fd96::13"), ("TCP", 80), "shop/web", 80),
    ("kube-system/kube-dns", ("10.96.0.10", "fd96::10"), ("UDP", 53), "kube-system/dns", 53),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scenarios(backend: str, mode: Mode) -> None:
    lanes = [partial(play_tiers, backend, mode), partial(play_all, [THREE_NAMESPACES], backend, mode)]
    lanes += [partial(play_each, cases, backend, mode) for cases in dealt((CLIENT_AND_SERVER, *RECIPES), 4)]
    wrong = run_lanes(lanes)
    assert not wrong, said(wrong)


def play_each(cases: list[Case], backend: str, mode: Mode) -> list[str]:
    """Play each case in a lab of its own, with its own pods."""
    return [line for case in cases for line in play_all([case], backend, mode)]


def play_tiers(backend: str, mode: Mode) -> list[str]:
    """Scenario A, by pod addresses and by Services: a policy speaks of the pods' ports, whatever the Service's."""
    player = Player(cast_of(THREE_TIERS), backend, mode)
    addresses = player.cast.addresses
    specs = [
        ServiceSpec(
            *name.split("/"),
            cluster,
            (
                ServicePort(
                    protocol,  # type: ignore[arg-type]
                    port,
                    NODE_PORT if name == "shop/web" else None,
                    tuple((address, target) for address in addresses[pod]),
                ),
            ),
        )
        for name, cluster, (protocol, port), pod, target in SERVICES
    ]
    try:
        return list(player.play(THREE_TIERS, specs, by_service))
    finally:
        player.close()


def by_service(step: Step) -> list[Ask]:
    """Every Service from every pod, and web's node port from outside."""
    written = {(one.protocol, one.port): one.expected for one in step.probes}
    asks = []
    for name, cluster, (protocol, port), pod, target in SERVICES:
        for address in cluster:
            asks += through(f"svc/{name}", address, protocol, port, pod, written[protocol, target])
    to_web = {src: connected for src, dst, connected in written["TCP", 80].pairs() if dst == "shop/web"}
    nodes = ("192.168.0.1", "192.168.0.2", "fd00:1::1", "fd00:1::2")
    return asks + [Ask(OUTSIDE, "node port of web", node, "TCP", NODE_PORT, to_web[OUTSIDE]) for node in nodes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_relabelling_takes_effect_at_once(backend: str) -> None:
    """`kubectl label pod client app=client` and back; how long until packets notice is printed, not judged."""
    seconds = [float(line) for line in in_enclosure(partial(relabel, backend))]
    assert len(seconds) == 20
    assert max(seconds) < PATIENCE, "the packets never noticed"
    print(f"from the labels to the packet: median {median(seconds):.4f} s, at most {max(seconds):.4f} s")


def relabel(backend: str) -> list[str]:
    """The seconds from new labels to the first packet that fares as they ask."""
    pods = cast_of(CLIENT_AND_SERVER)
    player = Player(pods, backend, "routed")
    server = player.cast.addresses["demo/server"]
    closed, opened = CLIENT_AND_SERVER.steps[1:]
    player.enforce(player.cast.objects(closed))
    seconds = []
    for step in (opened, closed) * 10:
        begin = perf_counter()
        lab, _ = player.enforce(player.cast.objects(step))
        asks = [Probe("demo/client", address, "TCP", 80) for address in server]
        sent = perf_counter()
        while {outcome.reached for outcome in probe(lab.fabric, asks, timeout=0.05)} != {step is opened}:
            sent = perf_counter()
            if sent - begin > PATIENCE:
                break
        seconds.append(sent - begin)
    player.close()
    return [str(value) for value in seconds]
