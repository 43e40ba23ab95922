"""Whatever the API server does on the way: in the end the agent knows exactly what is there, and never acts too early.

All kinds are followed at once, over sockets, into the agent's own inbox and state; only the kernel is not there.
NETPOL_TEST_SCALE multiplies the number of examples."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from select import select
from threading import enumerate as threads
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from agent.core.node import Node
from agent.core.policy import Policy
from agent.kube import reflector
from agent.kube.connection import Connection, Timeouts
from agent.kube.kinds import KINDS
from agent.kube.kinds import Object as Value
from agent.kube.reflector import Patience
from agent.loop.agent import Agent
from agent.loop.health import Health
from agent.loop.inbox import Inbox
from agent.loop.metrics import Metrics
from agent.loop.npm import NodeMetrics
from agent.loop.watching import Watching
from tests import worlds
from tests.kube.following import DEADLINE, TIMEOUTS, plainly
from tests.kube.server import LIVE, Fault, Server
from tests.nodes import key_of, node_of, snapshot
from tests.test_incremental import node_name

SCALE = float(os.environ.get("NETPOL_TEST_SCALE", "1"))
IMPATIENT = Timeouts(connect=5.0, answer=0.03, silence=0.03)
PATIENCE = Patience(first=0.001, longest=0.01)
PATIENT_TURNS = 20
"""In which faults that nothing has met yet may still happen."""
READ = {kind.name: kind.read for kind in KINDS}
Objects = list[dict[str, Any]]
Known = Mapping[str, Value]


@pytest.fixture(autouse=True, scope="module")
def small_and_silent() -> Iterator[None]:
    """Pages of two objects, so that lists have several; and thousands of faults would be logged."""
    logging.disable(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reflector, "PAGE", 2)
        yield
    logging.disable(logging.NOTSET)


class Seen(Watching):
    """Remembers what was told of each kind, and what of that was there whenever a list was said to be whole."""

    def __init__(self, connection: Connection, inbox: Inbox, metrics: Metrics, patience: Patience) -> None:
        super().__init__(connection, inbox, metrics, patience)
        self.told: dict[str, dict[str, Value]] = {kind.name: {} for kind in KINDS}
        self.all: list[tuple[str, str, Value | None]] = []
        self.whole: list[tuple[str, Known]] = []
        self.too_early: list[str] = []

    def changed(self, kind: str, key: str, value: Value) -> None:
        self.told[kind][key] = value
        self.all.append((kind, key, value))
        super().changed(kind, key, value)

    def deleted(self, kind: str, key: str) -> None:
        del self.told[kind][key]
        self.all.append((kind, key, None))
        super().deleted(kind, key)

    def in_sync(self, kind: str) -> None:
        known = {name for name, _ in self.whole}
        if self.complete and known != set(READ):
            self.too_early.append(kind)
        self.whole.append((kind, dict(self.told[kind])))
        super().in_sync(kind)


class Announced:
    """In the place of the announcer."""

    def announce(self, policy: Policy) -> None:
        """Nothing is posted."""

    def forget(self, key: str) -> None:
        """Nothing is kept."""


class Followed:
    """An agent without a kernel that follows a server."""

    def __init__(self, server: Server, name: str) -> None:
        self.connection = Connection(plainly(server), IMPATIENT)
        self.inbox = Inbox()
        metrics = Metrics(self.inbox)
        self.watching = Seen(self.connection, self.inbox, metrics, PATIENCE)
        self.agent = Agent(
            name,
            None,  # type: ignore[arg-type]
            self.inbox,
            self.watching,
            metrics=metrics,
            npm=NodeMetrics(),
            health=Health(self.watching.reasons),
            announcer=Announced(),  # type: ignore[arg-type]
            resync=3600,
            begin=lambda _: True,
        )

    @property
    def node(self) -> Node:
        return self.agent.node

    def take(self, seconds: float) -> None:
        """One turn of the writer, as far as it needs no kernel."""
        select([self.inbox], [], [], seconds)
        self.agent._apply(self.inbox.take())
        self.node.compile()

    def until(self, expected: Any) -> None:
        """Until the node desires this."""
        deadline = time.monotonic() + DEADLINE
        while not (self.watching.complete and snapshot(self.node) == expected):
            assert time.monotonic() < deadline, "the node did not come to what the server holds"
            self.take(0.05)


@contextmanager
def followed(server: Server, name: str) -> Iterator[Followed]:
    found = Followed(server, name)
    found.watching.start()
    try:
        yield found
    finally:
        found.watching.stop()
        server.close()
        for thread in threads():
            if thread.name.startswith("watch-"):
                thread.join(DEADLINE)
        os.close(found.inbox.fileno())


def states(server: Server) -> dict[str, list[Known]]:
    """What there was of each kind, at every version."""
    found: dict[str, list[Known]] = {name: [{}] for name in READ}
    for event in server.history:
        before = found[event.kind][-1]
        value = READ[event.kind](msgspec.Raw(msgspec.json.encode(event.object)))
        rest = {key: one for key, one in before.items() if key != event.key}
        found[event.kind].append(rest if event.type == "DELETED" else {**rest, event.key: value})
    return found


def change(server: Server, before: Objects, after: Objects) -> None:
    """What happened to the world, as changes of the server's objects."""
    old, new = ({key_of(one): one for one in objects} for objects in (before, after))
    server.delete(*(one for key, one in old.items() if key not in new))
    server.put(*(one for key, one in new.items() if old.get(key) != one))


