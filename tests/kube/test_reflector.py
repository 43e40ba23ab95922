"""A reflector follows a kind whatever the API server does: one behaviour in each test."""

from __future__ import annotations

import gc
import json
import time
import tracemalloc
from itertools import pairwise

import pytest

from agent.kube.connection import Timeouts
from agent.kube.errors import Broken, Gone, Refused, Silent, Unreachable
from agent.kube.kinds import NAMESPACE, NETWORK_POLICY, POD
from agent.kube.reflector import Patience, Reflector
from tests.kube.following import PATIENCE, Following, following, pod, until
from tests.kube.server import LIVE, Fault, Server

A, B, C, D = (pod(name) for name in "abcd")
IMPATIENT = Timeouts(connect=5.0, answer=0.1, silence=0.1)


def small_pages(reflector: Reflector) -> None:
    reflector._page = 1


def in_pages(reflector: Reflector) -> None:
    """Pages of one object, from the start."""
    reflector._streams = False
    small_pages(reflector)


def errors(found: Following) -> list[type]:
    return [type(error) for error, _ in found.told.failures]


# --- lists -----------------------------------------------------------------------------------------------------------


def test_streamed_list() -> None:
    """A server that can stream its list is asked once; that request goes on as the watch."""
    with following(Server(A, B)) as found:
        found.until_known("x/a", "x/b")
        found.server.put(C)
        found.server.delete(A)
        found.until_known("x/b", "x/c")
        assert len(found.asked) == 1
        query = found.asked[0].query
        assert query["sendInitialEvents"] == "true"
        assert query["resourceVersionMatch"] == "NotOlderThan"
        assert query["allowWatchBookmarks"] == "true"
        assert 240 <= int(query["timeoutSeconds"]) <= 300
        assert found.told.versions_in_sync == [{"x/a", "x/b"}]
        assert not found.told.failures


@pytest.mark.parametrize(
    "switches", [{"streams": 422}, {"streams": 500, "refuses_in_stream": True}, {"streams": 400}], ids=str
)
def test_pages_where_the_server_cannot_stream(switches: dict[str, int]) -> None:
    """An older server, or one on an old etcd: a refusal is no failure, and is asked for once."""
    with following(Server(A, B, C, **switches), prepare=small_pages) as found:
        found.until_known("x/a", "x/b", "x/c")
        found.server.delete(B)
        found.until_known("x/a", "x/c")
        assert [one.query.get("limit") for one in found.asked] == [None, "1", "1", "1", None]
        assert found.asked[-1].query["resourceVersion"].isdigit()
        assert not found.told.failures
        found.server.compact()
        found.server.hang_up()
        until(lambda: len(found.told.versions_in_sync) == 2)
        assert sum("sendInitialEvents" in one.query for one in found.asked) == 1


def test_every_kind() -> None:
    """Namespaces have no namespace in their key; all are asked for cluster-wide."""
    meta = {"namespace": "x", "name": "p", "uid": "1"}
    policy = {"apiVersion": "v1", "kind": "NetworkPolicy", "metadata": meta, "spec": {"podSelector": {}}}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}
    for kind, one, key in ((NAMESPACE, namespace, "x"), (POD, A, "x/a"), (NETWORK_POLICY, policy, "x/p")):
        with following(Server(one), kind) as found:
            found.until_known(key)


def test_empty_cluster() -> None:
    """Nothing is everything, too."""
    with following(Server()) as found:
        found.until_known()
    with following(Server(streams=422)) as found:
        found.until_known()


def test_a_list_that_ends_early_is_not_whole() -> None:
    """Nothing is deleted, and nothing is in sync, before all has been told."""
    server = Server(A, B)
    server.spoil("Pod", Fault("end", after=1), Fault("cut", after=2))
    with following(server) as found:
        found.until_known("x/a", "x/b")
        assert len(found.told.versions_in_sync) == 1
        assert ("deleted", "x/a") not in found.told.log
        assert errors(found) == [Broken, Broken]


def test_what_vanished_while_a_list_was_cut_is_deleted_with_the_next() -> None:
    server = Server(A, B)
    server.spoil("Pod", Fault("stall", after=1, seconds=0.05), Fault("delay", seconds=0.05))
    with following(server, timeouts=IMPATIENT) as found:
        until(lambda: found.told.objects)
        server.delete(A)
        found.until_known("x/b")


