"""Lines of the semantics that only packets can show; each test names its line of `semantics.md`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from itertools import product

import pytest

from agent.lab.spec import OUTSIDE
from tests.lab.world import needs_root
from tests.packets import raw
from tests.packets.cases import OUTSIDE_ADDRESSES
from tests.packets.lanes import in_enclosure
from tests.packets.scene import (
    EVERY,
    HOST_PORT,
    NODE,
    TRANSPORT,
    Scene,
    Want,
    blocks,
    everywhere,
    isolate,
    only,
    service,
)
from tests.upstream import Object

pytestmark = needs_root

A, B, C, H1, H2 = "x/a", "x/b", "x/c", "x/h1", "x/h2"
NODE_1, NODE_2 = "node:node-1", "node:node-2"
DENY_ALL = isolate("*", ingress=[], egress=[])
ALL_PODS = {"namespaceSelector": {}}


def pods(name: str) -> Object:
    """One pod as a peer."""
    return {"podSelector": only(name)}


def ports(number: int) -> list[Object]:
    """A port of every protocol."""
    return [{"protocol": protocol, "port": number} for protocol in TRANSPORT]


A_CLOSED, A_OPEN_TO_C = isolate("a", ingress=[]), isolate("a", ingress=[{"from": [pods("c")]}])


def over(protocols: Iterable[str], src: str, dst: str, port: int, arrives: bool) -> list[Want]:
    return [(src, dst, protocol, port, arrives) for protocol in protocols]


def test_7_replies_pass_while_the_reverse_is_denied() -> None:
    def body(scene: Scene) -> None:
        scene.enforce(isolate("a", ingress=[]), isolate("b", egress=[]), isolate("c", egress=[]))
        scene.check(*((A, other, *port, True) for other in (B, C) for port in EVERY))
        scene.check(*((other, A, *port, False) for other in (B, C) for port in EVERY))

    everywhere(body)


def test_8_isolation_covers_every_protocol() -> None:
    """A rule with ports never matches another protocol, one without does."""

    def body(scene: Scene) -> None:
        for policies, arrives in (
            ((), True),
            ((isolate("b", ingress=[]), isolate("c", ingress=[])), False),
            ((isolate("a", egress=[]),), False),
            ((isolate("a", egress=[{"ports": [{"protocol": p} for p in TRANSPORT]}]),), False),
            ((isolate("a", egress=[{"to": [pods("b"), pods("c")]}]), isolate("b", ingress=[{}])), True),
        ):
            scene.enforce(*policies)
            for other in (B, C):
                scene.expect_raw(A, other, "any", lambda *_: b"anything", arrives)

    everywhere(body)


def test_34_policies_see_the_ports_of_pods_and_never_a_services() -> None:
    def body(scene: Scene) -> None:
        scene.services(service("web", 1, B))
        to_service = blocks(scene.addresses("web"))
        # Whether the Service (8080, to port 80 of b), b's port 80 and b's port 8080 are reached, and from where.
        for policy, service_, port_80, port_8080, sources in (
            (isolate("b", ingress=[{"ports": ports(80)}]), True, True, False, (A, C)),
            (isolate("b", ingress=[{"ports": ports(8080)}]), False, False, True, (A, C)),
            (isolate("b", ingress=[{"from": [pods("a")]}]), True, True, True, (A,)),
            (isolate("b", ingress=[{"from": [pods("a")]}]), False, False, False, (C,)),
            (isolate("*", egress=[{"to": [pods("b")], "ports": ports(80)}]), True, True, False, (A, C)),
            (isolate("*", egress=[{"ports": ports(8080)}]), False, False, True, (A, C)),
            (isolate("*", egress=[{"to": to_service}]), False, False, False, (A, C)),
        ):
            scene.enforce(policy)
            wanted: list[Want] = []
            for src in sources:
                wanted += over(TRANSPORT, src, "web", 8080, service_)
                wanted += over(TRANSPORT, src, B, 80, port_80) + over(TRANSPORT, src, B, 8080, port_8080)
            scene.check(*wanted)

    everywhere(body)


def test_35_what_another_node_translates_stays_translated() -> None:
    """Egress to another node's node port is that node's address and port; what it masquerades comes from it."""

    def body(scene: Scene) -> None:
        scene.services(service("there", 1, C, node_port=30080), service("back", 2, B, node_port=30081))
        other = blocks(NODE[2])
        for policy, src, port, arrives in (
            (isolate("a", egress=[{"to": [pods("c")]}]), A, 30080, False),
            (isolate("a", egress=[{"to": other, "ports": ports(80)}]), A, 30080, False),
            (isolate("a", egress=[{"to": other, "ports": ports(30080)}]), A, 30080, True),
            # The second node sends it on itself: what c's node sees comes from a, not yet masqueraded.
            (isolate("c", ingress=[{"from": [pods("a")]}]), A, 30080, True),
            (isolate("c", ingress=[{"from": other}]), A, 30080, False),
            # It goes to the second node and comes back to the first, from the second node's address.
            (isolate("b", ingress=[{"from": [pods("a")]}]), A, 30081, False),
            (isolate("b", ingress=[{"from": other}]), A, 30081, True),
            (isolate("b", ingress=[{"from": blocks(OUTSIDE_ADDRESSES)}]), OUTSIDE, 30081, False),
            (isolate("b", ingress=[{"from": other}]), OUTSIDE, 30081, True),
        ):
            scene.enforce(policy)
            scene.check(*over(TRANSPORT, src, NODE_2, port, arrives))

    everywhere(body)


def test_36_the_pods_own_node_is_never_judged() -> None:
    def body(scene: Scene) -> None:
        scene.enforce(DENY_ALL)
        wanted: list[Want] = []
        for pod, own, other in ((A, NODE_1, NODE_2), (C, NODE_2, NODE_1)):
            for protocol, port in EVERY:
                wanted += [(pod, own, protocol, port, True), (own, pod, protocol, port, True)]
                wanted += [(pod, other, protocol, port, False), (other, pod, protocol, port, False)]
        wanted += [(H1, A, "TCP", 80, True), (H2, A, "TCP", 80, False), (H2, C, "UDP", 80, True)]
        wanted += [(A, H1, "TCP", HOST_PORT, True), (A, H2, "TCP", HOST_PORT, False), (C, H2, "TCP", HOST_PORT, True)]
        wanted += [(A, gateway, "ICMP", 0, True) for gateway in scene.gateways("10.244.1.", "fd44:1:")]
        scene.check(*wanted)

    everywhere(body)


def test_36_other_nodes_are_ordinary_addresses() -> None:
    def body(scene: Scene) -> None:
        for policy, from_node, from_pod in (
            (isolate("a", ingress=[{"from": [ALL_PODS]}]), False, True),
            (isolate("a", ingress=[{"from": [pods("h2"), pods("c")]}]), False, True),
            (isolate("a", ingress=[{"from": blocks(NODE[2])}]), True, False),
        ):
            scene.enforce(policy)
            scene.check(
                *over(TRANSPORT, NODE_2, A, 80, from_node), (H2, A, "TCP", 80, from_node), (C, A, "TCP", 80, from_pod)
            )
        for policy, to_node, to_pod in (
            (isolate("a", egress=[{"to": [ALL_PODS]}]), False, True),
            (isolate("a", egress=[{"to": [pods("h2"), pods("c")]}]), False, True),
            (isolate("a", egress=[{"to": blocks(NODE[2])}]), True, False),
        ):
            scene.enforce(policy)
            scene.check((A, H2, "TCP", HOST_PORT, to_node), (A, NODE_2, "ICMP", 0, to_node), (A, C, "TCP", 80, to_pod))

    everywhere(body)


def test_36_what_the_own_node_forwards_is_judged() -> None:
    """A pod to its own node's node port and on to another pod; a client by a node port to a pod of that node."""

    def body(scene: Scene) -> None:
        scene.services(service("there", 1, C, node_port=30080), service("here", 2, B, node_port=30081))
        for policy, wanted in (
            (isolate("a", egress=[]), [(A, 30080, False), (A, 30081, False)]),
            (isolate("a", egress=[{"to": [pods("c")], "ports": ports(80)}]), [(A, 30080, True), (A, 30081, False)]),
            (isolate("a", egress=[{"to": blocks(NODE[1]), "ports": ports(30080)}]), [(A, 30080, False)]),
            (isolate("b", ingress=[]), [(A, 30081, False), (OUTSIDE, 30081, False)]),
            (isolate("b", ingress=[{"from": [pods("a")]}]), [(A, 30081, True), (OUTSIDE, 30081, False)]),
            (isolate("b", ingress=[{"from": blocks(OUTSIDE_ADDRESSES)}]), [(A, 30081, False), (OUTSIDE, 30081, True)]),
            (isolate("b", ingress=[{"from": blocks(NODE[1])}]), [(OUTSIDE, 30081, False)]),
        ):
            scene.enforce(policy)
            scene.check(*(want for src, port, ok in wanted for want in over(TRANSPORT, src, NODE_1, port, ok)))

    everywhere(body)


