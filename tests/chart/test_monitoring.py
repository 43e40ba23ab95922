"""A real Prometheus with the chart's scrape configuration, and a real agent in a network namespace: targets are found,
every query of the dashboard is answered, and no alert comes."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from agent.loop.inbox import Inbox
from agent.loop.metrics import Metrics
from agent.loop.server import Address, Server, metrics_path
from tests.chart.dashboard import FILE, panels, queries
from tests.chart.discovery import jobs, selected, selector, targets
from tests.chart.helm import CHART, Object, find, render
from tests.chart.prometheus import prometheus, until
from tests.dataplane.kernel import Kernel, run
from tests.dataplane.scenes import cluster, edited, pod
from tests.loop.live import Live

SCRAPE = yaml.safe_load((CHART / "files/scrape.yaml").read_text())
PORT = 10092
BY_MACHINE = {"NetpolAgentSlowEnforcement", "NetpolAgentSlowIsolation", "NetpolAgentMemory"}
"""Alerts that tests beside this one, and what this process holds besides the agent, may set off."""


def agent_pod(node: str, address: str, number: int = 0) -> Object:
    """What the DaemonSet's controller and the kubelet make of the chart's template."""
    template = find(render(), "DaemonSet", "netpol-agent")["spec"]["template"]
    one: Object = copy.deepcopy(template)
    one["metadata"] |= {"namespace": "kube-system", "name": f"netpol-agent-{node}-{number}", "uid": f"{node}-{number}"}
    one["spec"]["nodeName"] = node
    one["status"] = {"phase": "Running", "podIP": address, "hostIP": address}
    return one


def served(registry: CollectorRegistry, host: str = "127.0.0.1") -> Server:
    server = Server(Address(host, PORT), metrics_path("/metrics", registry))
    server.start()
    return server


@pytest.mark.root
def test_one_target_for_each_node(tmp_path: Path) -> None:
    """IPv4 and IPv6; in an update two pods are one; other pods, and what has ended, are none."""
    run("ip", "link", "set", "lo", "up")
    server, other = (served(Metrics(Inbox()).registry, host) for host in ("127.0.0.1", "::1"))
    ended, stranger, silent = (agent_pod(node, "127.0.0.1") for node in ("node-3", "node-4", "node-5"))
    ended["status"]["phase"] = "Failed"
    stranger["metadata"]["labels"]["app.kubernetes.io/component"] = "clean"
    silent["metadata"]["annotations"].pop("prometheus.io/scrape")
    pods = [agent_pod("node-1", "127.0.0.1", n) for n in (0, 1)] + [agent_pod("node-2", "::1"), ended, stranger, silent]
    found = targets(selected(pods, selector(SCRAPE[0])))
    assert len(found) == 5, "one is of another component"
    (tmp_path / "targets.json").write_text(json.dumps(found))
    with prometheus(tmp_path, jobs(SCRAPE, str(tmp_path / "targets.json"))) as monitor:
        until(lambda: len(monitor.query('up{job="netpol-agent"} == 1')) == 2)
        active = monitor.ask("targets", state="active")["activeTargets"]
    assert {(one["labels"]["node"], one["scrapeUrl"]) for one in active} == {
        ("node-1", f"http://127.0.0.1:{PORT}/metrics"),
        ("node-2", f"http://[::1]:{PORT}/metrics"),
    }
    assert all(set(one["labels"]) == {"job", "node", "instance"} for one in active)
    for one in (server, other):
        one.shutdown()
        one.server_close()


@pytest.mark.root
@pytest.mark.parametrize("backend", ["nft"])
def test_every_query_of_the_dashboard_has_data(kernel: Kernel, tmp_path: Path) -> None:
    """While policies and pods change; and the alerts, whose waiting times are left out, stay silent."""
    run("ip", "link", "set", "lo", "up")
    live = Live(kernel.backend)
    live.metrics.ready.set_function(lambda: float(not live.health.reasons()))
    live.metrics.in_sync.set_function(lambda: float(live.complete))
    (tmp_path / "targets.json").write_text(json.dumps(targets([agent_pod("node-1", "127.0.0.1")])))
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))

    def play() -> None:
        live.begin(cluster())
        live.settle()
        server = served(live.metrics.registry)
        with prometheus(tmp_path, jobs(SCRAPE, str(tmp_path / "targets.json")), tmp_path / "rules.yaml") as monitor:
            until(lambda: monitor.query("netpol_agent_ready == 1"))
            for number in range(8):
                live.put(pod("late", 1, 50 + number, app="web"))
                live.put(*edited(cluster(), "NetworkPolicy/db", ingress=[{}] * (number % 2)))
                live.settle()
                time.sleep(0.25)
            until(lambda: monitor.query("rate(netpol_agent_event_to_kernel_seconds_count[1m]) > 0"))
            empty = [f"{title}: {expr}" for title, expr in queries() if not numbers(monitor.query(expr))]
            assert empty == []
            told = monitor.ask("rules")["groups"][0]["rules"]
            assert [rule["name"] for rule in told if rule["health"] != "ok"] == []
            assert {rule["name"] for rule in told if rule["state"] != "inactive"} <= BY_MACHINE
            assert numbers(monitor.query(dict(queries())["Nodes that enforce: "])) == [1]
            assert numbers(monitor.query(dict(queries())["Nodes that do not: "])) == [0]
        server.shutdown()
        server.server_close()

    live.run(play)


def numbers(result: list[dict[str, Any]]) -> list[float]:
    """Those of a query's answer that are numbers."""
    return [float(one["value"][1]) for one in result if one["value"][1] != "NaN"]


