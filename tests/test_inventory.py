"""Files into objects: what kubectl prints, what people write, and what is wrong with it, by file, line and field."""

from __future__ import annotations

import json

import pytest

from agent.core.findings import BadInput
from agent.core.inventory import Inventory
from agent.core.policy import PodPeer, PortName, PortRange


def read(text: str | bytes, file: str = "a.yaml", namespace: str = "default") -> Inventory:
    inventory = Inventory(namespace)
    inventory.read(text.encode() if isinstance(text, str) else text, file)
    inventory.finish()
    return inventory


def bad(text: str | bytes, file: str = "a.yaml") -> list[str]:
    with pytest.raises(BadInput) as raised:
        read(text, file)
    return [str(finding) for finding in raised.value.findings]


def netpol(spec: str, name: str = "p") -> str:
    indented = "".join(f"  {line}\n" for line in spec.splitlines())
    return f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n{indented}"


POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a"},
    "status": {"podIP": "10.0.0.1", "phase": "Running"},
}


def test_documents_lists_and_json_are_the_same() -> None:
    pods = [dict(POD, metadata={"name": name}) for name in "ab"]
    as_list = json.dumps({"apiVersion": "v1", "kind": "List", "items": pods})
    typed = json.dumps(
        {"apiVersion": "v1", "kind": "PodList", "items": [{k: p[k] for k in ("metadata", "status")} for p in pods]}
    )
    stream = "\n".join(json.dumps(p) for p in pods)
    yaml = "---\n".join(json.dumps(p) + "\n" for p in pods)
    for text in (as_list, typed, stream, yaml):
        assert list(read(text).pods) == ["default/a", "default/b"]


def test_empty_documents_and_other_kinds_are_passed_over() -> None:
    text = "# nothing\n---\n---\nnull\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {a: b}}\n"
    inventory = read(text)
    assert not inventory.pods
    assert not inventory.findings


def test_namespaces_are_filled_in_and_assumed() -> None:
    inventory = read(json.dumps(POD), namespace="shop")
    assert list(inventory.pods) == ["shop/a"]
    assert inventory.namespaces["shop"].labels == {"kubernetes.io/metadata.name": "shop"}
    assert [f.id for f in inventory.findings] == ["namespace-assumed"]


def test_the_name_label_replaces_any_other() -> None:
    labels = "{kubernetes.io/metadata.name: other, a: b}"
    inventory = read(f"{{apiVersion: v1, kind: Namespace, metadata: {{name: x, labels: {labels}}}}}")
    assert inventory.namespaces["x"].labels == {"kubernetes.io/metadata.name": "x", "a": "b"}


def test_the_last_of_two_counts_and_is_told() -> None:
    inventory = read(netpol("podSelector: {}") + "---\n" + netpol("podSelector: {matchLabels: {a: b}}"))
    assert inventory.policies["default/p"].selector.matches({"a": "b"})
    assert not inventory.policies["default/p"].selector.matches({})
    assert "duplicate-object" in [f.id for f in inventory.findings]


@pytest.mark.parametrize(
    "spec, line, field",
    [
        ("ingress:\n- ports:\n  - port: 80.5", 7, "spec.ingress[0].ports[0].port"),
        ("podSelector:\n  matchLabels:\n    a: 1", 7, "spec.podSelector.matchLabels.a"),
        ("podSelector:\n  matchLabels:\n    a: yes", 7, "spec.podSelector.matchLabels.a"),
        ("ingress:\n- from:\n  -\n  - podSelector: {}", 7, "spec.ingress[0].from[0]"),
        ("ingress: {}", 5, "spec.ingress"),
        ("ingress:\n-", 6, "spec.ingress[0]"),
        ("policyTypes: Ingress", 5, "spec.policyTypes"),
        ("ingress:\n- ports:\n  - {port: 80, endPort: '90'}", 7, "spec.ingress[0].ports[0].endPort"),
    ],
)
def test_what_cannot_be_decoded_names_file_line_and_field(spec: str, line: int, field: str) -> None:
    (message,) = bad(netpol(spec))
    assert message.startswith(f"a.yaml:{line}: NetworkPolicy default/p: {field}: ")