def faults() -> st.SearchStrategy[Fault]:
    """Anything that can go wrong with one answer."""
    inside = ("bookmark", "bookmark, cut", "cut", "cut inside", "duplicate", "end", "replay", "replay", "torn")
    slow = ("delay", "silence", "stall", "trickle")
    bodies = (b"\x00\n", b'{"type":"ADDED"}\n', b'{"type":"ADDED","object":{"metadata":{}}}\n', b"{}\n", b"[" * 3000)
    kinds = [
        st.sampled_from(["none", "hang up", "empty", "compact"]).map(Fault),
        st.sampled_from(inside).map(Fault),
        st.sampled_from(inside).map(Fault),
        st.sampled_from([410, 410, 500, 429, 504, 403]).map(lambda status: Fault("error", status=status)),
        st.sampled_from(bodies).map(lambda body: Fault("garbage", body=body)),
        st.tuples(st.sampled_from(slow), st.just(0), st.sampled_from([0.002, 0.01, 0.04])).map(lambda a: Fault(*a)),
        st.sampled_from([429, 500, 503, 401, 403, 404, 410, 504, 302]).map(lambda s: Fault("answer", status=s)),
    ]
    return st.tuples(st.one_of(kinds), st.integers(0, 3)).map(
        lambda drawn: drawn[0]._replace(after=LIVE if drawn[0].name == "replay" else drawn[1])
    )


def _touch(server: Server) -> None:
    objects = server.objects
    if objects:
        server.touch(objects[0])


ACTS = (Server.bookmark, Server.hang_up, Server.compact, Server.advance, _touch)


class Step(NamedTuple):
    """A change of the world; `acts` of the server before it, and seconds that the agent has for a turn."""

    objects: Objects
    acts: list[Callable[[Server], None]]
    seconds: float


class Story(NamedTuple):
    """All that a server does, drawn before the first thread starts: Hypothesis wants `random` for itself."""

    start: Objects
    steps: list[Step]
    faults: dict[str, list[Fault]]
    switches: dict[str, Any]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """A world, what happens to it, and what goes wrong on the way."""
    (_, start), *events = draw(worlds.histories(steps=6, faults=0.2))
    acts = st.lists(st.sampled_from(ACTS), max_size=2)
    steps = [Step(after, draw(acts), draw(st.sampled_from([0.002, 0.01, 0.03]))) for _, after in events]
    spoilt = {kind: draw(st.lists(faults(), max_size=8)) for kind in READ}
    switches = draw(st.sampled_from([{}, {}, {"streams": 422}, {"streams": 500, "refuses_in_stream": True}]))
    return Story(start, steps, spoilt, {**switches, "gone_by_http": draw(st.booleans())})


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(
    max_examples=max(1, round(60 * SCALE)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=set(Phase) - {Phase.shrink, Phase.explain},  # threads and sockets: a smaller story need not fail again
)
@given(stories())
def test_in_the_end_the_node_is_as_from_scratch(story: Story) -> None:
    """And on the way nothing is told that never was, nothing goes that never went, and no list is whole too early."""
    name = node_name(story.start)
    server = Server(*story.start, **story.switches)
    for kind, spoilt in story.faults.items():
        server.spoil(kind, *spoilt)
    with followed(server, name) as found:
        before = story.start
        for step in story.steps:
            for act in step.acts:
                act(server)
            found.take(step.seconds)
            change(server, before, step.objects)
            before = step.objects
        for _ in range(PATIENT_TURNS):
            if not server.faults:
                break
            server.hang_up()  # the next request meets the next fault
            found.take(0.01)
        found.connection.timeouts = TIMEOUTS
        server.behave()
        server.hang_up()  # whoever waits for an answer that was spoilt has waited enough
        found.until(snapshot(node_of(server.objects, name)))
        judge(server, found.watching)


def judge(server: Server, watching: Seen) -> None:
    """What was told, beside what there ever was: each object's states in their order, some left out."""
    there_was = states(server)
    assert watching.too_early == []
    for kind, known in watching.whole:
        assert known in there_was[kind], f"{kind}: said to be whole, and never was like that"
    told: dict[tuple[str, str], list[Value | None]] = {}
    for kind, key, value in watching.all:
        told.setdefault((kind, key), []).append(value)
    for (kind, key), values in told.items():
        rest = iter([one.get(key) for one in there_was[kind]])
        last = None
        for value in values:
            assert value == last or value in rest, f"{kind} {key} never was like that, or not any more"
            last = value
