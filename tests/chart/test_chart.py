"""What the chart makes: objects that the API takes, a DaemonSet that the agent understands, and no right too many."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli.exits import FINDINGS
from agent.cli.main import cli
from agent.kube.kinds import KINDS
from tests.chart.helm import CHART, ROOT, Object, events, find, helm, render
from tests.chart.schemas import faults

EVERYTHING: Object = {
    "image": {"repository": "images.example:5000/net/agent", "digest": "sha256:" + "0a" * 32, "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}],
    "agent": {
        "backend": "nft",
        "allowMulticast": True,
        "resync": 60,
        "logFormat": "text",
        "logLevel": "warning",
        "extraArgs": ["--cleanup-on-exit"],
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
    },
    "apiServer": {"host": "192.0.2.1", "port": 6443},
    "metrics": {
        "port": 9100,
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "serviceMonitor": {"enabled": True, "interval": "1m"},
    },
    "npmMetrics": {"enabled": True},
    "health": {"port": 9101},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}, "alertLabels": {"team": "net"}},
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Network"}},
    "resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": 1, "memory": "1Gi"}},
    "podAnnotations": {"a": "1"},
    "podLabels": {"b": "2"},
    "serviceAccount": {"annotations": {"c": "3"}},
    "cleanup": {"timeout": 60},
}
MATRIX: dict[str, Object] = {
    "defaults": {},
    "everything": EVERYTHING,
    "dev image": {"image": {"repository": "netpol-agent", "tag": "dev"}},
    "no metrics": {"metrics": {"enabled": False}},
    "no annotations": {"metrics": {"annotations": False}},
    "others' account and rights": {"serviceAccount": {"create": False, "name": "theirs"}, "rbac": {"create": False}},
    "no clean-up": {"cleanup": {"enabled": False}},
    "nowhere in particular": {"nodeSelector": None, "tolerations": [], "affinity": {}, "priorityClassName": ""},
    "on delete": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": None}},
    "one after the other": {"updateStrategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}},
    "other names": {"nameOverride": "policies", "fullnameOverride": "np"},
    "no alert but": {"prometheusRule": {"enabled": True, "disabled": ["NetpolAgentMemory", "NetpolAgentMissing"]}},
}


def container(one: Object) -> Any:
    return one["spec"]["template"]["spec"]["containers"][0]


def options(words: list[str], **environment: str) -> dict[str, Any]:
    """What the agent's own command line makes of a container's args, once the kubelet has put in the environment."""
    verb, *rest = (re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word) for word in words)
    return cli.commands[verb].make_context(verb, rest, **cli.context_settings).params


# --- objects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", MATRIX.values(), ids=list(MATRIX))
def test_objects_are_as_kubernetes_wants_them(values: Object) -> None:
    """Of a release with a name that Helm allows and a Service would not, in another namespace, too."""
    for release, namespace in (("netpol-agent", "kube-system"), ("my.release", "network-policies")):
        objects = render(values, release=release, namespace=namespace)
        assert [fault for one in objects for fault in faults(one)] == []
        names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects]
        assert len(names) == len(set(names)), "two of one name"
        for one in objects:
            cluster_wide = one["kind"].startswith("Cluster")
            assert one["metadata"].get("namespace") == (None if cluster_wide else namespace)
            assert {len(one["metadata"]["name"]) <= 63, "." in one["metadata"]["name"]} == {True, False}


def test_faults_are_found() -> None:
    """The schemas are no empty words."""
    one = find(render(), "DaemonSet", "netpol-agent")
    container(one)["imagePullPolcy"] = container(one).pop("imagePullPolicy")
    container(one)["args"].append(1)
    one["spec"]["revisionHistoryLimit"] = "5"
    del one["spec"]["selector"]
    told = "\n".join(faults(one))
    for words in ("imagePullPolcy: is not known", "is 1, no string", "is '5', no integer", "selector: is missing"):
        assert words in told
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "x"}}
    assert any(
        "interval" in fault for fault in faults({**monitor, "spec": {"podMetricsEndpoints": [{"interval": "x"}]}})
    )
    assert faults({**monitor, "kind": "PodMonitors"}) == ["no kind monitoring.coreos.com/v1 PodMonitors is known"]


@pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="needs a cluster: KUBECONFIG")
def test_an_api_server_takes_them() -> None:
    """Strictly, and without keeping them."""
    kubectl = shutil.which("kubectl") or pytest.skip("needs kubectl")
    objects = [one for one in render({"dashboard": {"enabled": True}}) if "monitoring" not in one["apiVersion"]]
    done = subprocess.run(
        [kubectl, "create", "--dry-run=server", "--validate=strict", "-f", "-"],
        input=yaml.safe_dump_all(objects),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    faults = [line for line in done.stderr.splitlines() if "AlreadyExists" not in line]
    assert faults == []


def test_lint() -> None:
    done = helm("lint", str(CHART), "--strict", values=EVERYTHING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_agents() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert str(chart["appVersion"]) == project["version"]
    assert container(find(render(), "DaemonSet", "netpol-agent"))["image"] == f"netpol-agent:{project['version']}"


def test_files_written_from_the_chart_are_fresh(tmp_path: Path) -> None:
    """`make manifests` writes them."""
    helm("version")
    subprocess.run([ROOT / "deploy/manifests", tmp_path], check=True, timeout=60)
    for name in ("netpol-agent.yaml", "netpol-agent-clean.yaml"):
        assert (ROOT / "deploy" / name).read_text() == (tmp_path / name).read_text(), f"stale: {name}; make manifests"
        objects = [one for one in yaml.safe_load_all((tmp_path / name).read_text()) if one]
        assert [fault for one in objects for fault in faults(one)] == []
        assert "helm" not in (tmp_path / name).read_text().replace("Helm", "")
        assert all(events(one) == set() for one in objects)


# --- the DaemonSet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_the_agent_understands_its_options(address: str) -> None:
    one = container(find(render(EVERYTHING), "DaemonSet", "netpol-agent"))
    found = options(one["args"], NODE_NAME="node-1", NODE_IP=address)
    assert {name: found[name] for name in ("node_name", "backend", "allow_multicast", "resync", "cleanup_on_exit")} == {
        "node_name": "node-1",
        "backend": "nft",
        "allow_multicast": True,
        "resync": 60,
        "cleanup_on_exit": True,
    }
    assert tuple(found["metrics_address"]) == (address, 9100)
    assert tuple(found["npm_metrics_address"]) == (address, 10091)
    assert tuple(found["health_address"]) == ("127.0.0.1", 9101)
    assert (found["log_format"], found["log_level"]) == ("text", "warning")
    environment = {each["name"]: each.get("value") for each in one["env"]}
    assert environment["KUBERNETES_SERVICE_HOST"] == "192.0.2.1"
    assert environment["KUBERNETES_SERVICE_PORT"] == "6443"
    assert environment["HTTPS_PROXY"]
    bare = container(find(render({"metrics": {"enabled": False}}), "DaemonSet", "netpol-agent"))
    assert options(bare["args"], NODE_NAME="n", NODE_IP=address)["metrics_address"] is None


def test_an_update_puts_the_next_pod_beside_the_old_one() -> None:
    """A port would be the host's, and keep it away; and nothing may be down meanwhile."""
    one = find(render(EVERYTHING), "DaemonSet", "netpol-agent")
    assert one["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": "10%", "maxUnavailable": 0},
    }
    spec = one["spec"]["template"]["spec"]
    assert all("ports" not in each for each in spec["containers"])
    assert "initContainers" not in spec
    assert spec["hostNetwork"] is True
    assert "minReadySeconds" not in one["spec"], "the controller of 1.34 loses updates by surge with it"
    ready = f"/readyz?instance={instance(one)}"
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", ready)):
        assert container(one)[probe]["httpGet"] == {"host": "127.0.0.1", "port": 9101, "path": path}


