"""The chart as a user installs it: a release of Helm, its pods, and what each node's agent says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.chart.helm import CHART, ROOT, tool
from tests.cluster.kube import kubectl
from tests.cluster.live import sample

IMAGE = ROOT / "dist" / "netpol-agent-image.tar"
NAME, SPACE = "netpol-agent", "kube-system"
DEVELOPMENT_CLUSTER = ROOT.parent / "shared" / "cluster"
METRICS = 10092
AGENTS = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component=agent"
OURS = f"app.kubernetes.io/instance={NAME}"
KINDS = (
    "daemonsets,deployments,jobs,pods,services,configmaps,serviceaccounts,roles,rolebindings,networkpolicies,"
    "clusterroles,clusterrolebindings"
)


class Done(NamedTuple):
    """What a command has said, all of it, and how it ended."""

    code: int
    said: str


def helm(*arguments: str) -> Done:
    """In the release's namespace."""
    done = subprocess.run(
        [tool("helm", "`make helm` builds it where there is Go"), "-n", SPACE, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout + done.stderr)


def load_image(archive: Path) -> None:
    """Onto every node: by LOAD_IMAGE, for kind `kind load image-archive`; the development cluster's is found."""
    given = os.environ.get("LOAD_IMAGE")
    if given is None and Path("/run/netns/cl-node1").exists() and (DEVELOPMENT_CLUSTER / "load").exists():
        given = str(DEVELOPMENT_CLUSTER / "load")
    if given is None:
        pytest.skip("needs a way to load images on the nodes: LOAD_IMAGE is not set (kind load image-archive)")
    if not archive.exists():
        pytest.skip(f"needs {archive.relative_to(ROOT)}: make image")
    subprocess.run([*shlex.split(given), str(archive)], check=True, capture_output=True)


class Release:
    """`helm install netpol-agent`, with values as on a command line."""

    values = ("image.repository=netpol-agent", "image.tag=dev")

    def install(self, *values: str) -> None:
        """As the README says; upgrades what is there."""
        told = [word for value in (*self.values, *values) for word in ("--set", value)]
        done = helm("upgrade", "--install", NAME, str(CHART), "--wait", "--timeout", "180s", *told)
        assert done.code == 0, f"{done.said}\n{self.troubles()}"

    def uninstall(self) -> None:
        done = helm("uninstall", NAME, "--wait", "--timeout", "300s")
        assert done.code == 0, f"{done.said}\n{self.troubles()}"

    def is_there(self) -> bool:
        return NAME in (one["name"] for one in json.loads(helm("list", "--all", "-o", "json").said))

    def pods(self) -> dict[str, str]:
        """The agents' pods, by node; where there are two, the younger one."""
        return {pod["spec"]["nodeName"]: pod["metadata"]["name"] for pod in self._items() if "nodeName" in pod["spec"]}

    def ready(self) -> set[str]:
        """Those of the agents' pods that are."""
        true = {"type": "Ready", "status": "True"}.items()
        return {
            pod["metadata"]["name"]
            for pod in self._items()
            if any(true <= one.items() for one in pod["status"].get("conditions", ()))
        }

    def _items(self) -> list[dict[str, Any]]:
        """The older ones first."""
        items = json.loads(kubectl("-n", SPACE, "get", "pods", "-l", AGENTS, "-o", "json"))["items"]
        return sorted(items, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def rolled_out(self) -> None:
        kubectl("-n", SPACE, "rollout", "status", f"daemonset/{NAME}", "--timeout=120s")

    def log(self, node: str) -> str:
        return kubectl("-n", SPACE, "logs", self.pods()[node])

    def lines(self, node: str) -> Iterator[dict[str, Any]]:
        """The log, as JSON."""
        for line in self.log(node).splitlines():
            yield json.loads(line)

    def run(self, node: str, *command: str) -> str:
        """A command in the agent's container."""
        return kubectl("-n", SPACE, "exec", self.pods()[node], "--", *command)

    def metric(self, node: str, name: str, **labels: str) -> float:
        """A sample of the node's /metrics, through the API server; the sum where labels leave several."""
        path = f"/api/v1/namespaces/{SPACE}/pods/{self.pods()[node]}:{METRICS}/proxy/metrics"
        return sample(kubectl("get", "--raw", path), name, **labels)

    def left_in_cluster(self) -> list[str]:
        """Objects of the release that the cluster holds."""
        return kubectl("get", KINDS, "-A", "-l", OURS, "-o", "name").split()

    def troubles(self) -> str:
        """What a person would look at when something is wrong."""
        shown = []
        for command in (
            ("-n", SPACE, "get", "pods,jobs,daemonsets", "-l", OURS, "-o", "wide"),
            ("-n", SPACE, "get", "events", "--sort-by=.lastTimestamp"),
            ("-n", SPACE, "logs", "-l", OURS, "--all-containers", "--tail=20", "--prefix"),
        ):
            done = subprocess.run(["kubectl", *command], capture_output=True, text=True, check=False)
            shown.append("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
        return "\n\n".join(shown)
