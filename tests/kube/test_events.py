"""Events on policies that cannot be enforced as written: one for each finding, whichever node is first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agent.core.policy import Policy, read_policy
from agent.kube import events
from agent.kube.connection import Connection
from agent.kube.events import MESSAGE_BYTES, NAME_BYTES, REASON, Announcer
from tests.kube.following import plainly, until
from tests.kube.server import EVENT, Fault, Server

BLOCK = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["192.0.2.0/24"]}}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster, nodes spread their Events over seconds."""
    monkeypatch.setattr(events, "SPREAD", 0.0)
    monkeypatch.setattr(events, "PER_SECOND", 1000.0)


def policy(*peers: Any, name: str = "p", uid: str = "1") -> Policy:
    metadata = {"namespace": "x", "name": name, "uid": uid}
    spec = {"podSelector": {}, "ingress": [{"from": list(peers)}]}
    return read_policy({"kind": "NetworkPolicy", "metadata": metadata, "spec": spec})


class Node:
    """An announcer, and the results of what it has posted."""

    def __init__(self, server: Server, name: str) -> None:
        self.results: list[str] = []
        self.announcer = Announcer(Connection(plainly(server)), name, self.results.append)

    def until(self, *results: str) -> None:
        until(lambda: self.results == list(results), lambda: self.results)


@contextmanager
def nodes(server: Server, *names: str) -> Iterator[list[Node]]:
    found = [Node(server, name) for name in names]
    for node in found:
        node.announcer.start()
    with server:
        yield found
        for node in found:
            node.announcer.stop()


def test_an_event_for_each_finding() -> None:
    """It names the policy and the field, and says who found it."""
    server = Server()
    with nodes(server, "node-1") as (node,):
        written = policy(BLOCK)
        node.announcer.announce(written)
        node.until(*["created"] * len(written.findings))
        assert server.events
        for finding, posted in zip(written.findings, server.events.values()):
            assert (posted["type"], posted["reason"], posted["source"]["host"]) == ("Warning", REASON, "node-1")
            assert posted["involvedObject"]["name"] == "p"
            assert posted["involvedObject"]["fieldPath"] == finding.field
            assert finding.message in posted["message"]


def test_once_in_the_cluster() -> None:
    """What another node has posted is there already; what one has told it does not tell again while it stays."""
    server = Server()
    with nodes(server, "node-1", "node-2") as (one, other):
        one.announcer.announce(policy(BLOCK))
        one.until("created")
        other.announcer.announce(policy(BLOCK))
        other.until("exists")
        one.announcer.announce(policy(BLOCK))
        one.announcer.announce(policy())
        one.announcer.announce(policy(BLOCK))
        one.until("created", "exists")
        one.announcer.forget("x/p")
        one.announcer.announce(policy(BLOCK, uid="2"))
        one.until("created", "exists", "created")
        assert len(server.events) == 2


def test_names_are_valid() -> None:
    """However long the policy's is."""
    server = Server()
    with nodes(server, "node-1") as (node,):
        node.announcer.announce(policy(BLOCK, name="a" * 200 + "." * 1 + "b" * 52))
        node.until("created")
        (posted,) = server.events.values()
        assert len(posted["metadata"]["name"]) <= NAME_BYTES
        assert len(posted["message"]) <= MESSAGE_BYTES


@pytest.mark.parametrize("status, tries", [(403, 1), (404, 1), (422, 1), (500, 3)])
def test_refused(status: int, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again where that may help, and given up in the end; the next one is posted all the same."""
    waits: list[float] = []
    server = Server()
    server.spoil(EVENT, *[Fault("answer", status=status, headers={"Retry-After": "3"})] * tries)
    with nodes(server, "node-1") as (node,):
        monkeypatch.setattr(node.announcer._stop, "wait", lambda seconds: waits.append(seconds))
        node.announcer.announce(policy(BLOCK))
        node.until("failed")
        assert not server.faults
        assert sum(waits) >= 3 * (tries - 1)
        node.announcer.announce(policy(BLOCK, uid="2"))
        node.until("failed", "created")


def test_an_answer_that_is_lost() -> None:
    """The Event is there when it is posted again."""
    server = Server()
    server.spoil(EVENT, Fault("hang up"))
    with nodes(server, "node-1") as (node,):
        node.announcer.announce(policy(BLOCK))
        node.until("created")
