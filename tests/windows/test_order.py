"""What of the order of change packets show only once in many thousands: read from the plans themselves."""

from __future__ import annotations

import time

from agent.dataplane import grace
from agent.dataplane.plan import AddMembers, AwaitPackets, DeleteMembers, ForgetConnections, Operation, Transaction
from tests.dataplane.scenes import namespace, pod, pods_with, policy
from tests.nodes import change, node_of
from tests.windows.field import NODE
from tests.windows.promise import Objects
from tests.windows.test_isolation_first import Knowing
from tests.windows.tours import TOURS


def order(before: Objects, after: Objects) -> list[type[Operation]]:
    """The kinds of the operations, one of several equal ones that follow each other."""
    node, kernel = node_of(before, NODE), Knowing()
    kernel.sync(node, everything=True)
    change(node, before, after)
    kinds = [type(operation) for operation in kernel.operations(node)]
    return [kind for number, kind in enumerate(kinds) if kinds[number - 1 : number] != [kind]]


def test_packets_are_waited_for_where_an_address_moves_within_a_chain() -> None:
    before, after = TOURS["a peer moves between two rules of a policy"].worlds
    assert order(before, after) == [AddMembers, AwaitPackets, DeleteMembers]


def test_packets_are_not_waited_for_where_no_chain_could_miss_one() -> None:
    rules = {name: [{"from": [pods_with(role=role)]}] for name, role in (("one", "a"), ("two", "b"))}
    usual = [namespace("x"), *(policy(name, {"app": name}, ingress=rules[name]) for name in rules)]
    usual += [pod("one", 1, 1, app="one"), pod("two", 1, 2, app="two")]
    there = {role: [*usual, pod("peer", 2, 1, role=role)] for role in "abc"}
    assert order(there["a"], there["b"]) == [AddMembers, DeleteMembers]
    assert order(there["a"], there["c"]) == [DeleteMembers]
    assert order(there["c"], there["b"]) == [AddMembers]


def test_a_pod_that_starts_is_isolated_before_others_may_reach_it() -> None:
    peers = [pods_with(app="new")]
    named = [{"port": "http"}]
    before = [
        namespace("x"),
        pod("web", 1, 1, app="web"),
        policy("web", {"app": "web"}, ingress=[{"from": peers}], egress=[{"to": peers, "ports": named}]),
        policy("new", {"app": "new"}, ingress=[{"ports": named}], egress=[]),
        pod("old", 1, 2, {"http": 80}, app="new"),
    ]
    found = order(before, [*before, pod("new", 1, 3, {"http": 80}, app="new")])
    assert found == [AddMembers, Transaction, ForgetConnections, AddMembers]


def test_connections_of_an_address_that_changes_hands_are_forgotten_twice() -> None:
    """Before the rules change, since until then they tell who had it; and after, for what the old ones let in again."""
    usual = [namespace("x"), policy("all", {"app": "web"}, ingress=[{}]), policy("none", {"app": "new"}, ingress=[])]
    before, after = ([*usual, pod(name, 1, 1, app=name)] for name in ("web", "new"))
    assert order(before, after) == [ForgetConnections, Transaction, ForgetConnections]
    assert order(before, usual) == [ForgetConnections, Transaction]


def test_waiting_for_packets_takes_no_longer_than_a_moment() -> None:
    begin = time.monotonic()
    grace.wait()
    assert time.monotonic() - begin < 5
