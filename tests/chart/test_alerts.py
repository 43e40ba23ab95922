"""Each alert, with Prometheus's own rule tester: it comes when it must, alone, and for the right node; else there is
silence. A sample a minute, of a cluster of two nodes in which all is well but what a case changes on the first."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from agent.loop.inbox import Inbox
from agent.loop.metrics import LATENCIES, Metrics
from tests.chart.helm import CHART, ROOT, promtool

RULES = CHART / "files/alerts.yaml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
LONG = 200
"""Minutes that a series goes on."""


def flat(value: float) -> str:
    return f"{value}+0x{LONG}"


def grows(by: float) -> str:
    """A counter that grows by so much each minute."""
    return f"0+{by}x{LONG}"


def steps(*parts: tuple[float, int]) -> str:
    """One value after the other, each for some minutes."""
    return " ".join(f"{value}+0x{minutes - 1}" for value, minutes in parts)


def histogram(name: str, within: float, by: float) -> dict[str, str]:
    """`by` observations a minute, all between two of the bounds: the one that is `within`, and the one before."""
    bounds = [*LATENCIES, float("inf")]
    texts = [f"{bound:g}" if bound != float("inf") else "+Inf" for bound in bounds]
    return {f'{name}_bucket{{le="{t}"}}': grows(by if b >= within else 0) for t, b in zip(texts, bounds)}


EVENTS, ISOLATION = "netpol_agent_event_to_kernel_seconds", "netpol_agent_pod_isolation_seconds"
WELL: dict[str, str] = {
    "up": flat(1),
    "netpol_agent_ready": flat(1),
    "netpol_agent_in_sync": flat(1),
    "netpol_agent_unenforceable": flat(0),
    "netpol_agent_queue_depth": flat(0),
    "netpol_agent_last_successful_sync_timestamp_seconds": grows(60),
    'netpol_agent_build_info{version="0.1.0"}': flat(1),
    'netpol_agent_drift_found_total{cause="timer"}': flat(0),
    'netpol_agent_drift_found_total{cause="notice"}': flat(0),
    "process_start_time_seconds": flat(1000),
    "process_resident_memory_bytes": flat(111 * 2**20),
    **histogram(EVENTS, 0.0025, 0),
    **histogram(ISOLATION, 0.0025, 0),
}
CLUSTER = {
    'kube_daemonset_status_desired_number_scheduled{namespace="kube-system",daemonset="netpol-agent"}': flat(2),
    'kube_daemonset_status_number_ready{namespace="kube-system",daemonset="netpol-agent"}': flat(2),
}


class Case(NamedTuple):
    """What is different on node-1 (or in the cluster), and the alerts that come, with the first minute in which they
    are there; none: all is silent up to that minute. `gone`: no agent has any series.
    `over`: a minute in which there is none again."""

    name: str
    minute: int
    alerts: dict[str, dict[str, str]]
    node: Mapping[str, str] = MappingProxyType({})
    cluster: Mapping[str, str] = MappingProxyType({})
    gone: bool = False
    over: int = 0


NODE = {"job": "netpol-agent", "node": "node-1", "instance": "node-1"}
JOB = {"job": "netpol-agent"}
DAEMONSET = {"namespace": "kube-system", "daemonset": "netpol-agent"}
CASES = (
    Case("all is well, and nothing happens", 190, {}),
    Case("much happens, fast", 190, {}, {**histogram(EVENTS, 0.01, 600), **histogram(ISOLATION, 0.05, 60)}),
    Case("does not answer", 5, {"NetpolAgentDown": NODE}, {"up": flat(0)}),
    Case("does not answer for a moment", 30, {}, {"up": steps((1, 20), (0, 4), (1, 100))}),
    Case("no target at all", 10, {"NetpolAgentAbsent": JOB}, gone=True),
    Case("no target yet", 9, {}, gone=True),
    Case(
        "a node without a pod that is ready",
        15,
        {"NetpolAgentMissing": DAEMONSET},
        cluster={next(iter(CLUSTER)): flat(3)},
    ),
    Case("a node that is new", 20, {}, cluster={next(iter(CLUSTER)): steps((2, 10), (3, 5), (2, 100))}),
    Case(
        "the clean-up's DaemonSet has not come far",
        30,
        {},
        cluster={name.replace('agent"', 'agent-clean"'): flat(number) for number, name in zip((2, 0), CLUSTER)},
    ),
    Case(
        "a permission is missing",
        5,
        {"NetpolAgentNotInSync": NODE},
        {
            "netpol_agent_in_sync": flat(0),
            "netpol_agent_ready": flat(0),
            "netpol_agent_last_successful_sync_timestamp_seconds": flat(0),
            'netpol_agent_watch_restarts_total{kind="Pod",reason="refused"}': grows(2),
        },
    ),
    Case(
        "a start that takes its time",
        30,
        {},
        {
            "netpol_agent_in_sync": steps((0, 4), (1, 100)),
            "netpol_agent_ready": steps((0, 4), (1, 100)),
            "netpol_agent_last_successful_sync_timestamp_seconds": f"0+0x3 300+60x{LONG}",
        },
    ),
    Case(
        "IPVS",
        5,
        {"NetpolAgentUnenforceable": NODE},
        {"netpol_agent_unenforceable": flat(1), "netpol_agent_ready": flat(0)},
    ),
    Case("the API server is away", 5, {"NetpolAgentNotReady": NODE}, {"netpol_agent_ready": flat(0)}),
    Case("the API server was away", 30, {}, {"netpol_agent_ready": steps((1, 10), (0, 4), (1, 100))}),
    Case(
        "the kernel refuses, the process ends and starts anew",
        1,
        {"NetpolAgentKernelRefuses": {**NODE, "stage": "rules"}},
        {'netpol_agent_kernel_failures_total{stage="rules"}': "0+4x2 0+4x2 0+4x2 0+4x100"},
    ),
    Case(
        "the kernel refused once", 10, {}, {'netpol_agent_kernel_failures_total{stage="sets"}': steps((0, 5), (1, 99))}
    ),
    Case(
        "each write has to be tried again",
        21,
        {"NetpolAgentKernelRetries": {**NODE, "stage": "rules"}},
        {'netpol_agent_kernel_retries_total{stage="rules"}': grows(1)},
    ),
    Case("a write now and then", 90, {}, {'netpol_agent_kernel_retries_total{stage="sets"}': grows(0.1)}),
    Case(
        "somebody changes our rules every ten minutes",
        30,
        {"NetpolAgentDrift": NODE},
        {'netpol_agent_drift_found_total{cause="notice"}': grows(0.1)},
    ),
    Case(
        "somebody has changed our rules once",
        90,
        {},
        {'netpol_agent_drift_found_total{cause="notice"}': steps((0, 60), (1, 100))},
    ),
    Case(
        "a policy with a fault",
        15,
        {"NetpolAgentInvalidPolicies": {**JOB, "reason": "cidr-unreadable"}},
        {'netpol_agent_invalid_policies{reason="cidr-unreadable"}': flat(2)},
    ),
    Case(
        "a policy that was mended",
        30,
        {},
        {'netpol_agent_invalid_policies{reason="cidr-unreadable"}': "2+0x12 stale"},
    ),
    Case(
        "an object that cannot be read",
        5,
        {"NetpolAgentUnreadableObjects": {**NODE, "kind": "Pod"}},
        {'netpol_agent_unreadable_objects_total{kind="Pod"}': f"_x5 1+0x{LONG}"},
        over=70,
    ),
    Case(
        "changes take seconds",
        16,
        {"NetpolAgentSlowEnforcement": NODE},
        histogram(EVENTS, 2.5, 6),
    ),
    Case("one change took seconds", 25, {}, {f'{EVENTS}_bucket{{le="+Inf"}}': steps((0, 20), (1, 100))}),
    Case("pods stay open for seconds", 16, {"NetpolAgentSlowIsolation": NODE}, histogram(ISOLATION, 2.5, 6)),
    Case(
        "the writer is stuck",
        41,
        {"NetpolAgentStale": NODE},
        {"netpol_agent_last_successful_sync_timestamp_seconds": f"0+60x20 1200+0x{LONG}"},
    ),
    Case(
        "the timer is as slow as the chart allows",
        190,
        {},
        {
            "netpol_agent_last_successful_sync_timestamp_seconds": " ".join(
                f"{600 * number + 1}+0x9" for number in range(20)
            )
        },
    ),
    Case(
        "watches keep ending",
        26,
        {"NetpolAgentWatchRestarts": {**NODE, "kind": "Pod"}},
        {'netpol_agent_watch_restarts_total{kind="Pod",reason="broken"}': grows(1)},
    ),
    Case(
        "watches that are told to list again, and one that ends every few minutes",
        90,
        {},
        {
            'netpol_agent_watch_restarts_total{kind="Pod",reason="gone"}': grows(1),
            'netpol_agent_watch_restarts_total{kind="Pod",reason="broken"}': grows(0.2),
        },
    ),
    Case(
        "a process that ends every ten minutes",
        40,
        {"NetpolAgentRestarts": NODE},
        {"process_start_time_seconds": steps(*((600 * number, 10) for number in range(20)))},
    ),
    Case("an update", 45, {}, {"process_start_time_seconds": steps((1000, 20), (1200, 100))}),
    Case("a queue that grows", 5, {"NetpolAgentQueueGrows": NODE}, {"netpol_agent_queue_depth": f"150+10x{LONG}"}),
    Case("a burst", 30, {}, {"netpol_agent_queue_depth": steps((0, 20), (5000, 3), (0, 100))}),
    Case("a queue that is never quite empty", 30, {}, {"netpol_agent_queue_depth": flat(20)}),
    Case("memory", 15, {"NetpolAgentMemory": NODE}, {"process_resident_memory_bytes": flat(450 * 2**20)}),
    Case(
        "two versions for hours",
        120,
        {"NetpolAgentVersionsDiffer": {}},
        {'netpol_agent_build_info{version="0.1.0"}': "", 'netpol_agent_build_info{version="0.2.0"}': flat(1)},
    ),
    Case(
        "two versions while one follows the other",
        125,
        {},
        {
            'netpol_agent_build_info{version="0.1.0"}': "1+0x60 stale",
            'netpol_agent_build_info{version="0.2.0"}': f"_x60 1+0x{LONG}",
        },
    ),
)


def labelled(series: str, **labels: str) -> str:
    """A series with more labels."""
    name, _, own = series.partition("{")
    more = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{own.rstrip('}')}{',' * bool(own)}{more}}}"


def group(case: Case) -> dict[str, Any]:
    """A case in promtool's words."""
    series = {labelled(name, job="kube-state-metrics"): text for name, text in {**CLUSTER, **case.cluster}.items()}
    for node, own in (("node-1", case.node), ("node-2", {})) if not case.gone else ():
        for name, text in {**WELL, **own}.items():
            series[labelled(name, job="netpol-agent", node=node, instance=node)] = text
    return {
        "name": case.name,
        "interval": "1m",
        "input_series": [{"series": name, "values": text} for name, text in series.items() if text],
    }


