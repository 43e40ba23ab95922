"""`wait-clean`: what it says while nodes become clean, and of those that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell import Done, run
from tests.kube.wire import Listener, Wire, kubeconfig

Answers = list[tuple[int, Any]]


class Api(Listener):
    """Answers to a path are given in their order, the last one again and again."""

    def __init__(self, **answers: Answers) -> None:
        self.answers = answers
        self.asked: list[str] = []
        super().__init__()

    def serve(self, wire: Wire) -> None:
        while True:
            request = wire.request()
            self.asked.append(request.target)
            waiting = self.answers["daemonset" if "/daemonsets/" in request.path else "pods"]
            status, body = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            wire.head(status, {"Content-Length": str(len(data))})
            wire.send(data)


def daemonset(desired: int, *, observed: int = 1) -> tuple[int, Any]:
    return 200, {
        "metadata": {"name": "clean", "generation": 1, "uid": "ignored"},
        "spec": {"selector": {"matchLabels": {"b": "2", "a": "1"}}, "template": {}},
        "status": {"observedGeneration": observed, "desiredNumberScheduled": desired, "numberReady": 0},
    }


def pods(**nodes: Any) -> tuple[int, Any]:
    """True for a node whose pod is ready, else the state of its init container, or the words of a condition."""
    return 200, {"items": [_pod(node, state) for node, state in nodes.items()]}


def _pod(node: str, state: Any) -> Any:
    status: dict[str, Any] = {"conditions": [{"type": "Ready", "status": "True" if state is True else "False"}]}
    if isinstance(state, str):
        status["conditions"].append({"type": "PodScheduled", "status": "False", "message": state})
    elif state is not True:
        status["initContainerStatuses"] = [{"name": "clean", "ready": False, **state}]
        status["containerStatuses"] = [
            {"name": "cleaned", "ready": False, "state": {"waiting": {"reason": "PodInitializing"}}}
        ]
    return {"metadata": {"name": f"clean-{node}"}, "spec": {"nodeName": node}, "status": status}


@contextmanager
def asking(tmp_path: Path, *options: str, **answers: Answers) -> Iterator[tuple[Done, Api]]:
    path = tmp_path / "kubeconfig"
    with Api(**answers) as api:
        path.write_text(kubeconfig(api.url))
        yield run("wait-clean", "clean", "-n", "there", "--kubeconfig", path, *options), api


def test_it_waits_for_all_nodes(tmp_path: Path) -> None:
    working = {"state": {"running": {}}}
    with asking(
        tmp_path,
        daemonset=[daemonset(0, observed=0), daemonset(2)],
        pods=[pods(), pods(one=working, two=working), pods(one=True, two=working), pods(one=True, two=True)],
    ) as (done, api):
        assert done == Done(0, "one is clean\ntwo is clean\nclean: 2 nodes\n", "")
        assert api.asked[0] == "/apis/apps/v1/namespaces/there/daemonsets/clean"
        assert api.asked[1] == "/api/v1/namespaces/there/pods?labelSelector=a%3D1%2Cb%3D2"


def test_a_cluster_without_nodes_is_clean(tmp_path: Path) -> None:
    with asking(tmp_path, daemonset=[daemonset(0)], pods=[pods()]) as (done, _):
        assert done == Done(0, "clean: 0 nodes\n", "")


@pytest.mark.parametrize(
    "state, why",
    [
        ({"state": {"running": {}}}, "clean is at work"),
        (
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling"}}},
            "clean: ImagePullBackOff: Back-off pulling",
        ),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}},
                "lastState": {"terminated": {"reason": "Error", "message": "error: the kernel refuses"}},
            },
            "clean: CrashLoopBackOff: back-off 20s: error: the kernel refuses",
        ),
        ("0/2 nodes are available", "0/2 nodes are available"),
    ],
)
def test_it_names_nodes_that_lag(tmp_path: Path, state: Any, why: str) -> None:
    with asking(tmp_path, "--timeout", "0", daemonset=[daemonset(2)], pods=[pods(one=True, two=state)]) as (done, _):
        assert done.code == 1
        assert done.out == "one is clean\n"
        first, second = done.err.splitlines()
        assert first == f"two is not clean: {why}"
        assert second.startswith("error: 1 of 2 nodes are clean after 0 s. ")
        assert "kubectl apply -f deploy/netpol-agent-clean.yaml" in second


def test_it_goes_on_when_the_api_server_comes_back(tmp_path: Path) -> None:
    down = (503, {"message": "not now"})
    with asking(tmp_path, daemonset=[down, (200, b"{"), daemonset(1)], pods=[down, pods(one=True)]) as (done, _):
        assert done == Done(0, "one is clean\nclean: 1 node\n", "")


@pytest.mark.parametrize("status", [403, 404])
def test_what_will_not_change_is_said_at_once(tmp_path: Path, status: int) -> None:
    with asking(tmp_path, daemonset=[(status, {"message": "daemonsets: no"})], pods=[pods()]) as (done, _):
        assert (done.code, done.out) == (3, "")
        assert done.err == f"error: daemonsets: no (HTTP {status})\n"
