"""What the agent's rules cost packets: nodes side by side, two without an agent, and with 0, 10 and 1,000 policies.

    client ── veth ── node (forwards, holds the rules) ── veth ── server

Each is a network namespace. Every node has the rules that kube-proxy keeps in FORWARD, so that connections are tracked
with and without an agent. Client and server are two of the 250 pods of the node; the others are addresses only. Slices
of load go to one node after the other, and a round compares only with itself.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from time import perf_counter
from typing import Any

from agent.core.node import Node, load
from agent.core.objects import NamedPort, Pod, named_namespace
from agent.core.policy import Policy
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.iptables import Backend
from agent.lab.namespaces import CLONE_NEWNET, setns
from tests.bench.netns import inside, ip
from tests.bench.world import LOCAL, policy_bytes, read

POLICIES = (0, 10, 1000)
PODS = 250
CLIENT, SERVER = 122, 133
"""Their last numbers: both stand in the middle of the chain that dispatches them."""
PORT, STREAM = 8080, 9090
FLOWS, CONNECTIONS, SLICE = 1_000, 100, 16
"""A slice of load: one-packet flows, connections, MiB of a stream. Each takes a few milliseconds, so that most slices
are over before another process of the machine wants its turn."""
GATE = "169.254.1.1"
MAC = {"pod": "02:00:00:00:00:01", "node": "02:00:00:00:00:02"}
NETLINK_NETFILTER, CTNETLINK_DELETE = 12, 1 << 8 | 2
NODES = ("none", "again", *POLICIES)
"""`again` is a second node without an agent: how far it is from the first is what the measurement cannot tell."""
Result = dict[str, Any]


# --- objects ---------------------------------------------------------------------------------------------------------


def objects(policies: int, egress: bool) -> tuple[list[Pod], list[Policy]]:
    """250 pods of the node, as many elsewhere, and policies of which each selects one pod; those of the node first."""
    hosts = [CLIENT, SERVER, *(h for h in range(2, 2 + PODS) if h not in (CLIENT, SERVER))]
    pods = [_pod(f"app-{host}", LOCAL, bytes((10, 200, 0, host))) for host in hosts]
    pods += [_pod(f"far-{n}", "node-1", bytes((10, 64, n >> 8, n & 255))) for n in range(1000)]
    apps = [pod.labels["app"] for pod in pods]
    return pods, [_policy(apps[n], apps[(n + 7) % len(apps)], egress) for n in range(policies)]


def _pod(app: str, node: str, address: bytes) -> Pod:
    labels = {"app": app, "tier": "backend"}
    port = NamedPort("http", "TCP", PORT)
    return Pod("bench", f"{app}-x", f"{app}-uid", labels, node, False, False, (address,), (port,))


def _policy(app: str, other: str, egress: bool) -> Policy:
    """Two peers, of which the second is who comes; DNS and the world outside before what is asked for."""
    ports = [{"protocol": "TCP", "port": PORT}, {"protocol": "TCP", "port": STREAM}, {"protocol": "UDP", "port": PORT}]
    peers = [
        {"podSelector": _labelled(app=other)},
        {"namespaceSelector": _labelled(stage="production"), "podSelector": _labelled(tier="backend")},
    ]
    dns = {"namespaceSelector": {}, "podSelector": _labelled(role="dns")}
    spec: dict[str, Any] = {
        "podSelector": _labelled(app=app),
        "policyTypes": ["Ingress"],
        "ingress": [{"from": peers, "ports": ports}],
    }
    if egress:
        spec["policyTypes"].append("Egress")
        spec["egress"] = [
            {"to": [dns], "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}], "ports": [{"port": 443}]},
            {"to": peers, "ports": ports},
        ]
    return read(policy_bytes("bench", f"allow-{app}", spec))


def _labelled(**labels: str) -> dict[str, Any]:
    return {"matchLabels": labels}


# --- namespaces ------------------------------------------------------------------------------------------------------


def _build(name: str, backend: str, services: int) -> None:
    """A node with its client and its server, and kube-proxy's rules."""
    for part in ("n", "c", "s"):
        ip("netns", "add", f"{name}-{part}")
        ip("-n", f"{name}-{part}", "link", "set", "lo", "up")
    for part, host in (("c", CLIENT), ("s", SERVER)):
        node, pod, address = f"{name}-n", f"{name}-{part}", f"10.200.0.{host}"
        ip("-n", node, "link", "add", part, "type", "veth", "peer", "name", "eth0", "netns", pod)
        ip("-n", node, "link", "set", part, "address", MAC["node"], "up")
        ip("-n", pod, "link", "set", "eth0", "address", MAC["pod"], "up")
        ip("-n", node, "address", "add", f"{GATE}/32", "dev", part)
        ip("-n", pod, "address", "add", f"{address}/32", "dev", "eth0")
        ip("-n", node, "route", "add", f"{address}/32", "dev", part)
        ip("-n", pod, "route", "add", GATE, "dev", "eth0")
        ip("-n", pod, "route", "add", "default", "via", GATE)
    with inside(f"{name}-n"):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        command = [Backend(backend).tool(4, "restore"), "--noflush"]
        subprocess.run(command, input=kube_proxy(services), text=True, check=True)


