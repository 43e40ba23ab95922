"""What the verbs read, and how they refuse: exit 2, with file, line and field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from agent.cli.output import Rendered
from tests.cli.shell import KUBECTL, REPOSITORY_OF_MANIFESTS, Done, run

POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: x}
spec:
  podSelector: {}
"""


def rendered(*arguments: object, text: str = "") -> str:
    done = run("render", "--node", "node1", *arguments, text=text)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def refused(*arguments: object, text: str = "") -> Done:
    """A verb that must not have printed a result, nor a traceback."""
    done = run("render", "--node", "node1", *arguments, text=text)
    assert done.code == 2, done
    assert done.out == ""
    assert "Traceback" not in done.err
    return done


class TestForms:
    """One input in all its forms renders the same."""

    def test_what_kubectl_prints(self, tmp_path: Path) -> None:
        from_yaml = rendered("-f", KUBECTL)
        assert "default/web egress[0]" in from_yaml
        assert "10.244.1.5" in from_yaml
        assert "10.244.1.4" not in from_yaml, "a finished pod is nobody"
        assert "172.18.0.2" not in from_yaml, "a hostNetwork pod is no peer"
        as_json = tmp_path / "kubectl.json"
        as_json.write_text(json.dumps(yaml.safe_load(KUBECTL.read_text()), indent=4))
        assert rendered("-f", as_json) == from_yaml
        assert rendered("-f", "-", text=KUBECTL.read_text()) == from_yaml
        assert rendered("-f", "-", text=as_json.read_text()) == from_yaml

    def test_documents_files_and_directories(self, tmp_path: Path) -> None:
        items = yaml.safe_load(KUBECTL.read_text())["items"]
        expected = rendered("-f", KUBECTL)
        assert rendered("-f", "-", text=yaml.safe_dump_all(items)) == expected
        (tmp_path / "deep").mkdir()
        (tmp_path / "README.md").write_text("not a manifest")
        for number, item in enumerate(items):
            name = tmp_path / ("deep" if number % 2 else ".") / f"{number}.{('yaml', 'yml', 'json')[number % 3]}"
            name.write_text(json.dumps(item) if name.suffix == ".json" else yaml.safe_dump(item))
        assert rendered("-f", tmp_path) == expected
        first, second = tmp_path / "first.yaml", tmp_path / "second.json"
        first.write_text(yaml.safe_dump_all(items[::2]))
        second.write_text("\n".join(json.dumps(item) for item in items[1::2]))
        assert rendered("-f", first, "-f", second) == expected

    def test_typed_lists(self) -> None:
        """`kubectl get --raw` prints lists whose items have no kind."""
        items = yaml.safe_load(KUBECTL.read_text())["items"]
        lists = [
            {"apiVersion": version, "kind": f"{kind}List", "items": [_bare(i) for i in items if i["kind"] == kind]}
            for kind, version in (("Namespace", "v1"), ("Pod", "v1"), ("NetworkPolicy", "networking.k8s.io/v1"))
        ]
        lists[2]["items"] = [item for item in items if item["kind"] == "NetworkPolicy"]
        text = "\n---\n".join(json.dumps(one) for one in lists)
        assert rendered("-f", "-", text=text) == rendered("-f", KUBECTL)

    def test_json_result(self) -> None:
        done = run("render", "-f", KUBECTL, "--node", "node1", "-o", "json")
        result = done.decoded(Rendered)
        assert result.node == "node1"
        assert result.findings == ()
        text = rendered("-f", KUBECTL)
        assert result.ipset in text
        assert result.iptables in text
        assert result.ip6tables in text

    def test_workloads_and_other_kinds_are_passed_over_without_noise(self) -> None:
        out = rendered("-f", REPOSITORY_OF_MANIFESTS)
        assert not re.search("^(create|add) ", out, re.MULTILINE)

    def test_hand_written_manifests_get_the_servers_defaults(self) -> None:
        pod = "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {nodeName: node1}, status: {podIP: 10.0.0.1}}"
        done = run(
            "render",
            "-f",
            "-",
            "--node",
            "node1",
            "-n",
            "x",
            text=f"{pod}\n---\n{POLICY}  ingress: [{{ports: [{{port: 80}}]}}]\n",
        )
        assert done.code == 0
        assert "x/a" in done.out
        assert "-p tcp -m tcp --dport 80" in done.out
        assert "Namespace x: is in no file; it is assumed" in done.err


def _bare(item: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in item.items() if key not in ("kind", "apiVersion")}