def rule_test(folder: Path, *groups: dict[str, Any]) -> str:
    """What promtool finds different; nothing else is said if all is as expected."""
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(groups)}
    (folder / "tests.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    done = subprocess.run(
        [promtool(), "test", "rules", str(folder / "tests.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_promtool_finds_no_fault_in_the_rules() -> None:
    done = subprocess.run([promtool(), "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_comes_alone_and_only_when_it_must(tmp_path: Path) -> None:
    groups = []
    for case in CASES:
        fires = []
        for alert, labels in case.alerts.items():
            known = {"alertname": alert, "alertstate": "firing", "severity": ALERTS[alert]["labels"]["severity"]}
            if alert == "NetpolAgentMissing":
                known["job"] = "kube-state-metrics"
            words = ",".join(f'{key}="{value}"' for key, value in {**known, **labels}.items())
            fires.append({"labels": f"ALERTS{{{words}}}", "value": 1})
        asked = [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{minute}m",
                "exp_samples": fires if minute == case.minute else [],
            }
            for minute in (*range(case.minute + 1), *[case.over] * (case.over > 0))
        ]
        groups.append({**group(case), "promql_expr_test": asked})
    assert rule_test(tmp_path, *groups) == ""


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    """Every silent case is one for all alerts; what each would be mistaken for has one of its own."""
    assert {alert for case in CASES for alert in case.alerts} == set(ALERTS)
    assert sum(not case.alerts for case in CASES) >= 15


def test_what_alerts_say(tmp_path: Path) -> None:
    """Their templates are filled in: promtool tells the texts of alerts that it has not been told to expect."""
    for case in CASES:
        for alert in case.alerts:
            asked = {"alertname": alert, "eval_time": f"{case.minute}m", "exp_alerts": []}
            told = rule_test(tmp_path, {**group(case), "alert_rule_test": [asked]})
            assert "<error" not in told
            assert "<no value>" not in told
            summary = re.search(r'summary="((?:[^"\\]|\\.)*)"', told)
            assert summary, told
            text = json.loads(f'"{summary[1]}"')
            assert "{{" not in text
            assert not text.endswith(" "), text
            if "node" in case.alerts[alert]:
                assert "node-1" in text, text


def test_alerts_ask_for_metrics_that_there_are() -> None:
    """Of the agent's own registry; every alert has a severity, a summary, and what to do."""
    metrics = Metrics(Inbox())
    known = {
        name
        for family in metrics.registry.collect()
        for name in (family.name, f"{family.name}_total", f"{family.name}_bucket")
    }
    for name, rule in ALERTS.items():
        assert set(re.findall(r"\bnetpol_agent_\w+", rule["expr"])) <= known, name
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/troubleshooting.md#{name.lower()}"
    assert len(ALERTS) == RULES.read_text().count("- alert: ")


def test_runbooks_are_there() -> None:
    headings = re.findall(r"^#+ (\w+)", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert set(ALERTS) <= set(headings)