def instance(daemonset: Any) -> str:
    return str(options(container(daemonset)["args"], NODE_NAME="n", NODE_IP="10.0.0.1")["instance"])


def test_versions_are_known_from_each_other() -> None:
    """By what decides whether they can work, and by nothing that leaves the pods as they are."""
    first = instance(find(render(), "DaemonSet", "netpol-agent"))
    assert first.startswith("kube-system/netpol-agent:")
    for same in ({"dashboard": {"enabled": True}}, {"prometheusRule": {"enabled": True}}, {"rbac": {"create": False}}):
        assert instance(find(render(same), "DaemonSet", "netpol-agent")) == first
    for other in (
        {"image": {"tag": "x"}},
        {"agent": {"resync": 11}},
        {"metrics": {"port": 9}},
        {"health": {"port": 9}},
    ):
        assert instance(find(render(other), "DaemonSet", "netpol-agent")) != first


def test_every_node_and_before_other_pods() -> None:
    for name in ("netpol-agent", "netpol-agent-clean"):
        spec = find(render(), "DaemonSet", name)["spec"]["template"]["spec"]
        assert spec["priorityClassName"] == "system-node-critical"
        assert spec["tolerations"] == [{"operator": "Exists"}]
        assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
        (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert term["matchExpressions"] == [{"key": "type", "operator": "NotIn", "values": ["virtual-kubelet"]}]


def test_no_right_too_many() -> None:
    """Root, with two of its capabilities, where rules are written; nobody everywhere else. One file of the host."""
    writers = 0
    for one in render(EVERYTHING):
        spec = one.get("spec", {})
        spec = spec if one["kind"] == "Pod" else spec.get("template", {}).get("spec", {})
        for each in (*spec.get("initContainers", ()), *spec.get("containers", ())):
            context = each["securityContext"]
            assert context["privileged"] is False
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["capabilities"]["drop"] == ["ALL"]
            assert {"requests", "limits"} <= set(each["resources"])
            if context["capabilities"].get("add"):
                writers += 1
                assert context["capabilities"]["add"] == ["NET_ADMIN", "NET_RAW"]
                assert [mount["mountPath"] for mount in each["volumeMounts"]] == ["/run/xtables.lock"]
            else:
                assert context["runAsNonRoot"] is True
        for volume in spec.get("volumes", ()):
            if "hostPath" in volume:
                assert volume["hostPath"] == {"path": "/run/xtables.lock", "type": "FileOrCreate"}
        assert not {"hostPID", "hostIPC"} & set(spec)
    assert writers == 3


def test_permissions_are_those_that_are_used() -> None:
    role = find(render(), "ClusterRole", "netpol-agent")
    watched = {
        f"{r}.{g}".rstrip(".") for rule in role["rules"][:-1] for g in rule["apiGroups"] for r in rule["resources"]
    }
    assert watched == {kind.grant for kind in KINDS}
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in role["rules"][:-1])
    assert role["rules"][-1] == {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}
    told = [one for one in render() if one["kind"].endswith("Role") and not events(one)]
    assert told == [role]