def test_all_bad_input_is_told_at_once() -> None:
    assert len(bad(netpol("ingress: {}") + "---\n" + netpol("egress: 5", "q"))) == 2


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: [", "a.yaml:"),
        ("a: 1\na: 2\n", "a.yaml:2"),
        ("- 1\n- 2\n", "must be a Kubernetes object"),
        ("{apiVersion: v1, metadata: {name: a}}", "kind: is missing"),
        ("{apiVersion: v1, kind: Pod, metadata: {}}", "metadata.name"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {b: 1}}}", "metadata.labels"),
        ("{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: a}}", "networking.k8s.io/v1"),
        ("{kind: NetworkPolicy, metadata: {name: a}}", "networking.k8s.io/v1"),
        ("a: &a [*a]\n", "alias"),
        (b"a: \xff\xfe", "cannot be read"),
        ("{" * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_broken_input_is_one_clear_error(text: str | bytes, part: str) -> None:
    assert part in bad(text)[0]


def test_yaml_is_read_as_kubectl_reads_it() -> None:
    spec = "ingress:\n- ports:\n  - {port: 0x50}\n  - {port: 8_0}\n  - {port: 010}\n  - {port: web}\n  - {port: 80.0}"
    (rule,) = read(netpol(spec)).policies["default/p"].ingress or ()
    numbers = [p.low if isinstance(p, PortRange) else p.name for p in rule.ports or ()]
    assert numbers == [80, 80, 8, "web", 80]
    labels = "{a: 1:30, b: 2024-01-02, c: 'yes', d: !!str 80, e: 1.2.3, f: ~}"
    inventory = read(f"{{apiVersion: v1, kind: Pod, metadata: {{name: a, labels: {labels}}}}}")
    assert dict(inventory.pods["default/a"].labels) == {
        "a": "1:30", "b": "2024-01-02", "c": "yes", "d": "80", "e": "1.2.3", "f": "",
    }  # fmt: skip


def test_anchors_and_merges() -> None:
    text = netpol(
        "podSelector: &s {matchLabels: &l {a: b}}\ningress:\n- from:\n  - podSelector: {matchLabels: {<<: *l, c: d}}"
    )
    policy = read(text).policies["default/p"]
    ((peer,),) = [rule.peers for rule in policy.ingress or () if rule.peers]
    assert isinstance(peer, PodPeer)
    assert peer.pods.matches({"a": "b", "c": "d"})
    assert not peer.pods.matches({"c": "d"})


def test_faults_have_ids_fields_and_lines() -> None:
    spec = 'ingress:\n- from:\n  - {}\n- ports:\n  - port: "80"\n  - {port: http, protocol: tcp}\negress:\n- form: []'
    inventory = read(netpol(spec))
    assert [(f.id, f.field, f.source) for f in inventory.findings if f.object.startswith("NetworkPolicy")] == [
        ("peer-empty", "spec.ingress[0].from[0]", "a.yaml:7"),
        ("port-name-invalid", "spec.ingress[1].ports[0].port", "a.yaml:9"),
        ("protocol-unknown", "spec.ingress[1].ports[1].protocol", "a.yaml:10"),
        ("field-unknown", "spec.egress[0].form", "a.yaml:12"),
    ]
    policy = inventory.policies["default/p"]
    assert [rule.peers for rule in policy.ingress or ()] == [(), ()]
    assert [rule.peers for rule in policy.egress or ()] == [()]


def test_where_of_a_field_is_that_of_its_holder() -> None:
    policy = read(netpol("ingress:\n- from:\n  - podSelector: {}")).policies["default/p"]
    assert policy.where("spec.ingress[0].from[0]") == "a.yaml:7"
    assert policy.where("spec.ingress[0].ports[3]") == "a.yaml:6"


@pytest.mark.parametrize(
    "kind, spec, names",
    [
        ("Deployment", {"replicas": 2}, ["w-0", "w-1"]),
        ("StatefulSet", {}, ["w-0"]),
        ("DaemonSet", {}, ["w-0"]),
        ("Deployment", {"replicas": 0}, []),
        ("Job", {}, ["w-0"]),
    ],
)
def test_workloads_give_the_pods_they_would_create(kind: str, spec: dict[str, object], names: list[str]) -> None:
    template = {
        "metadata": {"labels": {"app": "w"}},
        "spec": {"containers": [{"ports": [{"name": "h", "containerPort": 80}]}]},
    }
    manifest = {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": "w"},
        "spec": {**spec, "template": template},
    }
    (workload,) = read(json.dumps(manifest)).workloads.values()
    pods = [workload.pod(number) for number in range(workload.replicas)]
    assert [pod.name for pod in pods] == names
    assert all(pod.labels == {"app": "w"} and pod.ports[0].number == 80 for pod in pods)


def test_a_cron_job_has_its_template_deeper() -> None:
    pod = {"metadata": {"labels": {"app": "c"}}, "spec": {"containers": []}}
    spec = {"jobTemplate": {"spec": {"template": pod}}}
    (workload,) = read(
        json.dumps({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "c"}, "spec": spec})
    ).workloads.values()
    assert workload.template.labels == {"app": "c"}


