"""`run` before it runs: usage, configuration, addresses. What it does then: tests/loop, tests/kube, tests/cluster."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cli.shell import AGENT, Command, agent, inside, run
from tests.kube import wire
from tests.lab.world import needs_root


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(wire.kubeconfig("http://127.0.0.1:1"))
    return path


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "--node"),
        (("--node", "n", "--health-address", "10093"), "is not HOST:PORT"),
        (("--node", "n", "--metrics-address", "::1:80"), "stands in brackets"),
        (("--node", "n", "--resync", "0"), "--resync"),
        (("--node", "n", "--backend", "ebtables"), "--backend"),
        (("--node", "", "--log-format", "text"), "--node"),
    ],
)
def test_usage(arguments: tuple[str, ...], says: str) -> None:
    done = run("run", *arguments)
    assert done.code == 2
    assert says in done.err


def test_no_configuration_says_where_it_was_sought(tmp_path: Path) -> None:
    done = run("run", "--node", "n", "--kubeconfig", tmp_path / "none")
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert str(tmp_path / "none") in done.err
    assert "give --kubeconfig FILE" in done.err


def test_an_address_that_is_taken(kubeconfig: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("run", "--node", "n", "--kubeconfig", kubeconfig, "--backend", "nft", "--health-address", address)
    assert done.code == 3
    assert f"cannot listen on {address}: Address already in use" in done.err


class TestStarted:
    pytestmark = needs_root

    def test_without_an_api_server_nothing_is_written_and_sigterm_ends_it(self, kubeconfig: Path) -> None:
        """The reason stands in the log, as JSON; its exit code is 0."""
        started = [*AGENT, "run", "--node", "n", "--kubeconfig", str(kubeconfig), "--log-format", "json"]
        ended, saved = inside(
            Command(("timeout", "--preserve-status", "--kill-after=5", "2", *started)),
            Command(("sh", "-c", "iptables-nft-save; ipset save")),
        )
        assert ended.code == 0, ended.err
        assert '"level":"warning","message":"Pod: no answer from the API server: http://127.0.0.1:1' in ended.err
        assert "NPA" not in saved.out

    def test_while_it_runs_nobody_else_writes(self, kubeconfig: Path) -> None:
        """`clean` waits a while, says for whom, and gives up."""
        script = (
            f"{' '.join(AGENT)} run --node n --kubeconfig {kubeconfig} 2>/dev/null & sleep 2;"
            f"{' '.join(AGENT)} clean; code=$?; kill $!; wait; exit $code"
        )
        (done,) = inside(Command(("sh", "-c", script)))
        assert done.code == 3
        assert "waiting for another netpol-agent (process" in done.err
        assert "while `run` is at work, it alone writes" in done.err


def test_help_names_every_way_to_end() -> None:
    done = agent("run", "--help").run()
    assert done.code == 0
    for text in ("Exit codes: 0 told to stop", "--cleanup-on-exit", "NODE_NAME"):
        assert text in done.out
