"""The connections of an address that changed hands go, and no other: both families, each protocol, behind NAT too."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from agent.core.addresses import parse_address
from agent.dataplane.conntrack import forget
from tests.dataplane.kernel import Kernel, run
from tests.dataplane.scenes import Agent, cluster, edited, namespace, pod, policy, without

pytestmark = pytest.mark.root
FLAGS = {4: ("-f", "ipv4"), 6: ("-f", "ipv6")}


def table(version: int) -> set[str]:
    """The entries, without what runs down."""
    lines = run("conntrack", "-L", *FLAGS[version]).splitlines()
    return {re.sub(r"^(\S+ +\d+) \d+ ", r"\1 ", line) for line in lines}


def load(lines: list[str], tmp: str = "/run/entries") -> None:
    with open(tmp, "w", encoding="ascii") as file:
        file.write("\n".join([*lines, ""]))
    run("conntrack", "-R", tmp)


def sources(entry: str) -> set[str]:
    """The source of each direction."""
    return set(re.findall(r"src=(\S+)", entry))


PROTOCOLS: dict[str, str] = {
    "tcp": "-p tcp --sport {port} --dport 80 --state ESTABLISHED",
    "udp": "-p udp --sport {port} --dport 53",
    "sctp": "-p sctp --orig-port-src {port} --orig-port-dst 80 --orig-vtag 1 --reply-vtag 2 --state ESTABLISHED",
    "icmp4": "-p icmp --icmp-type 8 --icmp-code 0 --icmp-id {port}",
    "icmp6": "-p icmpv6 --icmpv6-type 128 --icmpv6-code 0 --icmpv6-id {port}",
}


def entries(rng: random.Random, pool: list[str], number: int) -> Iterator[str]:
    """Connections between addresses of a pool: plain ones, and with another reply source or destination (NAT)."""
    version = 6 if ":" in pool[0] else 4
    protocols = [p for p in PROTOCOLS if not p.startswith("icmp") or p == f"icmp{version}"]
    for port in range(1024, 1024 + number):
        src, dst, there, back = (rng.choice(pool) for _ in range(4))
        protocol = rng.choice(protocols)
        line = f"-I -s {src} -d {dst} -t 600 {PROTOCOLS[protocol].format(port=port)}"
        if not protocol.startswith("icmp") and rng.random() < 0.5:
            translated = rng.choice([f"-r {there} -q {src}", f"-r {dst} -q {back}"])  # a Service; masqueraded
            line += f" {translated} --reply-port-src 8080 --reply-port-dst {port}"
        if rng.random() < 0.3:
            line += " -w 7"
        if rng.random() < 0.6:
            line += " -u SEEN_REPLY"
        yield line


@pytest.mark.parametrize("version", [4, 6])
def test_only_those(version: int, rng: random.Random, many: Callable[[int], range]) -> None:
    """Random tables of all kinds; addresses that are like those that go, in other families and places."""
    pools = {4: [f"10.0.1.{n}" for n in range(1, 30)], 6: [f"fd00::1:{n:x}" for n in range(1, 30)]}
    pools[6].append("fd00::a00:101")  # ends with the bytes of 10.0.1.1
    pools[4].append("0.80.0.80")  # the bytes of ports
    for _ in many(5):
        run("conntrack", "-F")
        for pool in pools.values():
            load(list(entries(rng, pool, 500)))
        others = table(10 - version)
        before = table(version)
        assert len(before) > 450
        gone = {*rng.sample(pools[version], rng.choice((1, 3)))}
        deleted = forget(map(parse_address, gone))
        after = table(version)
        assert after == {entry for entry in before if not sources(entry) & gone}
        assert deleted == len(before) - len(after) > 0
        assert table(10 - version) == others
        assert forget(map(parse_address, gone)) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_unanswered(version: int, rng: random.Random) -> None:
    """Only those that somebody sends to the address without having had an answer."""
    pool = [f"10.0.1.{n}" for n in range(1, 9)] if version == 4 else [f"fd00::1:{n:x}" for n in range(1, 9)]
    load(list(entries(rng, pool, 500)))
    before = table(version)
    forget([parse_address(pool[0])], unanswered=True)
    sent = {e for e in before if re.findall(r"src=(\S+)", e)[1] == pool[0] and "[UNREPLIED]" in e}
    assert sent
    assert table(version) == before - sent


def test_many() -> None:
    """20,000 of the address among 40,000, in both directions."""
    load([f"-I -s 10.0.1.1 -d 192.0.2.{n % 250} -t 600 {PROTOCOLS['tcp'].format(port=n)}" for n in range(1, 10_001)])
    load([f"-I -s 192.0.2.{n % 250} -d 10.0.1.1 -t 600 {PROTOCOLS['udp'].format(port=n)}" for n in range(1, 10_001)])
    load([f"-I -s 10.0.1.2 -d 192.0.2.{n % 250} -t 600 {PROTOCOLS['tcp'].format(port=n)}" for n in range(1, 20_001)])
    begin = time.perf_counter()
    assert forget([parse_address("10.0.1.1")]) == 20_000
    assert time.perf_counter() - begin < 20
    assert run("conntrack", "-C").strip() == "20000"


def test_nothing_there() -> None:
    assert forget([]) == 0
    assert forget([parse_address("10.0.1.1"), parse_address("fd00::1")]) == 0


@contextmanager
def connections(*pairs: tuple[str, str, int]) -> Iterator[None]:
    """Open TCP connections and answered UDP flows, with real packets."""
    opened: list[socket.socket] = []
    for client, server, port in pairs:
        inet = socket.AF_INET6 if ":" in client else socket.AF_INET
        with socket.create_server((server, port), family=inet) as listening:
            one = socket.socket(inet)
            one.bind((client, 0))
            one.connect((server, port))
            opened += [one, listening.accept()[0]]
        here, there = (socket.socket(inet, socket.SOCK_DGRAM) for _ in range(2))
        here.bind((client, 0))
        there.bind((server, port))
        here.sendto(b"?", (server, port))
        there.sendto(b"!", there.recvfrom(1)[1])
        opened += [here, there]
    try:
        yield
    finally:
        for one in opened:
            one.close()


@pytest.mark.parametrize("backend", ["nft"])
def test_real_packets(kernel: Kernel) -> None:
    """Connections that the kernel itself has seen, with translation by real rules; pings too."""
    for version, names in ((4, ("10.0.1.1", "10.0.1.2", "192.0.2.1")), (6, ("fd00::1:1", "fd00::1:2", "2001:db8::1"))):
        for name in names:
            run(
                "ip", "address", "add", f"{name}/{32 if version == 4 else 128}", "dev", "lo", *["nodad"][: version // 6]
            )
    run("ip", "link", "set", "lo", "up")
    for version, pod_address, service in ((4, "10.0.1.1", "10.96.0.1"), (6, "fd00::1:1", "fd00:96::1")):
        kernel.rules(version, "-A INPUT -m conntrack --ctstate NEW")
        target = f"-A OUTPUT -d {service} -p tcp -j DNAT --to-destination {pod_address}"
        kernel.rules(version, target, table="nat")
        run("ip", "route", "add", "local", service, "dev", "lo")
    pairs = [
        ("10.0.1.1", "192.0.2.1", 80),
        ("192.0.2.1", "10.0.1.1", 80),
        ("10.0.1.2", "192.0.2.1", 81),
        ("fd00::1:1", "2001:db8::1", 80),
        ("fd00::1:2", "2001:db8::1", 81),
        ("2001:db8::1", "fd00::1:1", 80),
    ]
    with connections(*pairs), socket.create_server(("10.0.1.1", 8080)) as server:
        client = socket.create_connection(("10.96.0.1", 8080), source_address=("192.0.2.1", 0))
        through, _ = server.accept()
        for source, target in (("10.0.1.1", "192.0.2.1"), ("10.0.1.2", "192.0.2.1")):
            ping(source, target)
        for version, gone in ((4, "10.0.1.1"), (6, "fd00::1:1")):
            before = table(version)
            hit = {entry for entry in before if gone in sources(entry)}
            assert len(hit) == (6 if version == 4 else 4), before
            assert forget([parse_address(gone)]) == len(hit)
            assert table(version) == before - hit
        client.close()
        through.close()


def ping(source: str, target: str) -> None:
    """One echo request, by a socket that the kernel numbers itself."""
    with open("/proc/sys/net/ipv4/ping_group_range", "w", encoding="ascii") as allowed:
        allowed.write("0 0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as one:
        one.bind((source, 0))
        one.settimeout(2)
        one.sendto(b"\x08\x00\x00\x00\x00\x01\x00\x01", (target, 0))
        one.recv(100)


# --- what the dataplane makes of it ----------------------------------------------------------------------------------


def flows(*addresses: str) -> None:
    load([f"-I -s 192.0.2.1 -d {a} -t 600 -u SEEN_REPLY {PROTOCOLS['tcp'].format(port=7)}" for a in addresses])


def test_a_pod_that_goes(backend: str) -> None:
    """Its connections go; by the next process too, where it was isolated: the kernel's rules tell who held what."""
    flows("10.0.1.1", "10.0.1.2", "10.0.1.3")
    with Agent(backend, cluster()) as agent:
        assert agent.sync().connections_forgotten == 0
        assert agent.change(without(cluster(), "Pod/web", "Pod/idle")).connections_forgotten == 2
        flows("10.0.1.3", "10.0.1.1", "192.0.2.7")
        assert agent.change(without(cluster(), "Pod/web", "Pod/idle", "Pod/friend")).connections_forgotten == 0
    taken = [*without(cluster(), "Pod/db"), pod("other", 1, 2, app="db")]
    with Agent(backend, taken) as restarted:
        assert restarted.sync().connections_forgotten == 1
    assert {re.findall(r"dst=(\S+)", entry)[0] for entry in table(4)} == {"10.0.1.1", "10.0.1.3", "192.0.2.7"}


