"""`apply`, `status` and `clean` as processes, in the network of an enclosure."""

from __future__ import annotations

import shutil

import pytest

from agent.cli.output import Applied, Status
from tests.cli.shell import KUBECTL, REPOSITORY_OF_MANIFESTS, Command, agent, inside, run, system, without_rights
from tests.lab.world import BACKENDS, needs_root

APPLY = agent("apply", "-f", KUBECTL, "--node", "node1")
VERBS = (
    "apply",
    "render",
    "status",
    "clean",
    "lab",
    *(f"lab {verb}" for verb in ("matrix", "probe", "up", "apply", "shell", "down", "list", "play")),
)


def saved(backend: str) -> list[Command]:
    """All that the kernel holds."""
    tools = [system(f"{tool}-{backend}-save", "-t", "filter") for tool in ("iptables", "ip6tables")]
    return [*tools, system("ipset", "save")]


def rules(done: str) -> list[str]:
    """A saved table without comments and counters."""
    return [line for line in done.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("verb", ("", *VERBS))
def test_help_has_examples_and_exit_codes(verb: str) -> None:
    done = run(*verb.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert "Examples:" in done.out or verb == "lab list"


@pytest.mark.parametrize(
    "arguments",
    (
        ("apply", "-f", KUBECTL),
        ("apply", "--node", "node1"),
        ("apply", "-f", KUBECTL, "--node", "node1", "--backend", "iptables"),
        ("render", "-f", KUBECTL),
        ("status", "--node", "node1"),
        ("status", "-f", KUBECTL),
        ("clean", "now"),
        ("enforce",),
        ("lab", "matrix", "-f", KUBECTL, "--nodes", "0"),
        ("lab", "down", "--name", "a/b"),
        ("lab", "up", "-f", KUBECTL, "--name", ""),
    ),
)
def test_bad_usage_is_2(arguments: tuple[object, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.err.startswith("Usage: ")
    assert "Error: " in done.err
    assert "Traceback" not in done.err


class TestKernel:
    pytestmark = needs_root

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_there_and_back(self, backend: str) -> None:
        how = ("--backend", backend)
        apply = Command((*APPLY.argv, *how))
        before = [system(f"iptables-{backend}", "-A", "FORWARD", "-j", "ACCEPT"), *saved(backend)]
        _, *empty, nothing, first, again, status, compared, cleaned, twice, _, v4, v6, sets = inside(
            *before,
            agent("status", *how),
            apply,
            apply,
            agent("status", *how),
            agent("status", "-f", KUBECTL, "--node", "node1", *how),
            agent("clean", *how),
            agent("clean", *how),
            system("true"),
            *saved(backend),
        )
        assert nothing.code == 1
        assert "nothing is programmed here" in nothing.out
        assert (first.code, first.err) == (0, "")
        assert first.out.startswith(f"node1 ({backend}): 1 policy in force, 1 of 1 pod isolated")
        assert "\nchanged: 6 sets added, 6 set members added" in first.out
        assert (again.code, again.out.splitlines()[-1]) == (0, "unchanged: 0 kernel writes")
        for done in (status, compared):
            assert done.code == 0, done
            assert "policies default/web" in done.out
            assert done.out.endswith("as programmed\n")
        assert cleaned.code == 0
        assert cleaned.out.startswith("clean: 6 sets removed")
        assert (twice.code, twice.out) == (0, "clean: nothing of ours is here\n")
        assert [rules(one.out) for one in (v4, v6, sets)] == [rules(one.out) for one in empty]

    def test_json(self) -> None:
        as_json = ("-o", "json")
        first, again, status, cleaned, empty = inside(
            agent("apply", "-f", "-", "--node", "node1", *as_json, text=KUBECTL.read_text()),
            Command((*APPLY.argv, *as_json)),
            agent("status", *as_json),
            agent("clean", *as_json),
            agent("status", *as_json),
        )
        result = first.decoded(Applied)
        assert (result.node, result.changed, result.findings, result.problems) == ("node1", True, (), ())
        assert result.counts is not None
        assert result.counts.isolated_pods == 1
        assert result.writes.total > 0
        unchanged = again.decoded(Applied)
        assert (unchanged.changed, unchanged.writes.total) == (False, 0)
        programmed = status.decoded(Status)
        assert programmed.programmed
        assert programmed.drift == ()
        assert {(c.family, c.direction.lower()) for c in programmed.classes} == {
            (version, direction) for version in (4, 6) for direction in ("ingress", "egress")
        }
        assert all(c.policies == ("default/web",) and c.pods == ("default/web-0",) for c in programmed.classes)
        assert len(programmed.sets) == 6
        assert cleaned.decoded(Applied).writes.sets_destroyed == 6
        assert not empty.decoded(Status).programmed

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bad_input_writes_nothing(self, backend: str) -> None:
        bad = KUBECTL.read_text().replace("port: 5984\n", "port: 59.84\n")
        _, *before, refused, v4, v6, sets = inside(
            Command((*APPLY.argv, "--backend", backend)),
            *saved(backend),
            agent("apply", "-f", "-", "--node", "node1", "--backend", backend, text=bad),
            *saved(backend),
        )
        assert (refused.code, refused.out) == (2, "")
        assert "NetworkPolicy default/web: spec.egress[0].ports[0].port" in refused.err
        assert refused.err.startswith("error: stdin:")
        assert [rules(one.out) for one in (v4, v6, sets)] == [rules(one.out) for one in before]

    def test_drift_is_1(self) -> None:
        _, _, drifted, compared, repaired, status = inside(
            APPLY,
            system("iptables-nft", "-F", "NPA-INGRESS"),
            agent("status"),
            agent("status", "-f", KUBECTL, "--node", "node1", "-o", "json"),
            APPLY,
            agent("status"),
        )
        assert drifted.code == 1
        assert "drift: IPv4: " in drifted.out
        assert compared.code == 1
        assert any("NPA-INGRESS" in line for line in compared.decoded(Status).drift)
        assert "changed: " in repaired.out
        assert status.code == 0

    def test_the_other_backend_is_left(self) -> None:
        _, moved, status, v4 = inside(
            Command((*APPLY.argv, "--backend", "nft")),
            Command((*APPLY.argv, "--backend", "legacy")),
            agent("status"),
            system("iptables-nft-save"),
        )
        assert moved.code == 0
        assert status.out.startswith("backend legacy: ")
        assert "NPA-" not in v4.out

    def test_workloads_are_passed_over_without_noise(self) -> None:
        """Their pods would come from a cluster."""
        alone, both = inside(
            agent("apply", "-f", REPOSITORY_OF_MANIFESTS, "--node", "node1"),
            agent("apply", "-f", KUBECTL, "-f", REPOSITORY_OF_MANIFESTS, "--node", "node1"),
        )
        assert (both.code, both.err) == (0, "")
        assert "1 of 1 pod isolated" in both.out
        assert alone.code == 0
        assert "Deployment" not in alone.err

    @pytest.mark.parametrize("input, node", ((KUBECTL, "typo"), (REPOSITORY_OF_MANIFESTS, "node1")))
    def test_what_is_enforced_is_not_opened_by_mistake(self, input: object, node: str) -> None:
        """A node's name mistyped, or input without pods, is refused where pods are isolated."""
        _, refused, status = inside(APPLY, agent("apply", "-f", input, "--node", node), agent("status"))
        assert refused.code == 2
        assert f"no pod of the input is on node {node}" in refused.err
        assert status.code == 0

    def test_a_node_that_no_pod_names(self) -> None:
        (done,) = inside(agent("apply", "-f", KUBECTL, "--node", "nowhere", "-o", "json"))
        assert done.code == 0
        assert "warning: Node nowhere: no pod of the input is on it; the nodes with pods are node1, node2" in done.err
        assert [finding.id for finding in done.decoded(Applied).findings] == ["node-without-pods"]

    @pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
    def test_without_permission_is_3(self) -> None:
        powerless = [without_rights(command, "net_admin") for command in (APPLY, agent("status"), agent("clean"))]
        _, *refused, status = inside(APPLY, *powerless, agent("status"))
        for done in refused:
            assert done.code == 3, done
            assert done.err.startswith("error: ")
            assert "Run as root, or give the container the capability NET_ADMIN." in done.err
            assert "Traceback" not in done.err
        assert status.code == 0, "what was enforced stays"

    def test_without_the_programs_is_3(self) -> None:
        (done,) = inside(agent("apply", "-f", KUBECTL, "--node", "node1", PATH="/nonexistent"))
        assert done.code == 3
        assert "is not installed. Install the package" in done.err