def test_pages_start_anew_when_their_list_was_compacted() -> None:
    """410 for a continue token: all pages again, larger ones; what vanished meanwhile is deleted in the end."""
    server = Server(A, B, C)
    server.spoil("Pod", Fault("none"), Fault("compact"))
    with following(server, prepare=in_pages) as found:
        until(lambda: len(found.asked) >= 2)
        found.until_known("x/a", "x/b", "x/c")
        assert errors(found) == [Gone]
        assert [one.query["limit"] for one in found.asked if not one.watches] == ["1", "1", "2", "2"]
        assert len(found.told.versions_in_sync) == 1


def test_pages_are_no_older_than_what_was_told() -> None:
    """Behind a load balancer the next server may know less; and one that was set back is asked for what it has."""
    with following(Server(A), prepare=in_pages) as found:
        found.until_known("x/a")
        found.server.put(B)
        found.until_known("x/a", "x/b")
        known = str(found.server.version)
        found.server.spoil("Pod", Fault("answer", status=504))
        found.server.compact()
        found.server.hang_up()
        until(lambda: len(found.told.versions_in_sync) == 2)
        lists = [one.query for one in found.asked if not one.watches]
        assert [(one.get("resourceVersion"), one.get("resourceVersionMatch")) for one in lists[1:]] in (
            [(known, "NotOlderThan")],
            [(None, None)],
        )


# --- watches ---------------------------------------------------------------------------------------------------------


def test_resumes_where_it_was() -> None:
    """A connection that is cut costs no list."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        for one, key in ((B, "x/b"), (C, "x/c")):
            found.server.put(one)
            until(lambda key=key: key in found.told.objects)
            known = str(found.server.version)
            asked = len(found.asked)
            found.server.hang_up()
            found.until_asked(asked + 1)
            assert found.asked[-1].query["resourceVersion"] == known
        assert found.lists == 1
        assert found.told.changes == [("changed", "x/a"), ("changed", "x/b"), ("changed", "x/c")]


def test_nothing_is_missed_between_two_watches() -> None:
    """What happens while nobody watches is told when the watch resumes."""
    with following(Server(A), patience=Patience(0.1, 0.1)) as found:
        found.until_known("x/a")
        found.server.spoil("Pod", Fault("hang up"))
        found.server.hang_up()
        until(lambda: found.told.failures)
        found.server.put(B)
        found.server.delete(A)
        found.until_known("x/b")
        assert found.lists == 1


def test_bookmarks_advance_the_version() -> None:
    """On a quiet kind it is bookmarks that keep the version from getting too old."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.advance(1000)
        found.server.bookmark()
        known = str(found.server.version)
        time.sleep(0.05)
        found.server.hang_up()
        found.until_asked(2)
        until(lambda: found.asked[-1].query.get("resourceVersion") == known, lambda: found.asked[-1].query)
        assert found.lists == 1


def test_updates_of_a_status_end_here() -> None:
    """What changes nothing that is read is not told, and advances the version."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.touch(A)
        found.server.put(B)
        found.until_known("x/a", "x/b")
        found.server.touch(A)
        known = str(found.server.version)
        for _ in range(3):
            found.server.hang_up()
            time.sleep(0.03)
        until(lambda: found.asked[-1].query.get("resourceVersion") == known)
        assert found.told.changes == [("changed", "x/a"), ("changed", "x/b")]
        assert found.lists == 1


def test_a_bookmark_within_the_list_does_not_end_it() -> None:
    """Only the one that is marked says that the list is whole."""
    server = Server(A, B)
    server.spoil("Pod", Fault("bookmark", after=0), Fault("bookmark", after=1), Fault("cut", after=1))
    with following(server) as found:
        until(lambda: found.told.versions_in_sync)
        found.until_known("x/a", "x/b")
    server = Server(A, B)
    server.spoil("Pod", Fault("bookmark, cut"))
    with following(server) as found:
        found.until_known("x/a", "x/b")
        assert [one.lists for one in found.asked] == [True, True]


@pytest.mark.parametrize("by_http", [False, True])
@pytest.mark.parametrize("streams", [200, 422])
def test_410_lists_again(by_http: bool, streams: int) -> None:
    """What vanished meanwhile is deleted, when the list is whole and no sooner; what stayed never goes."""
    with following(Server(A, B, streams=streams, gone_by_http=by_http), patience=Patience(0.1, 0.1)) as found:
        found.until_known("x/a", "x/b")
        found.server.spoil("Pod", Fault("hang up"))
        found.server.hang_up()
        until(lambda: found.told.failures)
        found.server.delete(A)
        found.server.put(C)
        found.server.compact()
        found.until_known("x/b", "x/c")
        assert Gone in errors(found)
        assert found.lists >= 2
        assert found.told.versions_in_sync == [{"x/a", "x/b"}, {"x/b", "x/c"}]
        deleted = found.told.log.index(("deleted", "x/a"))
        assert ("changed", "x/c") in found.told.log[:deleted]
        assert ("deleted", "x/b") not in found.told.log


def test_410_in_a_watch_that_runs() -> None:
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.spoil("Pod", Fault("error", status=410))
        found.server.hang_up()
        until(lambda: len(found.told.versions_in_sync) == 2)
        assert Gone in errors(found)
        assert found.told.changes == [("changed", "x/a")]


def test_other_errors_resume() -> None:
    """An ERROR of another code is told, and costs no list."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.spoil("Pod", Fault("error", status=500))
        found.server.hang_up()
        until(lambda: Refused in errors(found))
        found.server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == 1