BAD = {
    "float": (POLICY + "  ingress:\n  - ports:\n    - port: 80.5\n", 8, "spec.ingress[0].ports[0].port"),
    "label": (
        POLICY + "  egress:\n  - to:\n    - podSelector:\n        matchLabels: {a: 1}\n",
        9,
        "spec.egress[0].to[0].podSelector.matchLabels.a",
    ),
    "null-peer": (POLICY + "  ingress:\n  - from:\n    - null\n", 8, "spec.ingress[0].from[0]"),
    "null-port": (POLICY + "  ingress:\n  - ports:\n    -\n", 8, "spec.ingress[0].ports[0]"),
    "null-rule": (POLICY + "  ingress:\n  -\n", 7, "spec.ingress[0]"),
    "null-type": (POLICY + "  policyTypes:\n  - Ingress\n  - null\n", 8, "spec.policyTypes[1]"),
    "rules-no-list": (POLICY + "  ingress: {}\n", 6, "spec.ingress"),
    "api-version": (POLICY.replace("networking.k8s.io/v1", "extensions/v1beta1"), 1, "apiVersion"),
    "no-api-version": (POLICY.partition("\n")[2], 1, "apiVersion"),
    "no-name": ("kind: Pod\napiVersion: v1\nmetadata: {labels: {a: b}}\n", 3, "metadata.name"),
    "no-kind": ("hello: world\n", 1, "kind"),
    "no-object": ("- a\n- b\n", 1, "must be a Kubernetes object"),
    "items-no-list": ("kind: List\napiVersion: v1\nitems: {}\n", 1, "items"),
    "pod-port": (
        "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec:\n  containers:\n  - ports:\n    - containerPort: '80'\n",
        7,
        "spec.containers[0].ports[0].containerPort",
    ),
    "pod-null-container": (
        "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [null]}\n",
        4,
        "spec.containers[0]",
    ),
    "second-document": ("kind: Namespace\napiVersion: v1\nmetadata: {name: a}\n---\n- a\n", 5, "object"),
    "in-a-list": ("kind: List\nitems:\n- kind: Pod\n  metadata:\n    name: 7\n", 5, "metadata.name"),
    "key-twice": ("kind: Pod\napiVersion: v1\nmetadata: {name: a}\nkind: Namespace\n", 4, "'kind'"),
    "broken": ("kind: Pod\nmetadata: {name: x\n---\nkind: Pod\n", 3, "cannot be read"),
    "tab": ("kind: Pod\nmetadata:\n\tname: x\n", 3, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_by_file_line_and_field(name: str, tmp_path: Path) -> None:
    text, line, field = BAD[name]
    file = tmp_path / "in.yaml"
    file.write_text(text)
    err = refused("-f", file).err
    assert err.startswith(f"error: {file}:{line}: "), err
    assert field in err


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BAD["float"][0])
    (tmp_path / "b.yaml").write_text(BAD["broken"][0] + BAD["label"][0])
    (tmp_path / "c.yaml").write_text(POLICY + "  ingress: [null, {from: [null]}]\n")
    err = refused("-f", tmp_path, "-f", "-", text=BAD["null-rule"][0]).err
    assert len(err.splitlines()) == 5, err
    for part in ("a.yaml:8", "b.yaml:3", "c.yaml:6", "spec.ingress[1].from[0]", "stdin:7"):
        assert part in err


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "no input: give -f" in refused().err
    assert f"{tmp_path / 'gone.yaml'}: No such file" in refused("-f", tmp_path / "gone.yaml").err
    assert "holds no file that ends in .yaml" in refused("-f", tmp_path).err
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "bytes.yaml" in refused("-f", tmp_path).err


def test_a_faulty_policy_is_told_of_and_rendered(tmp_path: Path) -> None:
    """What the API server would reject but could have stored is no bad input: less is allowed, and it is said."""
    file = tmp_path / "in.yaml"
    file.write_text(POLICY + "  ingress:\n  - ports:\n    - port: 70000\n  - {}\n")
    done = run("render", "-f", file, "--node", "node1", "-o", "json")
    assert done.code == 0
    assert f"{file}:8: NetworkPolicy x/p: spec.ingress[0].ports[0].port" in done.err
    assert "spec.ingress[0].ports[0].port" in [finding.field for finding in done.decoded(Rendered).findings]


def test_the_last_of_two_counts(tmp_path: Path) -> None:
    for name, port in (("a", 1111), ("b", 2222)):
        (tmp_path / f"{name}.yaml").write_text(POLICY + f"  ingress: [{{ports: [{{port: {port}}}]}}]\n")
    (tmp_path / "pod.yaml").write_text(
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x}, spec: {nodeName: node1},"
        " status: {podIP: 10.0.0.1}}"
    )
    done = run("render", "-f", tmp_path, "--node", "node1")
    assert done.code == 0
    assert "2222" in done.out
    assert "1111" not in done.out
    assert "b.yaml:1: NetworkPolicy x/p: stands in " in done.err