# --- clean-up, and helm test -----------------------------------------------------------------------------------------


def test_clean_up_needs_nothing_that_is_deleted_before() -> None:
    """Its objects come in an order in which each finds what it needs, and go when all is done."""
    objects = render(EVERYTHING)
    hooks = [one for one in objects if events(one) == {"post-delete"}]
    hooks.sort(key=lambda one: int(one["metadata"]["annotations"]["helm.sh/hook-weight"]))
    assert [one["kind"] for one in hooks] == ["ServiceAccount", "Role", "RoleBinding", "DaemonSet", "Job"]
    account, role, binding, daemonset, job = hooks
    for one in hooks:
        assert one["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    wait = container(job)
    found = options(wait["args"])
    assert (found["namespace"], found["daemonset"]) == ("kube-system", daemonset["metadata"]["name"])
    assert found["timeout"] == 60 < job["spec"]["activeDeadlineSeconds"]
    (failure,) = job["spec"]["podFailurePolicy"]["rules"]
    assert failure["onExitCodes"] == {"containerName": wait["name"], "operator": "In", "values": [FINDINGS]}
    assert role["rules"][0] == {
        "apiGroups": ["apps"],
        "resources": ["daemonsets"],
        "resourceNames": [daemonset["metadata"]["name"]],
        "verbs": ["get"],
    }
    assert role["rules"][1] == {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["hostNetwork"] is True
    spec = daemonset["spec"]["template"]["spec"]
    assert "serviceAccountName" not in spec
    for each in spec["initContainers"]:
        found = options(each["args"])
        assert (found["backend"], found["patience"]) == ("nft", 60)
    assert render({"cleanup": {"enabled": False}}) == [one for one in render() if events(one) != {"post-delete"}]


def test_selectors_select_their_own_pods_only() -> None:
    """The agents', the clean-up's and those of helm test are of one release."""
    objects = render(EVERYTHING)
    pods = {
        f"{one['kind']} {one['metadata']['name']}": one["spec"]["template"]["metadata"]["labels"]
        for one in objects
        if "template" in one.get("spec", {})
    }
    for one in objects:
        if one["kind"] in ("DaemonSet", "Deployment"):
            wanted = one["spec"]["selector"]["matchLabels"].items()
            told = [name for name, labels in pods.items() if wanted <= labels.items()]
            assert told == [f"{one['kind']} {one['metadata']['name']}"]
    agents = pods["DaemonSet netpol-agent"].items()
    assert find(objects, "Service", "netpol-agent-metrics")["spec"]["selector"].items() <= agents
    assert find(objects, "PodMonitor", "netpol-agent")["spec"]["selector"]["matchLabels"].items() <= agents
    service = find(objects, "Service", "netpol-agent-metrics")["metadata"]["labels"].items()
    assert find(objects, "ServiceMonitor", "netpol-agent")["spec"]["selector"]["matchLabels"].items() <= service


def test_clients_of_helm_test_find_the_service() -> None:
    """Its address comes in a variable that is named after it."""
    objects = render({}, release="my.release")
    name = find(objects, "Service", "my-release-netpol-agent-test")["metadata"]["name"]
    for role in ("allowed", "denied"):
        pod = find(objects, "Pod", f"my-release-netpol-agent-test-{role}")
        (variable,) = pod["spec"]["containers"][0]["env"]
        assert variable == {"name": "SERVICE", "value": f"$({name.upper().replace('-', '_')}_SERVICE_HOST)"}
    hooks = [one for one in objects if events(one) == {"test"}]
    hooks.sort(key=lambda one: int(one["metadata"]["annotations"]["helm.sh/hook-weight"]))
    assert [one["kind"] for one in hooks] == ["ConfigMap", "NetworkPolicy", "Service", "Deployment", "Pod", "Pod"]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, told",
    [
        ({"agnet": {}}, "agnet"),
        ({"image": {"digets": "x"}}, "digets"),
        ({"image": {"repository": ""}}, "/image/repository"),
        ({"image": {"pullPolicy": "always"}}, "/image/pullPolicy"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"agent": {"backend": "iptables"}}, "/agent/backend"),
        ({"agent": {"resync": 0}}, "/agent/resync"),
        ({"agent": {"logLevel": "debug"}}, "/agent/logLevel"),
        ({"agent": {"extraArgs": ["cleanup-on-exit"]}}, "/agent/extraArgs/0"),
        ({"metrics": {"port": "10092"}}, "/metrics/port"),
        ({"metrics": {"podMonitor": {"interval": 30}}}, "/metrics/podMonitor/interval"),
        ({"metrics": {"enabled": False, "podMonitor": {"enabled": True}}}, "metrics.podMonitor"),
        ({"resources": {"limit": {}}}, "limit"),
        ({"resources": {"limits": {"memory": "512MB"}}}, "/resources/limits/memory"),
        ({"tolerations": [{"operator": "exists"}]}, "/tolerations/0/operator"),
        ({"podAnnotations": {"a": 1}}, "/podAnnotations/a"),
        ({"updateStrategy": {"rollingUpdate": {"maxSurge": "ten"}}}, "/updateStrategy/rollingUpdate/maxSurge"),
        ({"apiServer": {"host": "https://192.0.2.1"}}, "/apiServer/host"),
        ({"apiServer": {"host": "192.0.2.1"}}, "apiServer: host and port, both or none"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
        ({"prometheusRule": {"enabled": True, "disabled": ["NetpolAgentNone"]}}, "NetpolAgentNone"),
        ({"cleanup": {"timeout": "5m"}}, "/cleanup/timeout"),
        ({"fullnameOverride": "Netpol_Agent"}, "/fullnameOverride"),
    ],
)
def test_wrong_values_are_refused_by_name(values: Object, told: str) -> None:
    done = helm("template", "x", str(CHART), values=values)
    assert done.returncode != 0
    assert told in done.stderr


def test_values_and_their_schema_have_the_same_names() -> None:
    """What the schema knows stands in values.yaml, to be read there; the other way round Helm itself sees to it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def unsaid(part: Object, held: Object, path: str) -> list[str]:
        found = []
        for name, one in part.get("properties", {}).items():
            inner = one if "$ref" not in one else schema["definitions"][one["$ref"].rpartition("/")[2]]
            if name not in held:
                found.append(f"{path}{name}")
            elif isinstance(held[name], dict):
                found += unsaid(inner, held[name], f"{path}{name}.")
        return found

    assert unsaid(schema, values, "") == ["global", "affinity.podAffinity", "affinity.podAntiAffinity"]
    assert helm("template", "x", str(CHART), values=values).returncode == 0


def test_notes_say_how_to_see_that_it_works(tmp_path: Path) -> None:
    """`helm template` leaves them out, so a copy of the chart has them in an object."""
    shutil.copytree(CHART, tmp_path / "chart")
    (tmp_path / "chart/templates/NOTES.txt").rename(tmp_path / "chart/notes")
    (tmp_path / "chart/templates/notes.yaml").write_text('notes: |\n{{ tpl (.Files.Get "notes") . | indent 2 }}\n')
    words = ("template", "my", str(tmp_path / "chart"), "--namespace", "net", "--show-only", "templates/notes.yaml")
    notes = yaml.safe_load(helm(*words).stdout)["notes"]
    for told in (
        "kubectl -n net rollout status daemonset/my-netpol-agent",
        "helm -n net test my",
        "exec daemonset/my-netpol-agent -- netpol-agent status",
        "http://NODE:10092/metrics",
        "One node has one policy engine",
        "`helm uninstall` takes every rule and set of ours away",
    ):
        assert told in notes
    assert "stay in force" in helm(*words, values={"cleanup": {"enabled": False}}).stdout