def test_a_relabelled_pod_keeps_its_connections(backend: str) -> None:
    with Agent(backend, cluster()) as agent:
        agent.sync()
        flows("10.0.1.1", "10.0.1.2", "10.0.1.3")
        changed = edited(edited(cluster(), "web", labels={"app": "idle"}), "idle", labels={"app": "db"})
        for objects in (changed, without(changed, "NetworkPolicy/db"), cluster()):
            assert agent.change(objects).connections_forgotten == 0
        assert agent.resync().connections_forgotten == 0
    assert len(table(4)) == 3


@pytest.mark.parametrize("length", [40, 120, 180, 200, 220, 253])
def test_long_names(backend: str, length: int) -> None:
    """A comment holds 255 bytes: a pod whose name was cut is still the pod that holds the address."""
    names = [f"{letter}{'-' * (length - 2)}{letter}" for letter in "ab"]
    long = [pod(f"{'n' * 60}/{name}", 1, 1, app="web") for name in names]  # two, for a moment, of one address
    deny = policy("deny", {}, ingress=[])
    deny["metadata"]["namespace"] = "n" * 60
    world = [namespace("n" * 60), *long, deny]
    for objects in (world, [o for o in world if o is not long[1]]):
        with Agent(backend, objects) as agent:
            agent.sync()
            flows("10.0.1.1")
            assert agent.resync().connections_forgotten == 0
        with Agent(backend, objects) as restarted:
            assert restarted.sync().writes == 0
        run("conntrack", "-F")
    with Agent(backend, world[:1]) as agent:
        flows("10.0.1.1")
        assert agent.sync().connections_forgotten == 1
