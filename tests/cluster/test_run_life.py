"""The life of `netpol-agent run` on a real cluster: restarts, relabelled and replaced pods, drift, missing permissions,
policies that cannot be enforced as written, and its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.home import FRIEND, GUEST, LIFE, SERVER, STEP, STRANGER, Home
from tests.cluster.kube import NODES, kubectl, left_on, needs_cluster, on_node
from tests.cluster.live import Agents, Running, until
from tests.cluster.places import Places
from tests.cluster.stage import Serving, staged
from tests.upstream import Object, policy

pytestmark = needs_cluster

SOON = 2.0
"""Seconds in which a verdict moves: one, and what a busy machine adds."""
TIMER = 6.0
"""Seconds in which the timer of --resync 2 must have come, read and repaired."""


@pytest.fixture(scope="module")
def pods(places: Places) -> Iterator[Home]:
    stage = Home("life-", [LIFE], places, Serving(((80, 80),)))
    with staged(stage):
        stage.enact(STEP)
        yield stage


@pytest.fixture
def home(pods: Home) -> Iterator[Home]:
    """Labels and policies as written, before each test and after it."""
    pods.enact(STEP)
    yield pods
    pods.enact(STEP)


@pytest.fixture
def agents(fresh: Callable[..., Agents]) -> Agents:
    """Both at work, for one test."""
    return fresh()


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_restarts_under_load(home: Home, agents: Agents, end: str) -> None:
    """Both agents end, are away for a while, and come again: no allowed connection fails, no denied one passes."""
    home.is_as_written()
    with home.load(FRIEND) as friend, home.load(STRANGER) as stranger, home.load(GUEST) as guest:
        for _ in range(2):
            for one in agents.values():
                getattr(one, end)()
                time.sleep(0.5)
                one.start()
            for one in agents.values():
                one.wait_ready()
                until(lambda one=one: "enforcing:" in one.said(), 5, "the log says what is enforced")
                assert "0 kernel writes" in one.said()
            time.sleep(0.5)
    print(f"friend: {friend}; stranger: {stranger}; guest: {guest}")
    assert friend.made > 100
    assert not friend.silent
    assert not friend.refused
    for denied in (stranger, guest):
        assert denied.silent > 100
        assert not denied.made
        assert not denied.refused
    home.is_as_written()


# --- pods and labels -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("agents")
@pytest.mark.parametrize(
    "source, what", [(STRANGER, ("pod", "stranger", "-n", "life-home")), (GUEST, ("namespace", "life-away"))]
)
def test_relabelling_moves_verdicts(home: Home, source: str, what: tuple[str, ...]) -> None:
    home.is_as_written()
    for _ in range(3):
        kubectl("label", "--overwrite", *what, "friend=yes")
        opened = until(lambda: home.reaches(source, patience=0.1) == {True}, SOON, "a friend is let in")
        kubectl("label", *what, "friend-")
        closed = until(lambda: home.reaches(source, patience=0.1) == {False}, SOON, "a stranger is not")
        print(f"{what}: opened after {opened:.2f} s, closed after {closed:.2f} s")
    home.is_as_written()


def test_replaced_pods(home: Home, agents: Agents) -> None:
    """Pods that go and come again under the same names: isolated, and known as peers, as soon as they are ready."""
    home.is_as_written()
    before = {node: one.metric("pod_isolation_seconds_count") for node, one in agents.items()}
    home.replace(SERVER, FRIEND)
    assert home.reaches(STRANGER) == {False}
    home.is_as_written()
    after = {node: one.metric("pod_isolation_seconds_count") for node, one in agents.items()}
    assert sum(after.values()) == sum(before.values()) + 1, "one isolated pod is new"
    took = sum(one.metric("pod_isolation_seconds_sum") for one in agents.values())
    print(f"{sum(after.values()):.0f} pods were isolated in {took:.3f} s together")


# --- drift -----------------------------------------------------------------------------------------------------------


def test_drift_is_repaired(home: Home, fresh: Callable[..., Agents]) -> None:
    """Rules at once where nftables tells of it, and members of sets by the timer."""
    agents = fresh("--resync", "2")
    home.is_as_written()
    one = agents[NODES[0]]
    told = "nf_tables" in on_node(one.node, "iptables", "-V").stdout
    jump = next(line for line in left_on(one.node) if line.startswith("-A FORWARD "))
    unjump = ("sh", "-c", f"iptables -D {jump.removeprefix('-A ')}")
    for command in (("iptables", "-F", "NPA-INGRESS"), ("ip6tables", "-F", "NPA-EGRESS"), unjump):
        _repaired(one, "notice" if told else "timer", SOON if told else TIMER, *command)
        home.is_as_written()
    for name in _filled_sets(one.node):
        _repaired(one, "timer", TIMER, "ipset", "flush", name)
        stranger = home.addresses[STRANGER]["6" in name[:4]]
        _repaired(one, "timer", TIMER, "ipset", "add", name, stranger)
    home.is_as_written()


def _repaired(one: Running, cause: str, seconds: float, *command: str) -> None:
    before, count = left_on(one.node), one.metric("drift_repaired_total", cause=cause)
    done = on_node(one.node, *command)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    took = until(lambda: _programmed(left_on(one.node)) == _programmed(before), seconds, f"{command} is repaired")
    until(lambda: one.metric("drift_repaired_total", cause=cause) > count, 2, f"a repair by {cause} is counted")
    assert "drift: somebody changed what we had programmed" in one.said()
    print(f"{command}: repaired after {took:.2f} s")


def _programmed(lines: list[str]) -> list[str]:
    """Without counters, which are no part of it."""
    return sorted(line.partition(" [")[0] for line in lines)


def _filled_sets(node: str) -> list[str]:
    saved = on_node(node, "ipset", "save").stdout.splitlines()
    return sorted({line.split()[1] for line in saved if line.startswith(("add npa4-", "add npa6-"))})


# --- permissions -----------------------------------------------------------------------------------------------------


def test_goes_on_when_permissions_come(home: Home, fresh: Callable[..., Agents], tmp_path: Path) -> None:
    """Without permission to list: not ready, says what to grant, writes nothing; when it is granted, it goes on."""
    with ExitStack() as stack:
        stack.callback(kubectl, "delete", "--ignore-not-found", "clusterrole,clusterrolebinding", "life-agent")
        stack.callback(kubectl, "-n", "life-home", "delete", "--ignore-not-found", "serviceaccount", "agent")
        kubectl("-n", "life-home", "create", "serviceaccount", "agent")
        file = tmp_path / "kubeconfig"
        file.write_text(_configuration(kubectl("-n", "life-home", "create", "token", "agent").strip()))
        agents = fresh("--kubeconfig", str(file), ready=False)
        for one in agents.values():
            until(lambda one=one: one.reasons().count("grant get, list and watch") == 3, 10, "it says what to grant")
            assert "namespaces at cluster scope" in one.reasons()
            assert "networkpolicies.networking.k8s.io at cluster scope" in one.reasons()
        time.sleep(2)
        for one in agents.values():
            assert one.metric("ready") == 0
            assert one.metric("in_sync") == 0
            assert not one.metric("kernel_writes_total")
            assert not left_on(one.node)
        assert home.reaches(STRANGER) == {True}, "nothing is enforced yet"
        kinds = "pods,namespaces,networkpolicies.networking.k8s.io"
        kubectl("create", "clusterrole", "life-agent", "--verb=get,list,watch", f"--resource={kinds}")
        account = "--serviceaccount=life-home:agent"
        kubectl("create", "clusterrolebinding", "life-agent", "--clusterrole=life-agent", account)
        for one in agents.values():
            print(f"{one.node} was ready {one.wait_ready():.1f} s after the permissions came")
        home.is_as_written()


def _configuration(token: str) -> str:
    """The kubeconfig in use, with a token in the place of its user."""
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    for user in config["users"]:
        user["user"] = {"token": token}
    return json.dumps(config)


# --- what operators see ----------------------------------------------------------------------------------------------

OVERLAPPING: Object = policy(
    "home/except-of-another-spelling",
    {
        "podSelector": {"matchLabels": {"app": "server"}},
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["::ffff:10.0.0.0/104"]}}]}],
    },
)
"""As large as its cidr, which the API server overlooks since it is written as IPv6."""


def test_one_event_on_a_policy_with_a_fault(home: Home, agents: Agents) -> None:
    """Both nodes find it, and one Event tells of it, after a restart too."""
    faulty = json.loads(json.dumps(OVERLAPPING).replace('"namespace": "home"', '"namespace": "life-home"'))
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=json.dumps(faulty), capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this API server refuses the policy: {done.stderr}")
    try:
        until(lambda: _posted(agents) == len(NODES), 15, "both nodes have posted")
        assert sum(one.metric("events_posted_total", result="created") for one in agents.values()) == 1
        for one in agents.values():
            until(lambda one=one: one.metric("invalid_policies", reason="except-not-inside") == 1, 5, "it is counted")
            assert "[except-not-inside]" in one.said() or "must lie inside" in one.said()
            one.terminate()
            one.start()
        for one in agents.values():
            one.wait_ready()
        until(lambda: _posted(agents) == len(NODES), 15, "both nodes have tried again")
        events = _events()
        assert len(events) == 1, events
        assert events[0]["type"] == "Warning"
        assert events[0]["count"] == 1
        assert "spec.ingress[0].from[0].ipBlock.except[0]" in events[0]["message"]
        home.is_as_written()
    finally:
        kubectl("-n", "life-home", "delete", "netpol", faulty["metadata"]["name"])


def _posted(agents: Agents) -> float:
    return sum(one.metric("events_posted_total") for one in agents.values())


def _events() -> list[Object]:
    shown = kubectl("-n", "life-home", "get", "events", "--field-selector=reason=NotEnforcedAsWritten", "-o", "json")
    return json.loads(shown)["items"]


def test_metrics_are_well_formed(home: Home, agents: Agents) -> None:
    home.is_as_written()
    beside = str(Path(sys.executable).parent)
    promtool = shutil.which("promtool") or shutil.which("promtool", path=beside) or pytest.skip("needs promtool")
    for one in agents.values():
        done = subprocess.run([promtool, "check", "metrics"], input=one.metrics(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- the end ---------------------------------------------------------------------------------------------------------


def test_what_is_enforced_outlives_the_agent(home: Home, fresh: Callable[..., Agents]) -> None:
    agents = fresh()
    home.is_as_written()
    for one in agents.values():
        one.terminate()
        assert left_on(one.node)
    assert home.reaches(STRANGER) == {False}
    assert home.reaches(FRIEND) == {True}


def test_cleanup_on_exit(home: Home, fresh: Callable[..., Agents]) -> None:
    agents = fresh("--cleanup-on-exit")
    home.is_as_written()
    for one in agents.values():
        one.terminate()
        assert not left_on(one.node)
    assert home.reaches(STRANGER) == {True}
