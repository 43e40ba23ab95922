"""What `helm install` gives: agents that are ready, may do what they need and nothing else, and answer questions."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.chart.helm import CHART
from tests.cluster.kube import NODES, kubectl, left_on, needs_cluster
from tests.cluster.live import until
from tests.e2e.release import NAME, SPACE, Release, helm

pytestmark = needs_cluster
ACCOUNT = f"system:serviceaccount:{SPACE}:{NAME}"
WATCHED = ("namespaces", "pods", "networkpolicies.networking.k8s.io")


def test_every_node_has_an_agent_that_enforces(release: Release) -> None:
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    assert set(release.pods()) == {node["metadata"]["name"] for node in nodes}
    for node in NODES:
        assert release.metric(node, "ready") == 1
        assert "the kernel" not in (status := release.run(node, "netpol-agent", "status")), status
        assert any("enforcing:" in line["message"] for line in release.lines(node))


def test_nobody_may_do_more_than_is_needed(release: Release) -> None:
    """What the API server grants to the service account."""
    assert release.is_there()
    may = _granted()
    for kind in WATCHED:
        for verb in ("get", "list", "watch"):
            assert (verb, kind) in may
    assert {verb for verb, kind in may if kind == "events"} == {"create", "patch"}
    assert {kind for _, kind in may} == {*WATCHED, "events"}


def _granted() -> set[tuple[str, str]]:
    """(verb, resource) that the account has, beside what every account has of itself."""
    shown = kubectl("auth", "can-i", "--list", "--as", ACCOUNT, "--as-group=system:serviceaccounts", "-n", "default")
    granted = set()
    for line in shown.splitlines()[1:]:
        resource, _, rest = line.partition(" ")
        verbs = rest[rest.rindex("[") + 1 : rest.rindex("]")].split()
        if resource and not resource.startswith("self"):
            granted |= {(verb, resource) for verb in verbs}
    return granted


def test_containers_have_two_rights_of_root(release: Release) -> None:
    for pod in release.pods().values():
        spec = json.loads(kubectl("-n", SPACE, "get", "pod", pod, "-o", "json"))["spec"]
        (container,) = spec["containers"]
        assert spec["hostNetwork"]
        assert spec["priorityClassName"] == "system-node-critical"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
    status = release.run(NODES[0], "/usr/bin/python3", "-c", "print(open('/proc/1/status').read())")
    rights = {line.split()[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    assert rights["CapEff:"] == rights["CapBnd:"] == 1 << 12 | 1 << 13
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    shell = subprocess.run(
        ["kubectl", "-n", SPACE, "exec", release.pods()[NODES[0]], "--", "/bin/sh", "-c", "true"],
        capture_output=True,
        check=False,
    )
    assert shell.returncode != 0, "there is no shell"


def test_helm_test(release: Release) -> None:
    """It passes where policies are enforced, and fails where they are not."""
    done = helm("test", NAME, "--timeout", "120s")
    assert done.code == 0, f"{done.said}\n{release.troubles()}"
    print(done.said)
    release.install("nodeSelector.nobody=has-this")
    try:
        assert not release.pods()
        done = helm("test", NAME, "--timeout", "120s")
        assert done.code != 0, done.said
    finally:
        release.install()
    assert helm("test", NAME, "--timeout", "120s").code == 0


@pytest.mark.parametrize("value", ["agent.backend=iptables", "agents.backend=nft", "metrics.port=none"])
def test_a_wrong_value_is_refused(release: Release, value: str) -> None:
    done = helm("upgrade", NAME, str(CHART), "--reuse-values", "--set", value)
    assert done.code != 0
    assert "values don't meet the specifications of the schema" in done.said
    assert value.partition(".")[0] in done.said
    assert release.is_there()


def test_a_second_release_is_not_ready(release: Release) -> None:
    """It waits beside the first, and nobody says of it that it works."""
    told = [word for value in release.values for word in ("--set", value)]
    try:
        done = helm("install", "another", str(CHART), "--wait", "--timeout", "20s", *told)
        assert done.code != 0
        assert release.ready() == set(release.pods().values())
    finally:
        helm("uninstall", "another", "--no-hooks", "--wait")
    assert all(left_on(node) for node in NODES)


def test_what_is_left_after_uninstall(release: Release) -> None:
    """Nothing: no rule and no set on any node, no object in the cluster. And it can be installed again."""
    assert any(left_on(node) for node in NODES)
    try:
        release.uninstall()
        assert {node: left_on(node) for node in NODES} == {node: [] for node in NODES}
        until(lambda: release.left_in_cluster() == [], 30, "the pods that cleaned have ended, too")
    finally:
        release.install()
    for node in NODES:
        assert release.metric(node, "ready") == 1
