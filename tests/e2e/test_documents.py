"""docs/install.md as a user reads it: its commands, in its order; and the ways without Helm, and when a node lags."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chart.helm import ROOT
from tests.cluster.kube import NODES, kubectl, left_on, needs_cluster, node_command
from tests.docs.blocks import Block, blocks
from tests.e2e.release import NAME, SPACE, Release, helm

pytestmark = needs_cluster
INSTALL = [block for block in blocks(ROOT / "docs" / "install.md") if block.mark == "cluster"]
PLAIN, CLEAN = ROOT / "deploy" / "netpol-agent.yaml", ROOT / "deploy" / "netpol-agent-clean.yaml"
HOLD = "import time\nfrom agent.dataplane.lock import only_writer\nwith only_writer(60, print): time.sleep(120)"


@pytest.fixture
def bare(release: Release) -> Iterator[Release]:
    """A cluster without the release; afterwards it has it again."""
    if release.is_there():
        release.uninstall()
    try:
        yield release
    finally:
        if release.is_there():
            release.uninstall()
        release.install()


def nothing_is_left() -> None:
    assert {node: left_on(node) for node in NODES} == {node: [] for node in NODES}


def test_install_as_the_document_says(bare: Release) -> None:
    """To the end, where it is uninstalled."""
    assert len(INSTALL) >= 5
    for block in INSTALL:
        _run(block)
        if "helm install" in block.text:
            assert bare.is_there()
    assert not bare.is_there()
    nothing_is_left()


def test_without_helm(bare: Release) -> None:
    assert not bare.is_there()
    kubectl("apply", "-f", str(PLAIN))
    try:
        kubectl("-n", SPACE, "rollout", "status", f"daemonset/{NAME}", "--timeout=60s")
        assert all(left_on(node) for node in NODES)
        assert bare.metric(NODES[0], "ready") == 1
    finally:
        kubectl("delete", "-f", str(PLAIN))
    _clean_without_helm()
    nothing_is_left()


def test_a_node_that_lags_is_named(bare: Release) -> None:
    """Somebody holds the turn to write on one node: Helm fails and says so, and the node is cleaned later."""
    bare.install("cleanup.timeout=10")
    node = NODES[1]
    with _held(node):
        done = helm("uninstall", NAME, "--timeout", "120s")
        assert done.code != 0
        said = f"{done.said}\n{bare.troubles()}"
        assert f"{node} is not clean: " in said, said  # the first clean or, if that came before us, the second
        assert "deploy/netpol-agent-clean.yaml" in said
        assert left_on(NODES[0]) == []
    if bare.is_there():
        assert helm("uninstall", NAME, "--no-hooks").code == 0
    _clean_without_helm()
    nothing_is_left()


def _clean_without_helm() -> None:
    kubectl("apply", "-f", str(CLEAN))
    try:
        kubectl("-n", SPACE, "rollout", "status", f"daemonset/{NAME}-clean", "--timeout=60s")
    finally:
        kubectl("delete", "-f", str(CLEAN))


@contextmanager
def _held(node: str) -> Iterator[None]:
    """As if an agent ran there that does not end: as soon as the one that is there lets go, it is the next."""
    python = ROOT / ".venv" / "bin" / "python"
    holder = subprocess.Popen(node_command(node, str(python), "-c", HOLD), cwd=ROOT)
    try:
        yield
    finally:
        holder.kill()
        holder.wait()


def _run(block: Block) -> None:
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", block.text],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"docs/install.md:{block.line}\n{block.text}\n{done.stdout}{done.stderr}"
    print(done.stdout)