def kube_proxy(services: int) -> str:
    """The rules that a new connection between pods passes where kube-proxy serves so many Services, as it writes them.

    With none, those that track connections only."""
    forward = [
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]
    if not services:
        return "\n".join(["*filter", ":KUBE-FORWARD -", "-A FORWARD -j KUBE-FORWARD", *forward, "COMMIT", ""])
    new = "-m conntrack --ctstate NEW"
    rules = ["*filter", *(f":KUBE-{n} -" for n in ("FORWARD", "PROXY-FIREWALL", "SERVICES", "EXTERNAL-SERVICES"))]
    rules += [f"-A FORWARD {new} -j KUBE-PROXY-FIREWALL", "-A FORWARD -j KUBE-FORWARD"]
    rules += [f"-A FORWARD {new} -j KUBE-{n}" for n in ("SERVICES", "EXTERNAL-SERVICES")]
    rules += [*forward, "COMMIT", "*nat", *(f":KUBE-{n} -" for n in ("SERVICES", "POSTROUTING", "NODEPORTS"))]
    rules += ["-A PREROUTING -j KUBE-SERVICES", "-A POSTROUTING -j KUBE-POSTROUTING"]
    for number in range(services):
        service, end = f"KUBE-SVC-{number:016d}", f"KUBE-SEP-{number:016d}"
        text = f'-m comment --comment "team-{number}/web:http cluster IP"'
        rules += [f":{service} -", f":{end} -"]
        rules.append(f"-A KUBE-SERVICES -d 10.96.1.{number + 1}/32 -p tcp {text} -m tcp --dport 80 -j {service}")
        rules.append(f"-A {service} -j {end}")
        rules.append(f"-A {end} -p tcp -m tcp -j DNAT --to-destination 10.64.0.{number + 1}:8080")
    rules.append("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")
    rules.append("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN")
    rules.append("-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0")
    rules.append("-A KUBE-POSTROUTING -j MASQUERADE --random-fully")
    return "\n".join([*rules, "COMMIT", ""])


def _forget_all(name: str) -> None:
    """Empty the node's connection table, so that every packet is the first of its flow again."""
    with inside(name), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.send(struct.pack("=IHHIIBBH", 20, CTNETLINK_DELETE, 5, 1, 0, socket.AF_INET, 0, 0))
        code = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if code:
            raise OSError(-code, "emptying the connection table")


# --- load ------------------------------------------------------------------------------------------------------------


class Hand:
    """A process in a namespace that does what it is told. All share one processor: what one spends, the others lack."""

    def __init__(self, namespace: str, orders: Callable[[], dict[str, Callable[..., Any]]]) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, namespace, orders), daemon=True)
        self._process.start()

    @staticmethod
    def _serve(pipe: Any, namespace: str, orders: Callable[[], dict[str, Callable[..., Any]]]) -> None:
        with open(f"/run/netns/{namespace}", "rb") as there:
            setns(there.fileno(), CLONE_NEWNET)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        with suppress(PermissionError):
            os.nice(-20)
        table = orders()
        while True:
            order, arguments = pipe.recv()
            pipe.send(table[order](*arguments))

    def ask(self, order: str, *arguments: Any) -> Any:
        self._pipe.send((order, arguments))
        return self._pipe.recv()

    def end(self) -> None:
        self._process.kill()