def test_a_version_that_only_brings_errors_is_given_up() -> None:
    """Whatever the server calls it: when the watch fails again and again before it says anything, list again."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.spoil("Pod", *[Fault("error", status=500)] * PATIENCE.tries)
        found.server.hang_up()
        until(lambda: len(found.told.versions_in_sync) == 2, lambda: found.told.log)
        assert found.lists == 2


@pytest.mark.parametrize("name", ["duplicate", "replay"])
def test_what_was_told_before_is_ignored(name: str) -> None:
    """A server that says things twice, or begins before where it was asked to, brings nothing old back."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.put(B)
        found.server.delete(B)
        until(lambda: ("deleted", "x/b") in found.told.log)
        found.server.spoil("Pod", Fault(name, after=LIVE))
        found.server.hang_up()
        found.until_asked(2)
        found.server.put(C)
        found.until_known("x/a", "x/c")
        found.server.put(pod("a", spec={"nodeName": "node-1"}))
        until(lambda: len(found.told.changes) >= 5)
        assert found.told.changes == [
            ("changed", "x/a"),
            ("changed", "x/b"),
            ("deleted", "x/b"),
            ("changed", "x/c"),
            ("changed", "x/a"),
        ]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("cut inside"),
        Fault("torn"),
        Fault("garbage"),
        Fault("garbage", body=b'{"type":"ADDED","object":{"metadata":{}}}\n'),
        Fault("garbage", body=b'{"type":"SURPRISE","object":{"metadata":{"name":"a"}}}\n'),
        Fault("garbage", body=b'{"type":"ADDED","object":{"a":' + b"[" * 5000 + b"\n"),
        Fault("garbage", body=b'{"type":"BOOKMARK","object":{"metadata":{"annotations":"none"}}}\n'),
        Fault("empty"),
        Fault("hang up"),
        Fault("end"),
        Fault("answer", status=500, body=b""),
        Fault("answer", status=200, body=b"<html>a portal</html>"),
        Fault("answer", status=429, headers={"Retry-After": "\u00b2"}),
        Fault("answer", status=302, headers={"Location": "/elsewhere"}),
    ],
    ids=lambda fault: f"{fault.name} {fault.status} {fault.body[:40]!r}",
)
@pytest.mark.parametrize("initial", [True, False])
def test_what_cannot_be_used_is_asked_for_again(fault: Fault, initial: bool) -> None:
    server = Server(A)
    if initial:
        server.spoil("Pod", fault)
    with following(server) as found:
        found.until_known("x/a")
        if not initial:
            server.spoil("Pod", fault)
            server.hang_up()
        until(lambda: not server.faults)
        server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == (2 if initial and fault.name not in ("answer",) else found.lists)
        assert len(found.told.changes) <= 3


@pytest.mark.parametrize("name", ["cut", "garbage", "empty", "hang up", "error", "answer"])
def test_pages_that_cannot_be_used_are_asked_for_again(name: str) -> None:
    server = Server(A, B)
    server.spoil("Pod", Fault("none"), Fault(name))
    with following(server, prepare=in_pages) as found:
        found.until_known("x/a", "x/b")
        assert found.told.failures
        assert len(found.told.versions_in_sync) == 1


def test_streams_that_always_break_become_pages() -> None:
    """Something between us and the server may not let a long answer through."""
    server = Server(A, B)
    server.spoil("Pod", *[Fault("cut", after=1)] * PATIENCE.tries)
    with following(server) as found:
        found.until_known("x/a", "x/b")
        assert any(not one.watches for one in found.asked)


