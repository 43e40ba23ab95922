"""The writer's loop, on real kernels: when it writes, what it survives, and that it ends where a fresh start would."""

from __future__ import annotations

import random
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from agent.dataplane.errors import KernelError
from agent.loop import agent as loop
from agent.loop.server import Address, Server, health_paths, metrics_path
from tests import worlds
from tests.dataplane.kernel import BASE, FAMILIES, Kernel, run
from tests.dataplane.scenes import (
    applied,
    cluster,
    desired,
    edited,
    namespace,
    pod,
    policy,
    without,
)
from tests.dataplane.test_refusals import tools
from tests.loop.live import Live
from tests.nodes import node_of
from tests.windows import field

pytestmark = pytest.mark.root


def enforced(kernel: Kernel, live: Live, objects: list[dict]) -> None:  # type: ignore[type-arg]
    """The kernel holds what a fresh start would write."""
    live.settle()
    assert kernel.ours() == desired(objects)


# --- when it writes --------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_everything_is_known(kernel: Kernel) -> None:
    """What an earlier run left stays until then, and is adopted, not written again."""
    applied(kernel.backend, cluster())
    before = kernel.everything()
    live = Live(kernel.backend)

    def play() -> None:
        half = [one for one in cluster() if one["kind"] != "NetworkPolicy"]
        live.put(*half)
        live.until(lambda: len(live.agent.node.cluster.pods) == 6)
        time.sleep(0.3)
        assert kernel.everything() == before
        assert live.health.reasons()
        live.begin([one for one in cluster() if one["kind"] == "NetworkPolicy"])
        enforced(kernel, live, cluster())
        assert kernel.everything() == before
        assert live.health.reasons() == []

    live.run(play)
    assert all(live.count("kernel_writes_total", kind=kind) == 0 for kind in ("transaction", "member_added"))
    assert live.count("syncs_total") >= 1


