"""`lab` as a process: a lab for one question, one that stays, a scenario; and that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from agent.cli.output import MatrixResult
from agent.lab import held
from tests.cli.shell import AGENT, KUBECTL, REPOSITORY_OF_MANIFESTS, SCENARIOS, Done, agent, run
from tests.lab.world import (
    BACKENDS,
    MODES,
    as_nobody,
    environment,
    marked,
    needs_root,
    nothing_left,
    wait_until,
)

pytestmark = needs_root

CLIENT_AND_SERVER = SCENARIOS / "c-client-and-server"
THREE_TIERS = SCENARIOS / "a-three-tiers"

# Of what kubectl.yaml holds: who may reach the database and the web server's ports, by their policies.
EXPECTED = {
    ("default/web-0", "default/db-0", 5984): True,
    ("kube-system/coredns-5ccf6d56df-nl8vs", "default/db-0", 5984): True,
    ("default/exporter", "default/db-0", 5984): False,
    ("outside", "default/db-0", 5984): False,
    ("outside", "default/web-0", 80): True,
    ("outside", "default/web-0", 8443): True,
    ("outside", "default/web-0", 9000): False,
    ("default/web-0", "kube-system/coredns-5ccf6d56df-nl8vs", 53): True,
    ("default/web-0", "outside", 80): False,
    # The host network of its own node.
    ("default/exporter", "default/web-0", 9000): True,
    ("default/web-0", "default/exporter", 9100): True,
}


@pytest.fixture
def mark() -> Iterator[str]:
    """A name that all processes of a test carry, and that a held lab can have; nothing of them may be left."""
    with nothing_left() as name:
        yield name


# --- for one question ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_matrix_of_what_kubectl_prints(mode: str, backend: str) -> None:
    how = ("--mode", mode, "--backend", backend, "-o", "json")
    done = run("lab", "matrix", "-f", "-", *how, text=KUBECTL.read_text())
    assert (done.code, done.err) == (0, "")
    result = done.decoded(MatrixResult)
    assert result.mismatches == 0
    found = {(a.source, a.destination, a.port, a.family): a.reached for a in result.answers}
    for (source, destination, port), reached in EXPECTED.items():
        for version in (4, 6):
            assert found[source, destination, port, version] is reached, (source, destination, port, version)
    addresses = {a.destination: a.address for a in result.answers if a.family == 4}
    assert addresses["default/web-0"] == "10.244.1.5", "real pods keep their addresses"
    assert addresses["default/exporter"] == "172.18.0.2", "and hostNetwork pods their node's"


def test_matrix_as_text() -> None:
    done = run("lab", "matrix", "-f", KUBECTL, "--nodes", "3")
    assert (done.code, done.err) == (0, "")
    assert "kernel writes: node1 " in done.out
    assert "✓ reaches  · does not" in done.out
    assert done.out.endswith("90 probes, 0 mismatches\n")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("  default/web-0 ")]
    assert rows == [["default/web-0", "✓", "✓", "·", "✓", "✓", "·"]]


def test_matrix_without_policies_and_of_some_ends() -> None:
    ends = ("outside", "db-0", "default/web-0")
    done = run(
        "lab", "matrix", "-f", KUBECTL, "--no-policies", "--port", "9/udp", "--port", "icmp", "-o", "json", *ends
    )
    answers = done.decoded(MatrixResult).answers
    ends = ("outside", "default/db-0", "default/web-0")
    assert {(a.source, a.destination) for a in answers} == set(permutations(ends, 2))
    assert {(a.protocol, a.port) for a in answers} == {("UDP", 9), ("ICMP", 0)}
    assert all(a.reached for a in answers)


def test_matrix_of_one_end_and_of_ends_of_each_kind() -> None:
    def pairs(*ends: str) -> set[tuple[str, str]]:
        done = run("lab", "matrix", "-f", REPOSITORY_OF_MANIFESTS, "-o", "json", *ends)
        return {(a.source, a.destination) for a in done.decoded(MatrixResult).answers}

    one = pairs("db-0")
    assert all("shop/db-0" in pair for pair in one)
    assert len(one) == 14
    db, node, web = "shop/db-0", "node:node1", "svc/shop/web"
    assert pairs("db-0", "node/node1", "svc/web", "outside") == {
        *permutations((db, node, "outside"), 2),
        (db, web),
        (node, web),
    }


def test_workloads_without_their_pods_get_them() -> None:
    done = run("lab", "matrix", "-f", REPOSITORY_OF_MANIFESTS, "--services", "-o", "json")
    assert (done.code, done.err) == (0, "")
    answers = done.decoded(MatrixResult).answers
    assert {a.source for a in answers} == {
        "outside",
        *(f"shop/{name}" for name in ("web-0", "web-1", "db-0", "agent-0", "agent-1", "migrate-0", "backup-0")),
    }
    to_db = {a.source: a.reached for a in answers if a.destination == "shop/db-0"}
    # The pods of the DaemonSet have their nodes' addresses; one of them is the database's own node.
    assert [src for src, reached in to_db.items() if reached] == ["shop/web-0", "shop/web-1", "shop/agent-0"]
    services = {
        a.destination: a.reached for a in answers if a.source == "shop/migrate-0" and a.destination[:4] == "svc/"
    }
    assert services == {"svc/shop/web": True, "svc/shop/none": False}


def probe(*arguments: object, code: int = 0) -> Done:
    done = run("lab", "probe", "-f", REPOSITORY_OF_MANIFESTS, *arguments)
    assert done.code == code, done
    assert "Traceback" not in done.err
    return done


class TestProbe:
    def test_pairs(self) -> None:
        out = probe("shop/web-0", "db-0").out
        assert out.splitlines() == [
            "shop/web-0 reaches shop/db-0 10.244.1.3 5432/TCP: allowed by shop/db ingress[0]",
            "shop/web-0 reaches shop/db-0 fd44:1::3 5432/TCP: allowed by shop/db ingress[0]",
        ]
        out = probe("outside", "db-0", "5432", "--families", "4", code=1).out
        assert out == (
            "outside does not reach shop/db-0 10.244.1.3 5432/TCP: ingress: shop/db allows no such connection\n"
        )

    def test_services_node_ports_and_addresses(self) -> None:
        assert "(answered by shop/web-" in probe("db-0", "svc/shop/web", "80").out
        assert "(answered by shop/web-" in probe("outside", "node/node2", "30080").out
        assert "the Service has no endpoint" in probe("db-0", "svc/none", code=1).out
        reached = probe("node/node1", "198.51.100.7", "icmp", "--outside", "198.51.100.7").out
        assert reached == "node:node1 reaches outside 198.51.100.7 ping: no policy isolates\n"

    def test_json(self) -> None:
        (answer,) = probe("db-0", "web-0", "80", "--families", "6", "-o", "json").decoded(MatrixResult).answers
        assert (answer.reached, answer.expected, answer.mismatch, answer.who) == (True, True, False, "shop/web-0")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        (
            (("nobody", "web-0"), "'nobody' is not in the lab; there are outside, "),
            (("web-0", "svc/nothing"), "'svc/nothing' is no Service of the input"),
            (("web-0", "svc/db"), "'svc/db' is headless"),
            (("web-0", "198.51.100.9"), "nobody in the lab has 198.51.100.9; the host outside gets it by: --outside"),
            (("198.51.100.9", "web-0"), "198.51.100.9"),
            (("svc/web", "web-0"), "cannot send"),
            (("web-0", "db-0", "http"), "'http' is no port: write 80, 53/udp"),
            (("web-0", "db-0", "70000"), "'70000' is no port"),
        ),
    )
    def test_what_cannot_be_asked_is_2(self, arguments: tuple[str, ...], said: str) -> None:
        assert said in probe(*arguments, code=2).err


def test_input_without_pods_or_with_one_address_twice_is_2(tmp_path: Path) -> None:
    file = tmp_path / "in.yaml"
    file.write_text("{apiVersion: v1, kind: Namespace, metadata: {name: x}}")
    done = run("lab", "matrix", "-f", file)
    assert (done.code, done.out) == (2, "")
    assert "the input holds no pods, and no workload that would create any" in done.err
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}} for name in "ab"]
    made = [{**pod, "spec": {"nodeName": "n1"}, "status": {"podIP": "10.0.0.9"}} for pod in pods]
    file.write_text("\n---\n".join(map(json.dumps, made)))
    for verb in ("matrix", "up"):
        done = run("lab", verb, "-f", file)
        assert done.code == 2
        assert "default/a and default/b have the same address 10.0.0.9" in done.err


def test_addresses_that_a_bridge_cannot_have_are_2(tmp_path: Path) -> None:
    file = tmp_path / "in.yaml"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"nodeName": "n1"}}
    file.write_text(json.dumps({**pod, "status": {"podIP": "10.0.1.255"}}))
    done = run("lab", "matrix", "-f", file, "--mode", "bridged")
    assert done.code == 2
    assert "10.0.1.255 cannot be a pod's on a bridge" in done.err
    assert run("lab", "matrix", "-f", file).code == 0


def test_a_cluster_in_the_labs_own_ranges(tmp_path: Path) -> None:
    """Calico's pods are in 192.168.0.0/16; what the lab gives to nodes and Services keeps clear of what is there."""
    pods = [
        {"metadata": {"name": f"p{n}", "labels": {"app": "x"}}, "status": {"podIP": f"192.168.0.{n}"}} for n in (1, 2)
    ]
    made = [{"apiVersion": "v1", "kind": "Pod", "spec": {"nodeName": "n1"}, **pod} for pod in pods]
    services = [
        {"metadata": {"name": name}, "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}], **more}}
        for name, more in (("a", {}), ("b", {"clusterIP": "10.96.0.10", "type": "NodePort"}))
    ]
    made += [{"apiVersion": "v1", "kind": "Service", **service} for service in services]
    file = tmp_path / "in.yaml"
    file.write_text("\n---\n".join(map(json.dumps, made)))
    done = run("lab", "matrix", "-f", file, "--services", "--mode", "bridged", "-o", "json")
    assert done.code == 0, done
    assert {a.destination for a in done.decoded(MatrixResult).answers} >= {"svc/default/a", "svc/default/b"}
    assert "reaches node:n1 172.31.255.1 30000/TCP (answered by default/p" in (
        run("lab", "probe", "-f", file, "outside", "node/n1", "30000", "--families", "4").out
    )


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = [*AGENT, "lab", "play", str(CLIENT_AND_SERVER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


# --- one that stays --------------------------------------------------------------------------------------------------


def in_held(mark: str, *arguments: object, text: str = "") -> Done:
    """A verb of `lab` on the held lab of this name."""
    verb, *rest = map(str, arguments)
    return agent("lab", verb, "--name", mark, *rest, text=text, NETPOL_AGENT_LAB_TEST=mark).run()


@pytest.fixture
def lab(mark: str) -> Iterator[str]:
    """A held lab of the client and the server, without policies."""
    done = in_held(mark, "up", "-f", CLIENT_AND_SERVER / "0-pods.yaml")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"lab {mark!r} is up: 2 nodes, 2 pods\n  demo/client  10.244.1.2 fd44:1::2  on node1\n")
    yield mark
    in_held(mark, "down")


class TestHeld:
    def test_the_life_of_a_lab(self, lab: str) -> None:
        before, labelled = CLIENT_AND_SERVER / "1-policy.yaml", CLIENT_AND_SERVER / "2-label.yaml"
        pods = CLIENT_AND_SERVER / "0-pods.yaml"
        assert lab in run("lab", "list").out.split()
        again = in_held(lab, "up", "-f", pods)
        assert again.code == 2
        assert f"take it down with: netpol-agent lab down --name {lab}" in again.err
        assert in_held(lab, "probe", "client", "server").code == 0

        applied = in_held(lab, "apply", "-f", pods, "-f", before)
        assert applied.code == 0
        assert "enforced in " in applied.out
        denied = in_held(lab, "probe", "client", "server", "80")
        assert denied.code == 1
        assert "ingress: demo/demo-policy allows no such connection" in denied.out
        assert in_held(lab, "apply", "-f", pods, "-f", before, "-f", labelled).code == 0
        assert in_held(lab, "probe", "client", "server", "80").code == 0
        same = in_held(lab, "apply", "-f", "-", text=Path(pods).read_text())
        assert same.code == 0
        assert in_held(lab, "matrix", "-o", "json").decoded(MatrixResult).mismatches == 0

        other = in_held(lab, "apply", "-f", KUBECTL)
        assert other.code == 2
        assert "other pods than the lab's" in other.err
        assert in_held(lab, "matrix").code == 0, "and nothing has changed"

        down = in_held(lab, "down")
        assert (down.code, down.out) == (0, f"lab {lab!r} is down\n")
        twice = in_held(lab, "down")
        assert (twice.code, twice.out) == (0, f"no lab {lab!r} is up\n")
        assert lab not in run("lab", "list").out.split()
        for verb in (("matrix",), ("probe", "a", "b"), ("apply", "-f", pods), ("shell", "a")):
            gone = in_held(lab, *verb)
            assert gone.code == 3, gone
            assert f"netpol-agent lab up -f FILE --name {lab}" in gone.err

    def test_shell(self, lab: str) -> None:
        def shell(end: str, *command: str, text: str = "") -> Done:
            return in_held(lab, "shell", end, "--", *command, text=text)

        assert "10.244.1.2/32" in shell("client", "ip", "-4", "addr").out
        assert shell("demo/client", "sh", "-c", "cat; exit 7", text="typed") == Done(7, "typed", "")
        assert "NPA-FORWARD" in shell("node/node1", "iptables-nft", "-S", "FORWARD").out
        assert "203.0.113.5" in shell("outside", "ip", "addr").out
        missing = shell("client", "no-such-program")
        assert (missing.code, missing.err) == (127, "error: no-such-program: no such command\n")
        assert shell("nobody", "true").code == 2

    @pytest.mark.parametrize(
        ("rule", "ends", "said"),
        (
            ("DROP", ("server", "outside"), "the policies allow it"),
            ("ACCEPT", ("client", "server"), "the policies deny it"),
        ),
        ids=("drop", "accept"),
    )
    def test_a_difference_is_marked(self, lab: str, rule: str, ends: tuple[str, str], said: str) -> None:
        """Somebody's rule above ours: packets and policies differ, in IPv4."""
        policies = ("-f", str(CLIENT_AND_SERVER / "0-pods.yaml"), "-f", str(CLIENT_AND_SERVER / "1-policy.yaml"))
        assert in_held(lab, "apply", *policies).code == 0
        for node in ("node/node1", "node/node2"):
            assert in_held(lab, "shell", node, "--", "iptables-nft", "-I", "FORWARD", "-j", rule).code == 0
        done = in_held(lab, "matrix", *ends)
        assert done.code == 1
        assert "½!" in done.out
        assert f"  MISMATCH: {said}" in done.out
        result = in_held(lab, "matrix", "-o", "json", *ends).decoded(MatrixResult)
        assert result.mismatches == sum(answer.mismatch for answer in result.answers) > 0
        assert {answer.family for answer in result.answers if answer.mismatch} == {4}
        assert in_held(lab, "probe", *ends, "80").code == 1

    def test_a_killed_lab_is_gone(self, lab: str, mark: str) -> None:
        state = held.read(lab)
        assert state is not None
        os.kill(state.pid, signal.SIGKILL)
        assert wait_until(lambda: not marked(mark))
        assert in_held(lab, "matrix").code == 3
        assert in_held(lab, "up", "-f", CLIENT_AND_SERVER / "0-pods.yaml").code == 0

    def test_ctrl_c_in_a_shell_leaves_the_lab(self, lab: str, mark: str) -> None:
        command = [*AGENT, "lab", "shell", "--name", lab, "client", "--", "sleep", "1000"]
        held_by = set(marked(mark))
        with subprocess.Popen(command, env=environment(mark), start_new_session=True) as process:
            assert wait_until(lambda: any(_is_sleep(pid) for pid in set(marked(mark)) - held_by))
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(10) == 130
        assert wait_until(lambda: set(marked(mark)) == held_by)
        assert in_held(lab, "probe", "client", "server").code == 0


def _is_sleep(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0")
    except OSError:
        return False


# --- scenarios -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_play(mode: str) -> None:
    done = run("lab", "play", THREE_TIERS, "--services", "--mode", mode)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("\n6 steps, 0 mismatches between packets and policies\n")
    titles = [line for line in done.out.splitlines() if line[:1].isdigit() and line[1:3] == ". "]
    assert [title[0] for title in titles] == list("012345")
    # The columns are the same at every step, and told once.
    assert done.out.count("─ svc/shop/db:15984") == 1
    step = done.out.partition("\n3. ")[2].partition("\n4. ")[0]
    assert "12 opened, 0 closed" in step
    assert step.count("+") == 6, "a cell is two families"


def test_play_is_1_when_packets_and_policies_differ() -> None:
    """A dataplane that programs nothing."""
    script = (
        "import sys; from agent.dataplane.dataplane import Dataplane; from agent.dataplane.report import Report;"
        "from agent.cli.main import main;"
        f"Dataplane.sync = lambda *_: Report(); sys.argv[1:] = ['lab', 'play', {str(CLIENT_AND_SERVER)!r}]; main()"
    )
    done = subprocess.run(
        [AGENT[0], "-c", script], env=environment("play"), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "✓!" in done.stdout
    assert done.stdout.endswith("\n3 steps, 6 mismatches between packets and policies\n")


def test_play_of_what_cannot_be_played(tmp_path: Path) -> None:
    assert "holds no YAML file" in run("lab", "play", tmp_path).err
    (tmp_path / "0.yaml").write_text((CLIENT_AND_SERVER / "0-pods.yaml").read_text())
    (tmp_path / "1.yaml").write_text("{apiVersion: v1, kind: Pod, metadata: {name: more}}")
    done = run("lab", "play", tmp_path)
    assert done.code == 2
    assert "1.yaml: brings other pods" in done.err
    (tmp_path / "1.yaml").write_text("metadata: {name: x\n")
    done = run("lab", "play", tmp_path)
    assert (done.code, done.out) == (2, ""), "found before anything is played"
    assert "1.yaml:2" in done.err


# --- however it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "group", "code"), ((signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9))
)
def test_nothing_is_left(mark: str, number: signal.Signals, group: bool, code: int) -> None:
    command = [*AGENT, "lab", "play", str(THREE_TIERS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(mark), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("1. "):
            assert process.poll() is None
        (os.killpg if group else os.kill)(process.pid, number)
        assert process.wait(10) == code
        assert wait_until(lambda: not marked(mark))
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


class TestWithoutRoot:
    @pytest.fixture
    def nobody(self) -> list[str]:
        command = as_nobody()
        if command is None or shutil.which("setpriv") is None:
            pytest.skip("no Python that the user nobody can run with this project")
        return command

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_matrix(self, mark: str, nobody: list[str], backend: str) -> None:
        command = [*nobody, "-m", "agent", "lab", "matrix", "-f", "-", "--backend", backend, "-o", "json"]
        text = KUBECTL.read_text()
        env = {**os.environ, "NETPOL_AGENT_LAB_TEST": mark}
        done = subprocess.run(command, input=text, env=env, capture_output=True, text=True, check=False, timeout=60)
        if "user namespaces" in done.stderr:
            pytest.skip(f"user namespaces are not permitted here: {done.stderr}")
        assert (done.returncode, done.stderr) == (0, "")
        assert Done(0, done.stdout, "").decoded(MatrixResult).mismatches == 0
