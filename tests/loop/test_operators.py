"""What operators see, without a kernel: metrics as Prometheus reads them, NPM's names, the log, HTTP's manners."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agent.core.policy import Policy, read_policy
from agent.dataplane.report import Report
from agent.kube import events as events_module
from agent.kube.errors import Refused, Unreachable
from agent.kube.events import Announcer, by_id, event, event_name
from agent.loop import health as health_module
from agent.loop import logs as logs_module
from agent.loop import server as server_module
from agent.loop import watching as watching_module
from agent.loop.health import Health
from agent.loop.inbox import Inbox
from agent.loop.logs import LOGGER, Repeats, configure, flush, log
from agent.loop.metrics import LATENCIES, WRITES, Metrics, Sizes
from agent.loop.npm import ClusterMetrics, NodeMetrics
from agent.loop.server import REQUESTS, Address, Server, health_paths, metrics_path
from agent.loop.watching import Watching


def filled() -> Metrics:
    """Metrics with every series that there can be."""
    metrics = Metrics(Inbox())
    report = Report(
        **dict.fromkeys(WRITES, 2),
        attempts=2,
        refused={"sets": 1},
        seconds={"sets": 0.002, "rules": 0.02, "plan": 0.001},
    )
    metrics.synced(report)
    for stage in ("event", "state", "compile"):
        metrics.stage.labels(stage).observe(0.001)
    metrics.latency.observe(0.01)
    metrics.isolation.observe(0.01)
    metrics.events.labels("Pod").inc()
    metrics.unreadable.labels("Pod").inc()
    metrics.watch_restarts.labels("Pod", "gone").inc()
    metrics.posted.labels("created").inc()
    metrics.failures.labels("rules").inc()
    metrics.sizes = Sizes(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, {"cidr-unreadable": 1}, {"npa4-p-abc": 10})
    return metrics


def promtool() -> str:
    found = shutil.which("promtool", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    return found or pytest.skip("needs promtool: `make prometheus` fetches Debian's")


def test_promtool_finds_no_fault() -> None:
    text = generate_latest(filled().registry)
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_metrics_that_the_documents_name() -> None:
    """Each family has a help text; labels are few and bounded."""
    allowed = {"stage", "kind", "reason", "cause", "result", "version", "le"}
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(filled().registry).decode())}
    ours = {name: family for name, family in families.items() if name.startswith("netpol_agent_")}
    for name in (
        "sync_duration_seconds",
        "event_to_kernel_seconds",
        "pod_isolation_seconds",
        "kernel_writes",
        "kernel_failures",
        "kernel_retries",
        "drift_found",
        "drift_repaired",
        "rules",
        "chains",
        "sets",
        "set_members",
        "policies",
        "pods_watched",
        "pods_local",
        "pods_isolated",
        "invalid_policies",
        "watch_restarts",
        "last_successful_sync_timestamp_seconds",
        "queue_depth",
        "build_info",
    ):
        assert f"netpol_agent_{name}" in ours
    for family in ours.values():
        assert family.documentation
        assert {label for sample in family.samples for label in sample.labels} <= allowed
    assert len(LATENCIES) < 20


def test_names_and_units_of_npm() -> None:
    """Times are milliseconds, with the quantiles that dashboards draw; sizes stand on /cluster-metrics."""
    npm, metrics = NodeMetrics(), filled()
    for milliseconds in range(1, 101):
        npm.policy.observe(milliseconds / 1000)
    npm.ipset.observe(0.004, 3)
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(npm.registry).decode())}
    samples = {(s.name, s.labels.get("quantile")): s for s in families["npm_add_policy_exec_time"].samples}
    assert samples["npm_add_policy_exec_time", "0.5"].value == pytest.approx(51, abs=1)
    assert samples["npm_add_policy_exec_time", "0.99"].value == pytest.approx(100, abs=1)
    assert samples["npm_add_policy_exec_time", "0.5"].labels["had_error"] == "false"
    assert samples["npm_add_policy_exec_time_count", None].value == 100
    assert samples["npm_add_policy_exec_time_sum", None].value == pytest.approx(5050)
    ipset = {(s.name, s.labels.get("quantile")): s.value for s in families["npm_add_ipset_exec_time"].samples}
    assert (ipset["npm_add_ipset_exec_time_count", None], ipset["npm_add_ipset_exec_time", "0.5"]) == (3, 4)
    rules = {(s.name, s.labels.get("quantile")): s.value for s in families["npm_add_iptables_rule_exec_time"].samples}
    assert math.isnan(rules["npm_add_iptables_rule_exec_time", "0.9"])
    sizes = ClusterMetrics(metrics).registry
    assert sizes.get_sample_value("npm_num_policies") == 5
    assert sizes.get_sample_value("npm_num_iptables_rules") == 8
    assert sizes.get_sample_value("npm_num_ipsets") == 9
    assert sizes.get_sample_value("npm_num_ipset_entries") == 10
    assert sizes.get_sample_value("npm_ipset_counts", {"set_name": "npa4-p-abc", "set_hash": "abc"}) == 10


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def logging_restored() -> Iterator[None]:
    loggers = (LOGGER, logging.getLogger())
    before = [(one.handlers, one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, level, propagate) in zip(loggers, before):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("logging_restored")
def test_lines_as_text_and_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    configure("text", "info")
    log(logging.WARNING, "one % sign", policy="x/y")
    flush()
    line = capfd.readouterr().err
    assert line.endswith("Z WARNING one % sign\n")
    configure("json", "warning")
    log(logging.INFO, "not told")
    log(logging.ERROR, "two\nlines", policy="x/y", number=3)
    flush()
    (line,) = capfd.readouterr().err.splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {"level": "error", "message": "two\nlines", "policy": "x/y", "number": 3}


@pytest.mark.usefixtures("logging_restored")
def test_a_reader_who_stops_reading_does_not_stop_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what tells, nor the end."""
    end, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(full, b"x" * 4096):
            pass
    os.set_blocking(full, True)
    monkeypatch.setattr(logs_module, "STDERR", full)
    configure("text", "info")
    for number in range(3000):
        log(logging.WARNING, f"line {number}")
    flush()
    os.close(end)  # the thread that writes is told so, and goes on
    LOGGER.handlers[0].flush()
    os.close(full)


