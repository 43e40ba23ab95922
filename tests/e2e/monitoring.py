"""Prometheus in the cluster, with the chart's own scrape configuration and alerts; the binary is Debian's.

That one is built without Kubernetes discovery: a container beside it asks for the pods (tests/chart/discovery.py)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from tests.chart import discovery
from tests.chart.helm import CHART, ROOT, tool
from tests.cluster.kube import kubectl
from tests.cluster.live import until
from tests.e2e.release import load_image

SPACE = "netpol-agent-monitoring"
IMAGE = "netpol-agent-prometheus:test"
OURS = "netpol-agent:dev"
TARGETS = "/data/targets.json"
EVERY = "1s"


def rules() -> dict[str, Any]:
    """The chart's alerts, but that none waits: nothing else is changed."""
    held: dict[str, Any] = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    for group in held["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    return held


def _scrape() -> list[dict[str, Any]]:
    held: list[dict[str, Any]] = yaml.safe_load((CHART / "files" / "scrape.yaml").read_text())
    return held


def _configuration() -> dict[str, Any]:
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY, "scrape_timeout": EVERY},
        "rule_files": ["/etc/prometheus/alerts.yaml"],
        "scrape_configs": discovery.jobs(_scrape(), TARGETS),
    }


def _objects() -> list[dict[str, Any]]:
    named = {"name": "prometheus", "namespace": SPACE}
    cluster_wide = {"name": SPACE}
    group = "rbac.authorization.k8s.io"
    files = {
        "prometheus.yml": yaml.safe_dump(_configuration()),
        "alerts.yaml": yaml.safe_dump(rules()),
        "discovery.py": Path(discovery.__file__).read_text(),
    }
    mounts = [{"name": "files", "mountPath": "/etc/prometheus"}, {"name": "data", "mountPath": "/data"}]
    (job,) = _scrape()
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            "metadata": cluster_wide,
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": cluster_wide,
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": SPACE},
            "subjects": [{"kind": "ServiceAccount", **named}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": files},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": named,
            "spec": {
                "serviceAccountName": "prometheus",
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {
                        "name": "prometheus",
                        "image": IMAGE,
                        "imagePullPolicy": "IfNotPresent",
                        "args": ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/data/series"],
                        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": 9090}, "periodSeconds": 1},
                        "volumeMounts": mounts,
                    },
                    {
                        "name": "discovery",
                        "image": OURS,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["/usr/bin/python3", "/etc/prometheus/discovery.py"],
                        "args": [discovery.selector(job), TARGETS],
                        "volumeMounts": mounts,
                    },
                ],
                "volumes": [{"name": "files", "configMap": {"name": "prometheus"}}, {"name": "data", "emptyDir": {}}],
            },
        },
    ]


class Prometheus:
    """Asked through the API server."""

    def ask(self, path: str, **query: str) -> Any:
        where = f"/api/v1/namespaces/{SPACE}/pods/prometheus:9090/proxy/api/v1/{path}"
        answer = json.loads(kubectl("get", "--raw", f"{where}?{urlencode(query)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])

    def state(self) -> str:
        """What a person would look at when targets are missing."""
        shown = [
            kubectl("-n", SPACE, "logs", "prometheus", "-c", name, "--tail=20") for name in ("discovery", "prometheus")
        ]
        return "\n".join([*shown, str(self.ask("targets"))])

    def firing(self) -> set[str]:
        return {one["labels"]["alertname"] for one in self.ask("alerts")["alerts"] if one["state"] == "firing"}

    def fires(self, alert: str, *, seconds: float = 60) -> None:
        until(lambda: alert in self.firing(), seconds, f"{alert} fires")

    def is_silent(self, *alerts: str, seconds: float = 60) -> None:
        """None of these, or none at all."""
        until(lambda: not self.firing() & (set(alerts) or self.firing()), seconds, f"{alerts or 'all'} are silent")


@contextmanager
def prometheus() -> Iterator[Prometheus]:
    with tempfile.TemporaryDirectory() as folder:
        load_image(_image(Path(folder)))
    items = {"apiVersion": "v1", "kind": "List", "items": _objects()}
    try:
        kubectl("apply", "-f", "-", text=json.dumps(items))
        kubectl("-n", SPACE, "wait", "--for=condition=Ready", "pod/prometheus", "--timeout=60s")
        yield Prometheus()
    finally:
        kubectl("delete", "--ignore-not-found", "-f", "-", text=json.dumps(items))


def _image(folder: Path) -> Path:
    """The binary with the libraries that it wants, packed as our own image is."""
    binary = tool("prometheus", "`make prometheus` fetches Debian's")
    root = folder / "root"
    libraries = re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", binary], capture_output=True, text=True).stdout)
    for source, target in [(binary, "/usr/bin/prometheus"), *((one, one) for one in libraries)]:
        to = root / target.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to)
    archive = folder / "prometheus.tar"
    pack = [sys.executable, ROOT / "deploy" / "image" / "pack.py", "--root", root, "--tag", IMAGE]
    subprocess.run([*pack, "--entrypoint", "/usr/bin/prometheus", "--out", archive], check=True)
    return archive