# --- time ------------------------------------------------------------------------------------------------------------


def test_retry_after_is_honoured() -> None:
    """429 with Retry-After: no request before that."""
    server = Server(A)
    server.spoil("Pod", Fault("answer", status=429, headers={"Retry-After": "1"}))
    with following(server) as found:
        found.until_known("x/a")
        assert found.asked[1].at - found.asked[0].at >= 1.0
        assert [error.retry_after for error, _ in found.told.failures] == [1.0]


def test_backoff_grows() -> None:
    """Waits double, up to the longest: a server that is down is not flooded."""
    server = Server(A)
    server.spoil("Pod", *[Fault("answer", status=503)] * 7)
    with following(server, patience=Patience(first=0.02, longest=0.32)) as found:
        found.until_known("x/a")
        times = [one.at for one in found.asked]
        waits = [after - before for before, after in pairwise(times)]
        for wait, least in zip(waits[1:7], (0.01, 0.04, 0.08, 0.16, 0.16, 0.16)):  # the first asks for pages instead
            assert wait >= least * 0.9


def test_streams_that_end_at_once_are_not_asked_for_in_a_loop() -> None:
    server = Server(A)
    with following(server, patience=Patience(first=0.02, longest=0.32)) as found:
        found.until_known("x/a")
        server.spoil("Pod", *[Fault("end")] * 6)
        server.hang_up()
        found.until_asked(7)
        times = [one.at for one in found.asked[1:]]
        assert times[-1] - times[0] >= 0.3


def test_a_server_that_only_knows_lists_is_not_asked_in_a_loop() -> None:
    """Every watch says 410 at once: lists are as far apart as other tries."""
    server = Server(A)
    server.spoil("Pod", *[Fault("error", after=2, status=410)] * 7)
    with following(server, patience=Patience(first=0.02, longest=0.32)) as found:
        until(lambda: len(found.told.versions_in_sync) == 8)
        times = [one.at for one in found.asked]
        assert times[7] - times[0] >= 0.6


def test_lists_that_lead_to_nothing_are_not_asked_for_in_a_loop() -> None:
    """Lists are good, and the watches behind them fail at once: not every node may read everything again and again."""
    server = Server(A)
    server.spoil("Pod", *[Fault("error", after=LIVE)] * 12)
    with following(server, patience=Patience(first=0.02, longest=0.32)) as found:
        found.until_asked(13)
        assert found.lists >= 4
        times = [one.at for one in found.asked]
        assert times[12] - times[0] >= 1.0