def test_37_a_pod_reaches_itself_also_through_a_service() -> None:
    def body(scene: Scene) -> None:
        scene.services(
            service("own", 1, A, node_port=30080), service("near", 2, B, node_port=30081), service("far", 3, C)
        )
        scene.enforce(DENY_ALL)
        wanted: list[Want] = []
        for name, arrives in (("own", True), ("near", False), ("far", False)):
            wanted += over(TRANSPORT, A, name, 8080, arrives)
        wanted += over((*TRANSPORT, "ICMP"), A, A, 80, True)
        wanted += over(TRANSPORT, A, NODE_1, 30080, True) + over(TRANSPORT, A, NODE_1, 30081, False)
        scene.check(*wanted)

    everywhere(body)


def test_38_neighbours_are_found_under_deny_all() -> None:
    def body(scene: Scene) -> None:
        scene.enforce(
            isolate("a", ingress=[], egress=[{"to": [pods("b"), pods("c")], "ports": ports(80)}]),
            isolate("b", ingress=[{"from": [pods("a")], "ports": ports(80)}], egress=[]),
            isolate("c", ingress=[{"from": [pods("a")], "ports": ports(80)}], egress=[]),
        )
        for _ in range(2):
            for end in (A, B, C, NODE_1, NODE_2):
                scene.run(end, "ip", "neigh", "flush", "all")
            scene.check(*over(TRANSPORT, A, B, 80, True), *over(TRANSPORT, A, C, 80, True))
            scene.check(*over(("TCP", "ICMP"), B, A, 80, False))
        if scene.mode == "bridged" and not scene.counted(NODE_1, 6, "filter", "NPA-FORWARD", "ipv6-icmptype 135"):
            scene.wrong.append("no neighbour solicitation has met our rules: this test shows nothing")

    everywhere(body)


