"""In the place of Prometheus's Kubernetes discovery, which Debian's build lacks: what it tells of pods, as a file of
targets. So the relabelling of files/scrape.yaml is done by a real Prometheus.

As a program, for a container beside Prometheus (standard library only): `discovery.py SELECTOR FILE` asks the API
server each second, with the service account of its pod.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def jobs(scrape: list[dict[str, Any]], file: str) -> list[dict[str, Any]]:
    """The jobs of files/scrape.yaml, with targets from a file of `targets`."""
    out = []
    for job in scrape:
        assert [one["role"] for one in job["kubernetes_sd_configs"]] == ["pod"]
        rest = {key: value for key, value in job.items() if key != "kubernetes_sd_configs"}
        out.append({**rest, "file_sd_configs": [{"files": [file], "refresh_interval": "1s"}]})
    return out


def selector(job: dict[str, Any]) -> str:
    """Which pods a job asks for."""
    ((config,),) = (one["selectors"] for one in job["kubernetes_sd_configs"])
    assert config["role"] == "pod"
    return str(config["label"])


def selected(pods: list[dict[str, Any]], label_selector: str) -> list[dict[str, Any]]:
    """As the API server does: those with all labels of `a=b,c=d`."""
    wanted = {tuple(one.split("=")) for one in label_selector.split(",")}
    return [pod for pod in pods if wanted <= set(pod["metadata"].get("labels", {}).items())]


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each declared port, and one without a port for each container that declares none."""
    out = []
    for pod in pods:
        meta, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
        address = status.get("podIP")
        if not address:
            continue
        labels = {
            "namespace": meta["namespace"],
            "pod_name": meta["name"],
            "pod_ip": address,
            "pod_host_ip": status.get("hostIP", ""),
            "pod_node_name": spec.get("nodeName", ""),
            "pod_phase": status.get("phase", ""),
            "pod_uid": meta.get("uid", ""),
        }
        for kind in ("label", "annotation"):
            for key, value in (meta.get(f"{kind}s") or {}).items():
                name = re.sub(r"\W", "_", key)
                labels |= {f"pod_{kind}_{name}": value, f"pod_{kind}present_{name}": "true"}
        for init, held in (("false", "containers"), ("true", "initContainers")):
            for container in spec.get(held, ()):
                of = {"pod_container_name": container["name"], "pod_container_init": init}
                for port in container.get("ports") or [None]:
                    where = f"[{address}]" if port and ":" in address else address
                    at = f"{where}:{port['containerPort']}" if port else address
                    named = {f"__meta_kubernetes_{key}": value for key, value in {**labels, **of}.items()}
                    out.append({"targets": [at], "labels": named})
    return out


def main(label_selector: str, file: str) -> None:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    url = f"https://{host}:{port}/api/v1/pods?labelSelector={urllib.parse.quote(label_selector)}"
    trust = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    while True:
        try:
            with open(f"{ACCOUNT}/token") as token:
                asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token.read()}"})
            with urllib.request.urlopen(asked, timeout=5, context=trust) as answer:
                found = targets(json.load(answer)["items"])
            with open(f"{file}.new", "w") as made:
                json.dump(found, made)
            os.replace(f"{file}.new", file)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