def test_a_burst_is_few_transactions_and_the_newest_state_wins(kernel: Kernel) -> None:
    """10,000 events about 500 pods, half of them of this node, while the writer works."""
    live = Live(kernel.backend)
    labels = ("friend", "web", "db", "stranger")
    rng = random.Random(1)

    def play() -> None:
        live.begin(cluster())
        live.settle()
        before = live.count("kernel_writes_total", kind="transaction")
        newest = {}
        for number in range(10_000):
            which = number % 500
            one = pod(f"p{which}", 1 + which % 2, 10 + which // 2 % 240, app=rng.choice(labels))
            newest[which] = one
            live.put(one)
            assert len(live.inbox) <= 500
        enforced(kernel, live, [*cluster(), *newest.values()])
        transactions = live.count("kernel_writes_total", kind="transaction") - before
        assert 0 < transactions <= 200, f"{transactions} transactions for 10,000 events"

    live.run(play)


def test_an_update_of_a_status_writes_nothing(kernel: Kernel) -> None:
    live = Live(kernel.backend)

    def play() -> None:
        live.begin(cluster())
        live.settle()
        kinds = ("transaction", "member_added", "member_deleted", "set_created")
        before = [live.count("kernel_writes_total", kind=kind) for kind in kinds]
        live.put(*cluster())
        live.settle()
        assert [live.count("kernel_writes_total", kind=kind) for kind in kinds] == before

    live.run(play)


# --- what comes in odd orders ----------------------------------------------------------------------------------------


def test_objects_of_every_odd_order(kernel: Kernel) -> None:
    """A namespace that was not seen, a pod without an address, an address that moves, a pod under the same name."""
    live = Live(kernel.backend)
    base = cluster()
    late = policy("late", {"app": "late"}, ingress=[{"from": [{"namespaceSelector": {"matchLabels": {"team": "z"}}}]}])
    unseen = pod("z/one", 2, 40, app="x")
    bare = pod("bare", 1, 41, app="late")
    bare["status"] = {"phase": "Pending"}

    def play() -> None:
        live.begin([*base, late, unseen, bare])
        enforced(kernel, live, [*base, late, unseen, bare])
        live.put(namespace("z", team="z"))
        known = [*base, late, unseen, namespace("z", team="z")]
        enforced(kernel, live, [*known, bare])
        born = pod("bare", 1, 41, app="late")
        live.put(born)
        enforced(kernel, live, [*known, born])
        assert live.count("pod_isolation_seconds_count") == 1
        # its address moves to another pod of the node, before and after the old one is known to be gone
        heir = pod("heir", 1, 41, app="web")
        live.put(heir)
        enforced(kernel, live, [*known, born, heir])
        live.gone(born)
        enforced(kernel, live, [*known, heir])
        # the same name, another pod: elsewhere, then here again, deleted in between or not
        for number, node in ((42, 2), (43, 1), (41, 1)):
            again = pod("heir", node, number, app="db")
            again["metadata"]["uid"] = f"again-{number}"
            if number == 43:
                live.gone(again)
            live.put(again)
            enforced(kernel, live, [*known, again])
        live.gone(namespace("z"))
        enforced(kernel, live, [*without(known, "Namespace/z"), again])

    live.run(play)


def test_random_events_end_where_a_fresh_start_would(kernel: Kernel, rng: random.Random) -> None:
    """Bursts of random events, of which the writer takes in as many as there are."""
    live = Live(kernel.backend, node=field.NODE)

    def play() -> None:
        world = worlds.random_world(rng, pods=12, nodes=2, policies=8)
        live.begin(world)
        for _ in range(8):
            for _ in range(rng.randrange(1, 12)):
                _, after = worlds.random_event(rng, world)
                live.become(world, after)
                world = after
            live.settle()
            assert kernel.ours() == desired(node_of(world, field.NODE))

    live.run(play)


# --- when the kernel is disturbed, or refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nft"])
def test_what_others_change_is_repaired_at_once(kernel: Kernel) -> None:
    """nf_tables tells: no timer has a part in it. Our own writes, and those to other chains, are no cause to look."""
    live = Live(kernel.backend)

    def play() -> None:
        live.begin(cluster())
        live.settle()
        for number in range(20):
            live.put(pod("late", 1, 50 + number % 2, app="web"))
            live.settle()
        kernel.rules(4, ":OTHER - [0:0]", "-A OTHER -j RETURN")
        live.settle()
        assert live.count("drift_checks_total", cause="notice") == 0
        late = pod("late", 1, 51, app="web")
        for version, words in (
            (4, ("-F", "NPA-INGRESS")),
            (6, ("-D", "FORWARD", "1")),
            (4, ("-I", "FORWARD", "-j", "ACCEPT")),
            (6, ("-A", "NPA-EGRESS", "-j", "RETURN")),
        ):
            found = live.count("drift_repaired_total", cause="notice")
            kernel.iptables(version, *words)
            live.until(lambda found=found: live.count("drift_repaired_total", cause="notice") > found)
            assert kernel.ours() == desired([*cluster(), late])
            assert kernel.save(version).partition("-A FORWARD ")[2].startswith("-j NPA-FORWARD")
        run("nft", "flush", "ruleset")
        live.until(lambda: kernel.ours() == desired([*cluster(), late]))

    live.run(play)


def test_what_others_change_is_repaired_by_the_timer(kernel: Kernel) -> None:
    """Sets, which tell nobody; and on the legacy backend everything."""
    live = Live(kernel.backend, resync=1.0)

    def play() -> None:
        live.begin(cluster())
        live.settle()
        name = sorted(name for name in kernel.sets() if name.startswith("npa4-p-"))[0]
        kernel.ipset("flush", name)
        live.until(lambda: kernel.ours() == desired(cluster()))
        kernel.iptables(4, "-F", "NPA-INGRESS")
        live.until(lambda: kernel.ours() == desired(cluster()))
        live.until(lambda: live.count("drift_repaired_total", cause="timer") >= 1)

    live.run(play)


def test_a_refusal_is_said_and_tried_again(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforcement stays as it was meanwhile, and what came meanwhile is in the kernel afterwards."""
    monkeypatch.setattr(loop, "REFUSALS", (0.05,) * 200)
    live = Live(kernel.backend)
    broken = f"{BASE[4]}_{kernel.backend}_restore".replace("-", "_")

    def play() -> None:
        live.begin(cluster())
        live.settle()
        whole = kernel.ours()
        more = edited(cluster(), "NetworkPolicy/db", ingress=[])
        with tools(tmp_path, **{broken: "echo 'no room for rules' >&2; exit 4"}):
            live.put(*more)
            live.until(lambda: live.count("kernel_failures_total", stage="rules") >= 2)
            reasons = live.health.reasons()
            assert any("no room for rules" in reason for reason in reasons), reasons
            assert {k: v for k, v in kernel.ours().items() if k.startswith("IPv4")} == {
                k: v for k, v in whole.items() if k.startswith("IPv4")
            }
            live.put(pod("meanwhile", 2, 60, app="friend"))
            assert live.health.dead() == ""
        live.until(lambda: live.health.enforcing == "")
        enforced(kernel, live, [*more, pod("meanwhile", 2, 60, app="friend")])

    live.run(play)


def test_a_kernel_that_keeps_refusing_ends_the_agent(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "REFUSALS", (0.01, 0.01))
    applied(kernel.backend, cluster())
    before = kernel.ours()
    broken = f"{BASE[4]}_{kernel.backend}_save".replace("-", "_")
    live = Live(kernel.backend)
    with (
        tools(tmp_path, **{broken: "echo 'out of order' >&2; exit 1"}),
        pytest.raises(KernelError, match="out of order"),
    ):
        live.run(lambda: (live.begin([]), live.until(lambda: live.agent.stopping))[0])  # type: ignore[func-returns-value]
    assert live.count("kernel_failures_total", stage="read") == 3
    assert kernel.ours() == before


@pytest.mark.parametrize("name", ["node-l", "node-2"])
def test_the_name_of_another_node_opens_nothing(kernel: Kernel, name: str) -> None:
    """Mistyped, or of a node that there is: it would take all isolation away. It waits, and says what to do."""
    applied(kernel.backend, cluster())
    before = kernel.everything()
    live = Live(kernel.backend, node=name)

    def play() -> None:
        live.begin(cluster())
        live.until(lambda: "is --node right?" in live.health.enforcing)
        host = pod("host", 1, 99)
        host["spec"] |= {"hostNetwork": True, "nodeName": name}
        live.put(host)
        time.sleep(0.2)
        assert "is --node right?" in live.health.enforcing
        assert kernel.everything() == before
        live.gone(*(one for one in cluster() if one["metadata"]["name"] in ("web", "db")))
        live.until(lambda: live.health.enforcing == "")

    live.run(play)
    assert kernel.everything() != before


def test_told_to_stop_it_ends_at_once_and_leaves_the_rules(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it waits for a kernel that refuses."""
    live = Live(kernel.backend)

    def play() -> None:
        live.begin(cluster())
        live.settle()

    live.run(play)
    assert kernel.ours() == desired(cluster())
    monkeypatch.setattr(loop, "REFUSALS", (60.0,) * 5)
    again = Live(kernel.backend)
    again.dataplane.read = again.dataplane.sync = _refuse  # type: ignore[method-assign]
    ended = threading.Event()

    def stop() -> None:
        again.begin(cluster())
        again.until(lambda: again.count("kernel_failures_total", stage="read") == 1)
        ended.set()

    begin = time.monotonic()
    again.run(stop)
    assert ended.is_set()
    assert time.monotonic() - begin < 30, "it slept for the pause of a refusal"


def _refuse(*_: object) -> None:
    raise KernelError("this kernel", "refuses", "Wait.")


# --- what operators see ----------------------------------------------------------------------------------------------


def test_policies_that_cannot_be_enforced_as_written(kernel: Kernel) -> None:
    """They are counted by reason and announced; mended, they are not."""
    live = Live(kernel.backend)
    faulty = policy("faulty", {"app": "db"}, ingress=[{"ports": [{"port": "80"}, {"port": "a b"}]}])

    def play() -> None:
        live.begin([*cluster(), faulty])
        live.until(lambda: live.count("invalid_policies", reason="port-name-invalid") == 1)
        assert {finding.id for finding in live.announced.findings} == {"port-name-invalid"}
        live.put(policy("faulty", {"app": "db"}, ingress=[{"ports": [{"port": 80}]}]))
        live.until(lambda: live.count("invalid_policies", reason="port-name-invalid") == 0)

    live.run(play)


@pytest.mark.parametrize("backend", ["nft"])
def test_traffic_that_passes_by_the_rules_is_a_reason(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """kube-proxy in IPVS mode, found at the start or later; what can be enforced is."""
    monkeypatch.setattr(loop, "LOOK", 0.1)
    live = Live(kernel.backend)

    def play() -> None:
        live.begin(cluster())
        live.settle()
        assert live.health.reasons() == []
        run("ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "other")
        live.until(lambda: any("IPVS mode" in reason for reason in live.health.reasons()))
        live.put(pod("late", 1, 50, app="web"))
        live.until(lambda: kernel.ours() == desired([*cluster(), pod("late", 1, 50, app="web")]))
        run("ip", "link", "delete", "kube-ipvs0")
        live.until(lambda: live.health.reasons() == [])

    live.run(play)


def test_metrics_and_health_are_served_and_nothing_else(kernel: Kernel) -> None:
    live = Live(kernel.backend)
    paths = {**health_paths(live.health), **metrics_path("/metrics", live.metrics.registry)}
    run("ip", "link", "set", "lo", "up")
    server = Server(Address.parse("127.0.0.1:0"), paths)
    server.start()

    def ask(path: str, method: str = "GET") -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def play() -> None:
        status, why = ask("/readyz")
        assert status == 503
        assert "the first list is not complete" in why
        assert ask("/livez") == (200, "ok\n")
        live.begin(cluster())
        live.settle()
        live.until(lambda: live.count("pods_isolated") == 2)
        assert ask("/readyz") == (200, "ok\n")
        assert ask("/readyz", "HEAD") == (200, "")
        assert [ask(path)[0] for path in ("/", "/metrics/x", "/debug/pprof", "/../etc/passwd")] == [404] * 4
        assert ask("/metrics", "POST")[0] == 501
        status, text = ask("/metrics")
        assert status == 200
        for line in (
            "netpol_agent_pods_watched 6.0",
            "netpol_agent_pods_local 3.0",
            "netpol_agent_policies 3.0",
            "netpol_agent_policies_enforced 2.0",
        ):
            assert line in text
        sizes = {v: sum(map(len, kernel.tables(v).chains.values())) for v in FAMILIES}
        assert live.count("sets") == len([name for name in kernel.sets() if name.startswith("npa")])
        assert live.count("rules") == sum(sizes.values())

    live.run(play)
    server.shutdown()
    server.server_close()