def test_39_errors_of_an_allowed_connection_arrive() -> None:
    """Port unreachable from a pod that may send nothing, to one that may receive nothing; a router's time exceeded."""

    def body(scene: Scene) -> None:
        scene.enforce(isolate("a", ingress=[]), isolate("b", egress=[]), isolate("c", egress=[]))
        scene.check(*((A, other, "UDP", 4444, True) for other in (B, C)), timeout=1.0)
        for address, node in zip(scene.addresses(C), NODE[2]):
            found = raw.expires(scene.fabric, A, address, 80, hops=2)
            if found != node:
                scene.wrong.append(
                    f"{scene.step}: time exceeded on the way to {address}: from {found}, not from {node}"
                )

    everywhere(body)


def test_39_errors_of_no_connection_are_judged() -> None:
    """A port unreachable that quotes a packet which was never sent is no connection's (line 40): as a new packet."""

    def body(scene: Scene) -> None:
        for policy, arrives in (
            (isolate("a", ingress=[]), False),
            (isolate("a", ingress=[{"from": [pods("c")]}]), True),
        ):
            scene.enforce(policy)
            scene.expect_raw(C, A, "ICMP", raw.unreachable, arrives)

    everywhere(body)


def refusal_of_the_helper() -> list[str]:
    done = subprocess.run(["iptables-nft", *FTP_HELPER], capture_output=True, text=True, check=False)
    return [done.stderr] if done.returncode else []


FTP_HELPER = ("-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp")