def test_what_repeats_is_told_once_with_its_number() -> None:
    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord("n", logging.INFO, "", 0, "%s", (message,), None)

    repeats = Repeats(seconds=3600)
    assert repeats.filter(record("a"))
    assert repeats.filter(record("b"))
    assert not any(repeats.filter(record("a")) for _ in range(5))
    repeats._told = {text: (when - 4000, held) for text, (when, held) in repeats._told.items()}
    last = record("a")
    assert repeats.filter(last)
    assert last.getMessage() == "a (and 5 times more in the last minutes)"
    for number in range(5000):
        warning = record(f"line {number}")
        warning.levelno = logging.WARNING
        assert repeats.filter(warning)
    assert len(repeats._told) <= 1000


def test_a_flood_of_changes_is_no_flood_of_lines() -> None:
    """What is left out is counted; warnings are told all the same."""
    repeats = Repeats()

    def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
        return logging.LogRecord("n", level, "", 0, "%s", (message,), None)

    told = sum(repeats.filter(record(f"policy {number}")) for number in range(10_000))
    assert 200 <= told < 1000
    warning = record("the kernel refuses", logging.WARNING)
    assert repeats.filter(warning)
    assert f"the kernel refuses ({10_000 - told} lines before it left out)" == warning.getMessage()


# --- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, told", [("127.0.0.1:10092", "127.0.0.1:10092"), ("[::1]:80", "[::1]:80"), ("localhost:0", "localhost:0")]
)
def test_addresses_to_listen_on(text: str, told: str) -> None:
    assert str(Address.parse(text)) == told