def test_the_dashboard_is_whole() -> None:
    """Panels have titles, what they ask is said where it needs saying, nothing overlaps, and every metric exists."""
    metrics = Metrics(Inbox())
    families = {family.name: family.type for family in metrics.registry.collect()}
    known = {name + suffix for name in families for suffix in ("", "_total", "_bucket", "_sum", "_count")}
    for _, expr in queries():
        assert set(re.findall(r"\b(?:netpol_agent|process)_\w+", expr)) <= known, expr
        assert "$" not in expr
    asked = " ".join(expr for _, expr in queries())
    shown = {name for name in families if name.startswith("netpol_agent_") and name in asked}
    hidden = {"netpol_agent_syncs", "netpol_agent_drift_checks", "netpol_agent_drift_repaired", "netpol_agent_in_sync"}
    assert {name for name in families if name.startswith("netpol_agent_")} - shown == hidden
    taken: set[tuple[int, int]] = set()
    document = json.loads(FILE.read_text())
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    for panel in document["panels"]:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert [one["name"] for one in document["templating"]["list"]] == ["datasource", "node"]


def test_the_dashboard_comes_through_the_chart_unchanged() -> None:
    held = find(render({"dashboard": {"enabled": True}}), "ConfigMap", "netpol-agent-dashboard")
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(held["data"]["netpol-agent.json"]) == json.loads(FILE.read_text())


def test_operators_objects_find_the_same_targets() -> None:
    """PodMonitor and ServiceMonitor give the labels that the scrape configuration gives."""
    objects = render({"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}})
    plain = {one["target_label"] for one in SCRAPE[0]["relabel_configs"] if "target_label" in one}
    for kind, held in (("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")):
        (endpoint,) = find(objects, kind, "netpol-agent")["spec"][held]
        labels = {one["targetLabel"] for one in endpoint["relabelings"] if "targetLabel" in one}
        assert labels - {"__address__"} == plain - {"__address__", "__metrics_path__"} | {"job"}
        assert {"action": "labeldrop", "regex": "pod|container"} in endpoint["relabelings"]


def test_the_rule_of_the_operator_has_all_alerts() -> None:
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]
    values = {"prometheusRule": {"enabled": True}}
    assert find(render(values), "PrometheusRule", "netpol-agent")["spec"]["groups"] == rules
    values = {"prometheusRule": {"enabled": True, "disabled": ["NetpolAgentDown"], "alertLabels": {"severity": "page"}}}
    (group,) = find(render(values), "PrometheusRule", "netpol-agent")["spec"]["groups"]
    assert len(group["rules"]) == len(rules[0]["rules"]) - 1
    assert all(rule["labels"] == {"severity": "page"} for rule in group["rules"])