def test_39_what_an_expectation_announces_is_judged_as_new() -> None:
    """FTP's active mode: the server's data connection to the client is RELATED, and TCP."""
    if in_enclosure(refusal_of_the_helper):
        pytest.skip("needs the kernel's connection tracking helper for FTP (nf_conntrack_ftp)")

    def body(scene: Scene) -> None:
        for node, version in product((NODE_1, NODE_2), (4, 6)):
            scene.tool(node, version, *FTP_HELPER)
            related = ("-p", "tcp", "-m", "conntrack", "--ctstate", "RELATED", "-m", "comment", "--comment", "related")
            scene.tool(node, version, "-t", "mangle", "-A", "FORWARD", *related)
        for policy, arrives in (
            (isolate("a", ingress=[]), False),
            (isolate("a", ingress=[{"from": [pods("c")]}]), True),
        ):
            scene.enforce(policy)
            for own, server in zip(scene.addresses(A), scene.addresses(C)):
                version = 6 if ":" in own else 4
                before = scene.counted(NODE_1, version, "mangle", "FORWARD", "related")
                if raw.active_ftp(scene.fabric, (A, own), (C, server), expected=arrives) is not arrives:
                    scene.wrong.append(
                        f"{scene.step}: the data connection to {own} was {'lost' if arrives else 'let in'}"
                    )
                if scene.counted(NODE_1, version, "mangle", "FORWARD", "related") == before:
                    scene.wrong.append(f"{scene.step}: the connection to {own} was not RELATED: nothing is shown")

    everywhere(body)


def test_40_invalid_packets_are_judged_as_new() -> None:
    """An ACK of no connection, where the kernel takes up none in their middle."""

    def body(scene: Scene) -> None:
        for node in (NODE_1, NODE_2):
            scene.run(node, "sh", "-c", "echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose")
            for version in (4, 6):
                invalid = ("-m", "conntrack", "--ctstate", "INVALID", "-m", "comment", "--comment", "invalid")
                scene.tool(node, version, "-t", "mangle", "-A", "FORWARD", *invalid)
        for policies, arrives in (
            ((), True),
            ((isolate("b", ingress=[]), isolate("c", ingress=[])), False),
            ((isolate("a", egress=[{"ports": [{"port": 81}]}]),), False),
            ((isolate("a", egress=[{"ports": [{"port": 80}]}]), isolate("c", ingress=[{"from": [pods("a")]}])), True),
        ):
            scene.enforce(*policies)
            for other in (B, C):
                counted = [scene.counted(NODE_1, version, "mangle", "FORWARD", "invalid") for version in (4, 6)]
                scene.expect_raw(A, other, "TCP", lambda own, to: raw.tcp(own, to, 80, raw.ACK), arrives)
                for version, before in zip((4, 6), counted):
                    if scene.counted(NODE_1, version, "mangle", "FORWARD", "invalid") == before:
                        scene.wrong.append(f"{scene.step}: the IPv{version} packet was not INVALID: nothing is shown")

    everywhere(body)


def test_40_untracked_packets_are_judged_as_new_also_replies() -> None:
    def body(scene: Scene) -> None:
        for node, version in product((NODE_1, NODE_2), (4, 6)):
            for side in ("--dport", "--sport"):
                scene.tool(node, version, "-t", "raw", "-A", "PREROUTING", "-p", "udp", side, "80", "-j", "NOTRACK")
        for policies, arrives in (
            ((), True),
            ((isolate("b", ingress=[]), isolate("c", ingress=[])), False),
            ((isolate("b", ingress=[{"from": [pods("a")]}]), isolate("c", ingress=[{"from": [pods("a")]}])), True),
            ((isolate("a", ingress=[{"from": [pods("b"), pods("c")]}]),), True),
        ):
            scene.enforce(*policies)
            scene.check((A, B, "UDP", 80, arrives), (A, C, "UDP", 80, arrives))
        # Here the judge, who knows connections only, would let the reply pass.
        scene.enforce(isolate("a", ingress=[]))
        scene.check((A, B, "UDP", 80, False), (A, C, "UDP", 80, False), judged=False)

    everywhere(body)


def test_40_fragments_are_judged_as_the_packet_they_were() -> None:
    """The later fragments of a datagram carry no port, and pass or not with the first."""

    def body(scene: Scene) -> None:
        for policies, arrives in (
            ((isolate("b", ingress=[{"ports": ports(80)}]), isolate("c", ingress=[{"ports": ports(80)}])), True),
            ((isolate("b", ingress=[{"ports": ports(8080)}]), isolate("c", ingress=[{"ports": ports(8080)}])), False),
            ((isolate("a", egress=[{"ports": ports(80)}]),), True),
            ((isolate("a", egress=[{"ports": ports(8080)}]),), False),
        ):
            scene.enforce(*policies)
            for address in (*scene.addresses(B), *scene.addresses(C)):
                if raw.large_datagram(scene.fabric, A, address, 80, expected=arrives) is not arrives:
                    scene.wrong.append(f"{scene.step}: fragments to {address} {'were lost' if arrives else 'arrived'}")

    everywhere(body)
