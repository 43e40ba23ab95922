"""Pods of one bridge: an isolated one is reached neither on its link-local address nor by broadcast or multicast.

Semantics.md line 42. Whether a packet arrives is heard at the pod's interface."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6, IPPROTO_IPV6, SO_BROADCAST, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET

import pytest

from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from agent.dataplane.render import OPTIONS, Options
from agent.lab import enclosure
from agent.lab.fabric import build
from agent.lab.probes import Probe, probe
from agent.lab.servers import Servers
from agent.lab.spec import FabricSpec, NodeSpec, PodSpec, node_key
from tests.dataplane.scenes import Object, namespace, pod, pods_with, policy
from tests.lab.world import ALL, BACKENDS, needs_root
from tests.nodes import node_of
from tests.windows.field import NODE
from tests.windows.frames import frame
from tests.windows.talks import Ear

pytestmark = [
    *needs_root,
    pytest.mark.skipif(not Path("/proc/sys/net/bridge").exists(), reason="needs br_netfilter: modprobe br_netfilter"),
]

TEXT = b"heard-on-the-bridge"
ISOLATED, OPEN, OTHER = "x/isolated", "x/open", "x/other"
NUMBERS = {ISOLATED: 2, OPEN: 3, OTHER: 4}
BROADCAST = ("255.255.255.255", "10.0.1.255")
MULTICAST = ("224.0.0.1", "224.0.0.251", "239.1.2.3", "ff02::1", "ff02::fb", "ff05::2", "ff0e::99")
WAYS = ("link-local UDP", "link-local TCP", "link-local ping", *BROADCAST, *MULTICAST)
LINK_LOCAL = frozenset(WAYS[:3])


def addresses(key: str, families: tuple[int, ...] = (4, 6)) -> tuple[str, ...]:
    both = {4: f"10.0.1.{NUMBERS[key]}", 6: f"fd00::1:{NUMBERS[key]:x}"}
    return tuple(both[version] for version in families)


POLICIES: Mapping[str, list[Object]] = {
    "nobody is isolated": [],
    "isolated for ingress": [policy("p", {"app": "isolated"}, ingress=[{"from": [pods_with(app="open")]}])],
    "isolated for egress": [policy("p", {"app": "isolated"}, egress=[{"to": [pods_with(app="open")]}])],
}


class Bridge:
    """A node whose pods are on one bridge, and who hears what there."""

    def __init__(self, backend: str, families: tuple[int, ...] = (4, 6)) -> None:
        self.backend = backend
        pods = tuple(PodSpec("x", key[2:], NODE, addresses(key, families), ALL) for key in NUMBERS)
        node_addresses = ("192.168.0.1", "fd00:1::1")[: len(families)]
        self.fabric = build(FabricSpec((NodeSpec(NODE, node_addresses),), pods, (), "bridged"))
        self.families = families
        self.link_local = {key: self._link_local(key) for key in NUMBERS}
        self.mac = {key: self._mac(key) for key in NUMBERS}

    def enforce(self, case: str, options: Options = OPTIONS) -> None:
        objects = [namespace("x"), *POLICIES[case]]
        for key, number in NUMBERS.items():
            made = pod(key[2:], 1, number, app=key[2:])
            made["status"] = {"phase": "Running", "podIPs": [{"ip": a} for a in addresses(key, self.families)]}
            objects.append(made)
        with self.fabric.inside(node_key(NODE)):
            dataplane = Dataplane(Backend(self.backend), options=options)
            dataplane.sync(node_of(objects, NODE))
            dataplane.close()

    def _link_local(self, key: str) -> str:
        with self.fabric.inside(key):
            shown = subprocess.run(
                ["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"],
                capture_output=True,
                text=True,
                check=True,
            )
        return shown.stdout.split("inet6 ")[1].partition("/")[0]

    def _mac(self, key: str) -> bytes:
        with self.fabric.inside(key), open("/proc/self/net/arp", encoding="ascii"):
            shown = subprocess.run(["ip", "-o", "link", "show", "eth0"], capture_output=True, text=True, check=True)
        return bytes.fromhex(shown.stdout.split("link/ether ")[1].partition(" ")[0].replace(":", ""))

    def heard(self, source: str, destination: str) -> set[str]:
        """The ways on which the destination hears the source, all tried."""
        found = set()
        ear = Ear(self.fabric, destination)
        link_local = self.link_local[destination]
        with self.fabric.inside(source):
            index = socket.if_nametoindex("eth0")
            for way in WAYS:
                if way == "link-local TCP":
                    with socket.socket(AF_INET6, SOCK_STREAM) as talker:
                        talker.settimeout(0.3)
                        if talker.connect_ex((link_local, 80, 0, index)) == 0:
                            found.add(way)
                    continue
                if way == "link-local ping":
                    with socket.socket(AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as talker:
                        # A number of its own: an answered one of before would be an open connection.
                        echo = struct.pack("!BBHHH", 128, 0, 0, random.randrange(1 << 16), 1)
                        talker.sendto(echo + TEXT, (link_local, 0, 0, index))
                elif way == "link-local UDP":
                    with socket.socket(AF_INET6, SOCK_DGRAM) as talker:
                        talker.sendto(TEXT, (link_local, 9999, 0, index))
                elif ":" in way:
                    with socket.socket(AF_INET6, SOCK_DGRAM) as talker:
                        talker.setsockopt(IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 5)
                        talker.sendto(TEXT, (way, 9999, 0, index))
                else:
                    with socket.socket(AF_INET, SOCK_DGRAM) as talker:
                        talker.setsockopt(SOL_SOCKET, SO_BROADCAST, 1)
                        talker.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
                        talker.sendto(TEXT, (way, 9999))
                time.sleep(0.02)
                if ear.heard(TEXT):
                    found.add(way)
        ear.close()
        return found

    def hears_frame(self, source: str, destination: str, data: bytes, text: bytes) -> bool:
        """Whether a frame that the source makes itself arrives."""
        ear = Ear(self.fabric, destination)
        with self.fabric.inside(source):
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sender.bind(("eth0", 0))
        sender.send(data)
        time.sleep(0.05)
        found = bool(ear.heard(text))
        ear.close()
        sender.close()
        return found

    def reached(self, source: str, destination: str) -> list[bool]:
        """Over TCP, for each family; neighbours are asked for anew."""
        for key in (source, destination):
            with self.fabric.inside(key):
                subprocess.run(["ip", "neigh", "flush", "dev", "eth0"], check=True, capture_output=True)
        asked = [Probe(source, address, "TCP", 80, True) for address in addresses(destination, self.families)]
        return [outcome.reached for outcome in probe(self.fabric, asked, patience=0.6)]


@contextmanager
def bridged(backend: str, families: tuple[int, ...] = (4, 6)) -> Iterator[Bridge]:
    bridge = Bridge(backend, families)
    with Servers(bridge.fabric):
        yield bridge


def in_enclosure(body: Callable[[], None]) -> None:
    def work() -> int:
        body()
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"


def missing(found: set[str], wanted: set[str]) -> str:
    return f"heard and not wanted: {sorted(found - wanted)}; wanted and not heard: {sorted(wanted - found)}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_while_a_pod_is_isolated(backend: str) -> None:
    def body() -> None:
        everything = set(WAYS)
        with bridged(backend) as bridge:
            for case in ("nobody is isolated", "isolated for ingress", "isolated for egress", "nobody is isolated"):
                bridge.enforce(case)
                wanted = everything if case == "nobody is isolated" else set()
                for source, destination in ((OPEN, ISOLATED), (OTHER, ISOLATED), (ISOLATED, OTHER), (OPEN, OTHER)):
                    found = bridge.heard(source, destination)
                    assert found == wanted, f"{case}, {source} to {destination}: {missing(found, wanted)}"
                # ARP and neighbour discovery work, or nothing of this would.
                assert bridge.reached(OPEN, ISOLATED) == [True, True], case
                assert bridge.reached(OTHER, ISOLATED) == [case != "isolated for ingress"] * 2, case
                assert bridge.reached(ISOLATED, OTHER) == [case != "isolated for egress"] * 2, case

    in_enclosure(body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_multicast_can_be_left_open(backend: str) -> None:
    def body() -> None:
        with bridged(backend) as bridge:
            bridge.enforce("isolated for ingress", Options(multicast=True))
            for source, destination in ((OPEN, ISOLATED), (ISOLATED, OTHER)):
                found, wanted = bridge.heard(source, destination), set(WAYS) - LINK_LOCAL
                assert found == wanted, f"{source} to {destination}: {missing(found, wanted)}"
            bridge.enforce("isolated for ingress")
            assert bridge.heard(OPEN, ISOLATED) == set()

    in_enclosure(body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cluster_without_ipv6(backend: str) -> None:
    """Its pods have link-local addresses all the same."""

    def body() -> None:
        with bridged(backend, (4,)) as bridge:
            bridge.enforce("nobody is isolated")
            assert bridge.heard(OPEN, ISOLATED) == set(WAYS)
            bridge.enforce("isolated for ingress")
            assert bridge.heard(OPEN, ISOLATED) == set()
            assert bridge.reached(OPEN, ISOLATED) == [True]

    in_enclosure(body)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_that_a_pod_makes_itself(backend: str) -> None:
    def body() -> None:
        with bridged(backend) as bridge:
            mark = 0x68656172  # "hear"
            v4 = ("255.255.255.255", "224.0.0.1", "239.1.2.3")
            probes = [(addresses(OPEN)[0], to, "UDP", 9999) for to in v4]
            probes += [(addresses(OPEN)[1], to, "UDP", 9999) for to in ("ff02::1", bridge.link_local[ISOLATED])]
            from_link_local = (bridge.link_local[ISOLATED], addresses(OTHER)[1], "UDP", 9999)
            for case in ("nobody is isolated", "isolated for ingress", "isolated for egress"):
                bridge.enforce(case)
                heard = case == "nobody is isolated"
                for one in probes:  # to everybody, or to the link-local address, in a frame to one
                    made, _ = frame(bridge.mac[ISOLATED], one, mark)
                    assert bridge.hears_frame(OPEN, ISOLATED, made, b"hear") == heard, (case, one)
                made, _ = frame(bridge.mac[OTHER], from_link_local, mark)
                assert bridge.hears_frame(ISOLATED, OTHER, made, b"hear") == heard, (case, from_link_local)

    in_enclosure(body)