def test_a_defect_of_ours_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has thought of is told and tried again, later and later."""
    server = Server(A)
    with following(server, patience=Patience(first=0.02, longest=0.32)) as found:
        found.until_known("x/a")
        tell = found.told.changed

        def fail(kind: str, key: str, value: object) -> None:
            if key == "x/b":
                server.advance()
                raise ZeroDivisionError("of ours")
            tell(kind, key, value)  # type: ignore[arg-type]

        monkeypatch.setattr(found.told, "changed", fail)
        server.put(B)
        until(lambda: len(found.told.failures) >= 7)
        times = [one.at for one in found.asked]
        assert times[6] - times[0] >= 0.5
        monkeypatch.setattr(found.told, "changed", tell)
        found.until_known("x/a", "x/b")


def test_a_long_good_watch_ends_the_backoff() -> None:
    """One that brought something new counts as good."""
    server = Server(A)
    server.spoil("Pod", *[Fault("answer", status=503)] * 6)
    with following(server, patience=Patience(first=0.01, longest=0.64)) as found:
        found.until_known("x/a")
        server.put(B)
        found.until_known("x/a", "x/b")
        server.hang_up()
        asked = len(found.asked)
        found.until_asked(asked + 1)
        begin = found.asked[asked - 1].at
        assert found.asked[asked].at > begin


def test_silence_is_noticed() -> None:
    """A connection that is dead without saying so is given up, and the watch resumes."""
    with following(Server(A), timeouts=IMPATIENT) as found:
        found.until_known("x/a")
        until(lambda: Silent in errors(found))
        found.server.put(B)
        found.until_known("x/a", "x/b")


@pytest.mark.parametrize("paged", [False, True])
def test_silence_within_a_list_is_noticed(paged: bool) -> None:
    server = Server(A)
    server.spoil("Pod", Fault("stall", seconds=5))
    begin = time.monotonic()
    with following(server, timeouts=IMPATIENT, prepare=in_pages if paged else small_pages) as found:
        found.until_known("x/a")
        assert Silent in errors(found)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("paged", [False, True])
def test_a_trickle_is_noticed(paged: bool) -> None:
    """Bytes that arrive without ever making a whole are as good as silence."""
    server = Server(A)
    server.spoil("Pod", Fault("trickle", seconds=0.02, pieces=250))
    begin = time.monotonic()
    with following(server, timeouts=IMPATIENT, prepare=in_pages if paged else small_pages) as found:
        found.until_known("x/a")
        assert Silent in errors(found)
        assert time.monotonic() - begin < 5


def test_nobody_listens() -> None:
    """Refused connections are told, and tried again."""
    server = Server(A)
    with following(server) as found:
        found.until_known("x/a")
        server.close()
        until(lambda: Unreachable in errors(found))


# --- permission ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, advice", [(403, "grant get, list and watch on pods"), (404, "does not serve pods")])
def test_refusals_are_told_with_advice(status: int, advice: str) -> None:
    """And tried again, until they end."""
    server = Server(A, answers={"Pod": status})
    with following(server) as found:
        until(lambda: len(found.told.failures) >= 3)
        assert all(isinstance(error, Refused) and error.status == status for error, _ in found.told.failures)
        assert all(advice in told for _, told in found.told.failures)
        assert not found.told.versions_in_sync
        server.switches.answers = {}
        found.until_known("x/a")


def test_permission_that_is_taken_away_and_comes_back() -> None:
    """What is known stays, and nothing is listed again."""
    with following(Server(A)) as found:
        found.until_known("x/a")
        found.server.switches.answers = {"Pod": 403}
        found.server.hang_up()
        until(lambda: found.told.failures and found.told.failures[-1][1])
        found.server.switches.answers = {}
        found.server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == 1
        assert ("deleted", "x/a") not in found.told.log


# --- objects ---------------------------------------------------------------------------------------------------------


UNREADABLE = [
    ({"spec": {"nodeName": 5}}, "spec.nodeName"),
    ({"spec": {"containers": [{"ports": [{"containerPort": "http"}]}]}}, "spec.containers[0].ports[0].containerPort"),
    ({"status": []}, "status"),
]


@pytest.mark.parametrize("streams", [200, 422])
@pytest.mark.parametrize("more, field", UNREADABLE, ids=[field for _, field in UNREADABLE])
def test_an_unreadable_object_counts_as_absent(more: dict[str, object], field: str, streams: int) -> None:
    """It is told with its name and field, the others work; it is there as soon as it can be read."""
    with following(Server(A, pod("b", **more), C, streams=streams)) as found:
        found.until_known("x/a", "x/c")
        finding = found.told.findings[0]
        assert (finding.object, finding.field) == ("Pod x/b", field)
        found.server.put(B)
        found.until_known("x/a", "x/b", "x/c")
        found.server.put(pod("b", **more))
        found.until_known("x/a", "x/c")
        assert len(found.told.findings) == 2


@pytest.mark.parametrize("streams", [200, 422])
def test_odd_metadata_is_no_reason_to_lose_the_rest(streams: int) -> None:
    """Fields that nobody needs are not looked at."""
    odd = pod("b")
    odd["metadata"] = {**odd["metadata"], "annotations": {"a": 5}, "managedFields": "none"}
    with following(Server(A, odd, C, streams=streams)) as found:
        found.until_known("x/a", "x/b", "x/c")


def test_only_fields_in_use_are_kept() -> None:
    """An object with a megabyte of annotations, and one more of status, costs a few kB."""
    text = {f"key-{n}": "x" * 1000 for n in range(1000)}
    big = pod("b", status={"phase": "Running", "podIP": "10.0.0.1", "conditions": [text]})
    big["metadata"] = {**big["metadata"], "annotations": text, "managedFields": [text]}
    policy = {**big, "kind": "NetworkPolicy", "spec": {"podSelector": {}}}
    namespace = {**big, "kind": "Namespace", "metadata": {**big["metadata"], "name": "b"}}
    for kind, one in ((POD, big), (NETWORK_POLICY, policy), (NAMESPACE, namespace)):
        data = json.dumps(one).encode()
        kind.read(data)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            kept = [kind.read(data) for _ in range(5)]
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(kept) == 5
        assert after - before < 5 * 5000