@pytest.mark.parametrize("text", ["", "80", ":80", "1.2.3.4", "::1:80", "[::1]", "[::1:80", "x:y", "h:65536", "h:-1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        Address.parse(text)


def test_clients_that_dawdle_do_not_keep_others_from_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are: the oldest gives its place to who comes, and all end when their time is over."""
    monkeypatch.setattr(server_module, "SECONDS", 1.0)
    health = Health(list)
    health.enforcing = ""
    server = Server(Address("127.0.0.1", 0), health_paths(health))
    server.start()
    lazy = [socket.create_connection(("127.0.0.1", server.server_port), timeout=10) for _ in range(REQUESTS * 3)]
    for one in lazy:
        with contextlib.suppress(OSError):
            one.sendall(b"G")
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as eager:
        eager.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert eager.recv(100).startswith(b"HTTP/1.0 200")
    trickling = lazy[-1]
    with contextlib.suppress(OSError):
        for _ in range(100):
            trickling.sendall(b"E")
            time.sleep(0.1)
        raise AssertionError("it may trickle for ever")
    for one in lazy:
        one.close()
    server.shutdown()
    server.server_close()


def test_a_writer_that_is_stuck_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health(lambda: ["Pod: no answer"])
    assert health.dead() == ""
    monkeypatch.setattr(health_module, "STUCK", -1.0)
    assert "stuck" in health.dead()
    health.unenforceable = ("kube-proxy runs in IPVS mode",)
    assert health.reasons() == ["Pod: no answer", "nothing has been enforced yet", "kube-proxy runs in IPVS mode"]
    assert health_paths(health)["/livez"]({}).status == 503
    assert metrics_path("/metrics", filled().registry)["/metrics"]({}).status == 200


def test_a_stream_that_opens_and_fails_again_and_again_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It began when it first failed; over it is when the server has answered for a while."""
    now = 100.0
    monkeypatch.setattr(watching_module, "monotonic", lambda: now)
    watching = Watching(None, Inbox(), Metrics(Inbox()))  # type: ignore[arg-type]
    assert watching.reasons() == [f"{k}: the first list is not complete" for k in ("Namespace", "NetworkPolicy", "Pod")]
    for kind in ("Namespace", "NetworkPolicy", "Pod"):
        watching.connected(kind)
        watching.in_sync(kind)
    assert watching.complete
    assert watching.reasons() == []
    for _ in range(40):
        watching.failed("Pod", Refused(500, "storage is down"), "")
        now += 1
        watching.connected("Pod")
        assert watching.reasons() == []
    watching.failed("Pod", Refused(500, "storage is down"), "")
    assert watching.reasons() == ["Pod: storage is down (HTTP 500)"]
    watching.connected("Pod")
    now += 60
    watching.failed("Pod", Unreachable("refused"), "")
    assert watching.reasons() == []
    now += 31
    assert watching.reasons() == ["Pod: no answer from the API server: refused"]


# --- Events ----------------------------------------------------------------------------------------------------------


class Posts:
    """In the place of a connection: records what is posted, and refuses as it is told."""

    def __init__(self, *refusals: Refused) -> None:
        self.bodies: list[dict[str, object]] = []
        self._refusals = list(refusals)

    def post(self, path: str, body: dict[str, object]) -> None:
        assert path == "/api/v1/namespaces/x/events"
        self.bodies.append(body)
        if self._refusals:
            raise self._refusals.pop(0)


def faulty(**more: str) -> Policy:
    meta = {"namespace": "x", "name": "p" * 250, "uid": "u-1", **more}
    wrong = [{"ports": [{"port": "a b"}]}] * 1500
    spec = {"podSelector": {}, "ingress": [*wrong, {"ports": [{"port": 0}]}]}
    return read_policy({"metadata": meta, "spec": spec})


def test_an_event_has_the_same_name_on_every_node() -> None:
    """One for each id, however often a policy has that fault."""
    policy = faulty()
    (first, more), (second, no_more) = by_id(policy.findings)
    assert (more, no_more) == (" (and 1499 more like it)", "")
    assert event_name(policy, first) == event_name(policy, policy.findings[7])
    assert event_name(policy, first) != event_name(policy, second)
    assert event_name(faulty(uid="u-2"), first) != event_name(policy, first)
    made: Any = event(policy, first, more, "node-1")
    assert len(made["metadata"]["name"]) <= 253
    assert made["involvedObject"]["uid"] == "u-1"
    assert first.field in made["message"]
    assert "1499 more" in made["message"]


@pytest.mark.parametrize(
    "refusals, result, posts",
    [
        ((), "created", 1),
        ((Refused(409, "exists"),), "exists", 1),
        ((Refused(403, "no"),), "failed", 1),
        ((Refused(500, "busy", 0.01), Refused(429, "busy", 0.01)), "created", 3),
        ((Refused(500, "busy", 0.01),) * 3, "failed", 3),
    ],
)
def test_an_event_is_posted_once(refusals: tuple[Refused, ...], result: str, posts: int) -> None:
    connection = Posts(*refusals)
    results: list[str] = []
    announcer = Announcer(connection, "node-1", results.append)  # type: ignore[arg-type]
    policy = faulty()
    announcer.announce(policy)
    announcer.announce(policy)
    assert announcer._waiting.qsize() == 2, "two ids, each once"
    assert announcer._post(announcer._waiting.get()[2]) == result
    assert len(connection.bodies) == posts


def test_events_of_policies_that_are_gone_are_not_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what failed is tried again when the policy comes again."""
    monkeypatch.setattr(events_module, "SPREAD", 0.0)
    monkeypatch.setattr(events_module, "PER_SECOND", 1e6)
    connection = Posts(Refused(403, "no"))
    results: list[str] = []
    announcer = Announcer(connection, "node-1", results.append)  # type: ignore[arg-type]
    policy = faulty()
    announcer.announce(policy)
    announcer.forget(policy.key)
    announcer.start()
    deadline = time.monotonic() + 10
    while announcer._waiting.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (connection.bodies, results) == ([], [])
    for expected in (["failed", "created"], ["failed", "created", "created"], ["failed", "created", "created"]):
        announcer.announce(policy)
        while (len(results) < len(expected) or announcer._waiting.qsize()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert results == expected
    announcer.stop()