def test_the_addresses_of_a_pod() -> None:
    def addresses(**status: object) -> list[bytes]:
        return list(read(json.dumps({**POD, "status": {"phase": "Running", **status}})).pods["default/a"].addresses)

    assert addresses(podIP="10.0.0.1") == [b"\x0a\0\0\x01"]
    assert addresses(podIP="10.0.0.1", podIPs=[{"ip": "10.0.0.1"}, {"ip": "fd00::1"}])[0] == b"\x0a\0\0\x01"
    assert addresses(podIP="10.0.0.2", podIPs=[{"ip": "10.0.0.1"}]) == [b"\x0a\0\0\x02"]
    assert addresses(podIPs=[{"ip": "10.0.0.1"}]) == [b"\x0a\0\0\x01"]
    assert addresses() == []


def test_named_ports_come_from_containers_and_sidecars() -> None:
    spec = """
    containers: [{ports: [{name: a, containerPort: 1}]}, {ports: [{name: a, containerPort: 2, protocol: UDP}]}]
    initContainers:
    - {ports: [{name: b, containerPort: 3}]}
    - {restartPolicy: Always, ports: [{name: c, containerPort: 4}]}
"""
    pod = read(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec:{spec}").pods["default/a"]
    assert [(p.name, p.protocol, p.number) for p in pod.ports] == [("a", "TCP", 1), ("a", "UDP", 2), ("c", "TCP", 4)]


def test_named_ports_of_policies_are_kept_by_name() -> None:
    (rule,) = read(netpol("ingress:\n- ports: [{port: http}]")).policies["default/p"].ingress or ()
    assert rule.ports == (PortName("TCP", "http"),)


def test_a_label_key_with_a_bracket_is_a_fault_and_no_riddle() -> None:
    """Paths of fields are cut from their end; whatever a key holds, that ends."""
    for text in (netpol("podSelector: {matchLabels: {'a[b': x, 'c]d': y}}"), json.dumps(BRACKETS)):
        assert "label-key-invalid" in [finding.id for finding in read(text).findings]


BRACKETS = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "p"},
    "spec": {"podSelector": {"matchLabels": {"a[b": "x", "].[": "y"}}},
}


@pytest.mark.parametrize("number", (0, -1, 65536, 70000, 10**18))
def test_a_port_that_is_none_is_passed_over_and_told(number: int) -> None:
    ports = [{"name": "web", "containerPort": number}, {"name": "web", "containerPort": 80}]
    inventory = read(json.dumps({**POD, "spec": {"containers": [{"ports": ports}]}}))
    assert [p.number for p in inventory.pods["default/a"].ports] == [80]
    assert "container-port-unreadable" in [finding.id for finding in inventory.findings]


@pytest.mark.parametrize(
    "address", ("0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "ff02::1", "1.2.3", "fe80::1%e", "0.1.2.3")
)
def test_an_address_that_no_pod_has_is_passed_over_and_told(address: str) -> None:
    status = {"phase": "Running", "podIPs": [{"ip": address}, {"ip": "10.0.0.1"}]}
    inventory = read(json.dumps({**POD, "status": status}))
    assert inventory.pods["default/a"].addresses == (b"\x0a\0\0\x01",)
    assert "address-unreadable" in [finding.id for finding in inventory.findings]


def test_pod_ips_are_compared_as_addresses() -> None:
    status = {"phase": "Running", "podIP": "FD00::1", "podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]}
    assert len(read(json.dumps({**POD, "status": status})).pods["default/a"].addresses) == 2


def test_items_of_a_typed_list_have_its_version() -> None:
    items = [{"metadata": {"name": "p"}, "spec": {}}]
    manifest = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicyList", "items": items}
    assert list(read(json.dumps(manifest)).policies) == ["default/p"]
    assert "networking.k8s.io/v1" in bad(json.dumps({**manifest, "apiVersion": "extensions/v1beta1"}))[0]


def test_json_has_lines_too() -> None:
    text = '{"apiVersion": "v1",\n\t"kind": "Pod",\n\t"metadata": {"name": "a",\n\t\t"labels": {"b": 1}}}'
    assert bad(text)[0].startswith("a.yaml:4: Pod default/a: metadata.labels")
    assert bad(json.dumps(POD) + "\n" + text)[0].startswith("a.yaml:5: Pod default/a: metadata.labels")


def test_lists_in_lists_end() -> None:
    value: object = POD
    for _ in range(50):
        value = {"apiVersion": "v1", "kind": "List", "items": [value]}
    assert "nested too deeply" in bad(json.dumps(value))[0]


def test_what_a_workload_owns_creates_no_pods_of_its_own() -> None:
    meta = {"name": "w-5c", "ownerReferences": [{"kind": "Deployment", "name": "w"}]}
    assert not read(json.dumps({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": meta})).workloads
