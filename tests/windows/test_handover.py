"""An address that is given to another pod (semantics.md line 46): it inherits no connection, nobody else loses one."""

from __future__ import annotations

import copy
import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM, socket
from unittest.mock import patch

import pytest

from agent.dataplane import conntrack
from agent.lab import enclosure, services
from agent.lab.fabric import Fabric, build
from agent.lab.services import ServicePort, ServiceSpec
from agent.lab.spec import FabricSpec, NodeSpec, PodSpec, node_key
from tests.dataplane.scenes import Agent, Object, namespace, pod, pods_with, policy
from tests.lab.world import BACKENDS, needs_root
from tests.windows.field import NODE
from tests.windows.promise import Objects
from tests.windows.talks import INTRUDER, LATE, Ear, Talk, talk

pytestmark = needs_root

PORTS = range(7000, 7024)
"""Those that the pods serve; a Service has them too, 1000 more for the giver and 2000 more for the peer."""
NUMBERS = {"x/peer": 1, "x/keep": 2, "x/giver": 3}
SERVICE = {4: "10.96.0.1", 6: "fd96::1"}


def addresses(key: str) -> tuple[str, str]:
    return f"10.0.1.{NUMBERS[key]}", f"fd00::1:{NUMBERS[key]:x}"


def objects(giver: bool = True, taker: Object | None = None) -> Objects:
    """`giver` and `keep` may talk with `peer`, in both directions; who is labelled `taker` may talk with nobody."""
    both = {"ingress": [{"from": [pods_with(app="peer")]}], "egress": [{"to": [pods_with(app="peer")]}]}
    found = [
        namespace("x"),
        pod("peer", 1, NUMBERS["x/peer"], app="peer"),
        pod("keep", 1, NUMBERS["x/keep"], app="giver"),
        policy("giver", {"app": "giver"}, **both),
        policy("taker", {"app": "taker"}, ingress=[], egress=[]),
    ]
    if giver:
        found.append(pod("giver", 1, NUMBERS["x/giver"], app="giver"))
    return [*found, taker] if taker else found


def taker(name: str) -> Object:
    """Another pod with the giver's address; of the same name, it is still another by its uid."""
    made = pod(name, 1, NUMBERS["x/giver"], app="taker")
    made["metadata"]["uid"] = "of the taker"
    return made


class Street:
    """A node with the three pods, an agent, and open connections of every kind."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        pods = tuple(PodSpec("x", key[2:], NODE, addresses(key)) for key in NUMBERS)
        nodes = (NodeSpec(NODE, ("192.168.0.1", "fd00:1::1")),)
        self.fabric: Fabric = build(FabricSpec(nodes, pods, ("203.0.113.5", "2001:db8::5")))
        ports = [
            ServicePort(protocol, port + more, None, tuple((a, port) for a in addresses(key)))  # type: ignore[arg-type]
            for protocol, (more, key), port in product(("TCP", "UDP"), ((1000, "x/giver"), (2000, "x/peer")), PORTS)
        ]
        service = ServiceSpec("x", "all", tuple(SERVICE.values()), tuple(ports))
        services.load(self.fabric, [service], backend)  # type: ignore[arg-type]
        self.agent = self._agent(objects())
        self.kept = self.talks("x/keep", through_service=False)

    @contextmanager
    def node(self) -> Iterator[None]:
        with self.fabric.inside(node_key(NODE)):
            yield

    def _agent(self, world: Objects) -> Agent:
        with self.node():
            agent = Agent(self.backend, world)
            agent.sync()
        return agent

    def change(self, world: Objects) -> None:
        with self.node():
            self.agent.change(world)

    def restart(self, world: Objects) -> None:
        self.agent.dataplane.close()
        self.agent = self._agent(world)

    def leave(self) -> None:
        self.fabric.remove_pod("x/giver")

    def enter(self, name: str) -> None:
        self.fabric.add_pod(PodSpec("x", name, NODE, addresses("x/giver")))

    def talks(self, key: str, *, through_service: bool = True) -> list[Talk]:
        """Connections with the peer from both sides, TCP and UDP, in both families, directly and through a Service."""
        ways = (True, False) if through_service else (False,)
        kinds = product((4, 6), (SOCK_STREAM, SOCK_DGRAM), ways, (key, "x/peer"))
        found = []
        for port, (version, kind, service, client) in zip(PORTS if through_service else PORTS[16:], kinds):
            server = "x/peer" if client == key else key
            more = 2000 if client == key else 1000
            ask = (SERVICE[version], port + more) if service else (addresses(server)[version == 6], port)
            title = f"{kind.name} of IPv{version}{' through a Service' if service else ''}, asked for by {client},"
            found.append(talk(title, self.fabric, kind, client, server, port, ask, mine=key))
        return found


@contextmanager
def pestering(talks: list[Talk]) -> Iterator[None]:
    """The peer keeps sending on what was open, all the time."""
    done = threading.Event()

    def pester() -> None:
        while not done.wait(0.0005):
            for one in talks:
                if one.theirs.type == SOCK_DGRAM:
                    one.late()

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def separate(street: Street, name: str) -> None:
    street.leave()
    street.change(objects(giver=False))
    time.sleep(0.02)
    street.enter(name)
    street.change(objects(giver=False, taker=taker(name)))


def together(street: Street, name: str) -> None:
    street.leave()
    street.enter(name)
    street.change(objects(giver=False, taker=taker(name)))


def unseen(street: Street, name: str) -> None:
    """While no agent ran."""
    street.leave()
    street.enter(name)
    street.restart(objects(giver=False, taker=taker(name)))


def restarted_between(street: Street, name: str) -> None:
    street.leave()
    street.restart(objects(giver=False))
    time.sleep(0.02)
    street.enter(name)
    street.change(objects(giver=False, taker=taker(name)))


def overlapping(street: Street, name: str) -> None:
    """The new pod is told of before the old one's end, which is another batch."""
    street.leave()
    street.enter(name)
    if name != "giver":
        street.change(objects(taker=taker(name)))
    street.change(objects(giver=False, taker=taker(name)))


