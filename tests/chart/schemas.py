"""Are objects what the Kubernetes API takes: every field known, of its type, none missing?

`schemas.json` has the schemas of the kinds that the chart makes, without their descriptions: of Kubernetes out of the
OpenAPI document in its Go module, of the Prometheus operator out of the CRDs in its. `python -m tests.chart.schemas`
writes it anew; that needs Go, the tests do not.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("schemas.json")
KUBERNETES = "k8s.io/kubernetes@v1.34.3"
OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
KINDS = (
    "v1 ConfigMap",
    "v1 Pod",
    "v1 Service",
    "v1 ServiceAccount",
    "apps/v1 DaemonSet",
    "apps/v1 Deployment",
    "batch/v1 Job",
    "networking.k8s.io/v1 NetworkPolicy",
    "rbac.authorization.k8s.io/v1 ClusterRole",
    "rbac.authorization.k8s.io/v1 ClusterRoleBinding",
    "rbac.authorization.k8s.io/v1 Role",
    "rbac.authorization.k8s.io/v1 RoleBinding",
)
RESOURCES = ("podmonitors", "prometheusrules", "servicemonitors")
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool}


def faults(one: Any) -> list[str]:
    """What the API server would refuse about an object, with the path of each field."""
    schemas = json.loads(FILE.read_text())
    kind = f"{one.get('apiVersion')} {one.get('kind')}"
    if kind not in schemas["kinds"]:
        return [f"no kind {kind} is known"]
    return [
        f"{kind} {one['metadata'].get('name')}: {fault}" for fault in _faults(one, schemas["kinds"][kind], "", schemas)
    ]


def _faults(value: Any, schema: Any, path: str, schemas: Any) -> Iterator[str]:
    if "$ref" in schema:
        schema = schemas["definitions"][schema["$ref"]]
    wanted = schema.get("type")
    types = wanted if isinstance(wanted, list) else [wanted] * (wanted is not None)
    if types and not any(_is(value, one) for one in types):
        yield f"{path}: is {value!r}, no {' or '.join(types)}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: is {value!r}, none of {schema['enum']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    size = len(value) if isinstance(value, str | list) else value if isinstance(value, int | float) else None
    if size is not None:
        for key in ("minimum", "minLength", "minItems"):
            if size < schema.get(key, size):
                yield f"{path}: {value!r} is below {key} {schema[key]}"
        for key in ("maximum", "maxLength", "maxItems"):
            if size > schema.get(key, size):
                yield f"{path}: {value!r} is above {key} {schema[key]}"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _faults(item, schema.get("items", {}), f"{path}[{number}]", schemas)
    if isinstance(value, dict):
        yield from (f"{path}.{key}: is missing" for key in schema.get("required", ()) if key not in value)
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, item in value.items():
            if key in known or isinstance(others, dict):
                yield from _faults(item, known.get(key, others), f"{path}.{key}", schemas)
            else:
                yield f"{path}.{key}: is not known"


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind])


# --- out of the Go modules -------------------------------------------------------------------------------------------


def _module(name: str) -> Path:
    done = subprocess.run(["go", "mod", "download", "-json", name], capture_output=True, check=True, cwd="/")
    return Path(json.loads(done.stdout)["Dir"])


def _trimmed(schema: Any) -> Any:
    """Only what is checked. Fields that a schema does not name are refused, where it names any."""
    if "$ref" in schema:
        return {"$ref": schema["$ref"].rpartition("/")[2]}
    out = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["string", "integer"]
    if "items" in schema:
        out["items"] = _trimmed(schema["items"])
    if "properties" in schema:
        out["properties"] = {key: _trimmed(one) for key, one in schema["properties"].items()}
        out["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        if out["additionalProperties"]:
            del out["additionalProperties"]
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = _trimmed(schema["additionalProperties"])
    return out


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for one in schema.values():
            yield from _references(one)


def make() -> None:
    """Write the file."""
    document = json.loads((_module(KUBERNETES) / "api/openapi-spec/swagger.json").read_text())["definitions"]
    kinds: dict[str, Any] = {}
    for name, one in document.items():
        for gvk in one.get("x-kubernetes-group-version-kind", ()):
            kind = f"{gvk['group']}/{gvk['version']} {gvk['kind']}".removeprefix("/")
            if kind in KINDS:
                kinds[kind] = {"$ref": name}
    folder = _module(OPERATOR) / "example/prometheus-operator-crd"
    for resource in RESOURCES:
        crd = yaml.safe_load((folder / f"monitoring.coreos.com_{resource}.yaml").read_text())["spec"]
        for version in crd["versions"]:
            schema = _trimmed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"$ref": META}
            kinds[f"{crd['group']}/{version['name']} {crd['names']['kind']}"] = schema
    definitions: dict[str, Any] = {}
    waiting = [META, *(name for schema in kinds.values() for name in _references(schema))]
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            definitions[name] = _trimmed(document[name])
            waiting += _references(definitions[name])
    definitions[QUANTITY]["type"] = ["string", "number"]
    lines = []
    for part, named in (("kinds", kinds), ("definitions", definitions)):
        entries = [f"{json.dumps(n)}:{json.dumps(one, separators=(',', ':'))}" for n, one in sorted(named.items())]
        lines.append(f'"{part}":{{\n' + ",\n".join(entries) + "\n}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    make()