def client_orders() -> dict[str, Callable[..., Any]]:
    """Each answers with seconds: for one connection, first packet or MiB of a stream."""
    server = f"10.200.0.{SERVER}"
    sockets: list[socket.socket] = []
    streams: list[socket.socket] = []
    block = bytes(1 << 20)

    def connect(times: int) -> float:
        """A connection with a request and a response, each begun when the last one is over."""
        reset = struct.pack("ii", 1, 0)  # leaves no port behind that would have to wait
        begin = perf_counter()
        for _ in range(times):
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                connection.connect((server, PORT))
                connection.send(b"request")
                connection.recv(16)
        return (perf_counter() - begin) / times

    def datagrams() -> float:
        """One datagram from each of many sockets."""
        if not sockets:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            for _ in range(FLOWS):
                sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sockets[-1].connect((server, PORT))
        begin = perf_counter()
        for each in sockets:
            each.send(b"datagram")
        return (perf_counter() - begin) / FLOWS

    frames = [_frame(1024 + n * 3) for n in range(FLOWS)]

    def packets(interface: str) -> float:
        """The same packets without sockets: ready-made frames put on the interface."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
            link.bind((interface, 0))
            begin = perf_counter()
            for frame in frames:
                link.send(frame)
            return (perf_counter() - begin) / FLOWS

    def stream(mebibytes: int) -> float:
        """An open connection, with each MiB confirmed by the server."""
        if not streams:
            streams.append(socket.create_connection((server, STREAM)))
        begin = perf_counter()
        for _ in range(mebibytes):
            streams[0].sendall(block)
        streams[0].recv(1)
        return (perf_counter() - begin) / mebibytes

    return {"connect": connect, "datagrams": datagrams, "packets": packets, "stream": stream}


def _frame(port: int) -> bytes:
    """An Ethernet frame with a datagram of 18 bytes."""
    addresses = bytes((10, 200, 0, CLIENT, 10, 200, 0, SERVER))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 46, 0, 0x4000, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", 0xFFFF & ~((total & 0xFFFF) + (total >> 16))) + ip[12:]
    udp = struct.pack("!HHHH", port % 65536, PORT, 26, 0) + bytes(18)
    macs = bytes.fromhex((MAC["node"] + MAC["pod"]).replace(":", ""))
    return macs + b"\x08\x00" + ip + udp


def server_orders() -> dict[str, Callable[..., Any]]:
    """arrived() → packets that have come so far; serving goes on beside."""
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("", PORT))
    for serve, port in ((_respond, PORT), (_swallow, STREAM)):
        Thread(target=serve, args=(socket.create_server(("", port), backlog=4096),), daemon=True).start()

    def arrived() -> int:
        rows = Path("/proc/self/net/dev").read_text().splitlines()
        return next(int(row.split()[2]) for row in rows if row.split()[0] == "eth0:")

    def serving() -> bool:
        return datagrams.fileno() >= 0

    return {"arrived": arrived, "serving": serving}


def _respond(listener: socket.socket) -> None:
    while True:
        with listener.accept()[0] as connection:
            connection.recv(16)
            connection.send(b"response")


def _swallow(listener: socket.socket) -> None:
    """Take what comes, and confirm every amount that the client asks to have confirmed."""
    buffer = bytearray(1 << 20)
    connection = listener.accept()[0]
    total = 0
    while got := connection.recv_into(buffer):
        total += got
        if total == SLICE << 20:
            connection.send(b"!")
            total = 0


# --- the measurement -------------------------------------------------------------------------------------------------


def datapath(backend: str, rounds: int, services: int, egress: bool) -> Result:
    """Ratios to the node without an agent, round by round."""
    Path("/run/netns").mkdir(exist_ok=True)
    hands = {}
    for number in NODES:
        name = str(number)
        _build(name, backend, services)
        hands[number] = Hand(f"{name}-c", client_orders), Hand(f"{name}-s", server_orders)
    for number in POLICIES:
        node = load(Node(LOCAL), [named_namespace("bench", {"stage": "production"})], *objects(number, egress))
        with inside(f"{number}-n"):
            Dataplane(Backend(backend)).sync(node)
    for _, server in hands.values():
        server.ask("serving")
    streams = (("stream", SLICE),) * 4
    orders = (("connect", CONNECTIONS), ("datagrams",), ("packets", "eth0"), *streams)
    found: dict[str, dict[Any, list[float]]] = {order[0]: {number: [] for number in NODES} for order in orders}
    own = []
    for turn in range(-1, rounds):
        for what, *arguments in orders:
            for number in (*NODES[turn % len(NODES) :], *NODES[: turn % len(NODES)]):
                client, server = hands[number]
                before = server.ask("arrived")
                seconds = client.ask(what, *arguments)
                came = server.ask("arrived") - before
                assert came >= FLOWS or what not in ("datagrams", "packets"), f"{FLOWS - came} did not get through"
                if turn >= 0:
                    found[what][number].append(seconds)
                if what in ("datagrams", "packets"):
                    _forget_all(f"{number}-n")
        own.append(hands["none"][0].ask("packets", "lo"))
    for client, server in hands.values():
        client.end()
        server.end()
    return {
        "own": median(own),
        "seconds": {what: {str(n): median(values) for n, values in by.items()} for what, by in found.items()},
        "ratios": {what: {str(n): _ratio(by["none"], by[n]) for n in NODES[1:]} for what, by in found.items()},
    }


def _ratio(without: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as much goes through as without an agent, by rounds."""
    low, middle, high = quantiles([a / b for a, b in zip(without, ours)], n=4)
    return {"median": middle, "low": low, "high": high}