WAYS: tuple[Callable[[Street, str], None], ...] = (separate, together, unseen, restarted_between, overlapping)


def handed_over(street: Street, way: Callable[[Street, str], None], name: str) -> list[str]:
    """What goes on after the handover that must not."""
    if street.fabric.owner(addresses("x/giver")[0]) != "x/giver":
        street.fabric.remove_pod("x/taker")
        street.fabric.add_pod(PodSpec("x", "giver", NODE, addresses("x/giver")))
    street.change(objects())
    talks = street.talks("x/giver")
    assert all(one.goes_on() for one in talks)
    with pestering(talks):
        way(street, name)
    time.sleep(0.02)
    ears = {"x/peer": Ear(street.fabric, "x/peer"), f"x/{name}": Ear(street.fabric, f"x/{name}")}
    found = []
    for one in talks:
        one.late()
        one.intrude(street.fabric, f"x/{name}")
    time.sleep(0.4)  # for what TCP sends again
    found += [f"x/{name} heard the peer: {data!r}" for data in ears[f"x/{name}"].heard(LATE)]
    found += [f"the peer heard x/{name}: {data!r}" for data in ears["x/peer"].heard(INTRUDER)]
    for one in (*ears.values(), *talks):
        one.close()
    found += [f"{one.title} was cut off from x/keep" for one in street.kept if not one.goes_on()]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_connection_is_inherited(backend: str) -> None:
    def work() -> int:
        street = Street(backend)
        for way, name in product(WAYS, ("taker", "giver")):
            found = handed_over(street, way, name)
            assert not found, "\n".join([f"{way.__name__}, to x/{name}:", *found])
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_forgetting_it_would_be(backend: str) -> None:
    def work() -> int:
        with patch.object(conntrack, "forget", lambda *_, **__: 0):
            street = Street(backend)
            for way in (separate, together, unseen):
                found = handed_over(street, way, "giver")
                heard = [one for one in found if "heard" in one]
                assert heard, f"nothing was inherited when {way.__name__}"
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_of_policies_or_labels_cuts_nothing(backend: str) -> None:
    """Connections that were accepted before are kept; new ones are judged."""

    def work() -> int:
        street = Street(backend)
        usual = objects()
        denied = [o for o in usual if o["kind"] != "NetworkPolicy"]
        denied += [policy("giver", {"app": "giver"}, ingress=[], egress=[])]
        relabelled = copy.deepcopy(usual)
        for one in relabelled:
            if one["kind"] == "Pod" and one["metadata"]["name"] in ("keep", "giver"):
                one["metadata"]["labels"] = {"app": "taker"}
        opened = [o for o in usual if o["kind"] != "NetworkPolicy"]
        for title, world, reached in (
            ("denied", denied, False),
            ("allowed again", usual, True),
            ("relabelled", relabelled, False),
            ("no policy", opened, True),
            ("the first policy", usual, True),
        ):
            street.change(world)
            assert all(one.goes_on() for one in street.kept), f"cut off when {title}"
            street.restart(world)
            assert all(one.goes_on() for one in street.kept), f"cut off by a restart when {title}"
            with street.fabric.inside("x/peer"):
                for version, address in zip((AF_INET, AF_INET6), addresses("x/keep")):
                    with socket(version, SOCK_STREAM) as asker:
                        asker.settimeout(0.2)
                        code = asker.connect_ex((address, 1))
                    assert (code == errno.ECONNREFUSED) == reached, f"a new connection when {title}: {code}"
        return 0

    assert enclosure.run(work) == 0, "see the traceback on standard error"
