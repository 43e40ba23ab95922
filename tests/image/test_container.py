"""The image at work in containers like the DaemonSet's: both backends, every verb, and the ways to the API server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dataplane.kernel import Kernel, run
from tests.dataplane.scenes import NODE, applied, cluster, desired
from tests.image.built import RECIPE, VERSION, Image
from tests.image.container import Container, Containers, needs_runc
from tests.kube.certificates import Authority
from tests.kube.server import Server

pytestmark = [*needs_runc, pytest.mark.xdist_group("image")]

PYTHON = "/usr/bin/python3"
HEALTH = "127.0.0.1:10093"
DEADLINE = 20.0
"""Seconds that a test waits for what must happen."""
ENOUGH = 1 << 12 | 1 << 13
"""CAP_NET_ADMIN and CAP_NET_RAW, as /proc has them."""


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A small cluster, in a file."""
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": cluster()}))
    return path


def test_surroundings(containers: Containers) -> None:
    """The tests below would tell little if a container had more than it is given."""
    program = """
import errno, json, os, pathlib
def failing(name, *arguments):
    try:
        getattr(os, name)(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
status = dict(line.split(":\t") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "capabilities": int(status["CapBnd"], 16) | int(status["CapEff"], 16), "locked": status["NoNewPrivs"],
    "filtered": status["Seccomp"], "write": [failing("mkdir", f"{at}/x") for at in ("", "/tmp", "/run", "/root")],
    "pid": os.getpid(), "encoding": open(os.devnull).encoding.lower(),
}))
"""
    assert json.loads(containers.run("-c", program, entry=PYTHON)) == {
        "capabilities": ENOUGH,
        "locked": "1",
        "filtered": "2",
        "write": ["EROFS"] * 4,
        "pid": 1,
        "encoding": "utf-8",
    }


def test_tools(containers: Containers) -> None:
    """Are those of the lock, and of both backends."""
    locked = dict(line.split()[:2] for line in (RECIPE / "debian-amd64.lock").read_text().splitlines()[1:])
    program = "import subprocess, sys; [subprocess.run(c.split(), check=True, stderr=1) for c in sys.argv[1:]]"
    version = locked["iptables"].partition("-")[0]
    says = {
        "iptables --version": f"iptables v{version} (nf_tables)",
        "ip6tables-nft-restore --version": f"v{version} (nf_tables)",
        "iptables-legacy --version": f"iptables v{version} (legacy)",
        "ip6tables-legacy-save --version": f"v{version} (legacy)",
        "ipset --version": f"ipset v{locked['ipset'].partition('-')[0]}",
        "conntrack --version": f"conntrack v{locked['conntrack'].partition(':')[2].partition('-')[0]}",
        "conntrack -L": "flow entries have been shown",
    }
    out = containers.run("-c", program, *says, entry=PYTHON)
    for expected in says.values():
        assert expected in out


def test_every_module_can_be_imported(containers: Containers) -> None:
    """Ours, and what is left of `kubernetes`: nothing that is left out is missed."""
    program = """
import importlib, pkgutil, agent, kubernetes.client, kubernetes.config
for package in (agent, kubernetes.client, kubernetes.config):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""
    assert "agent.lab.held" in containers.run("-c", program, entry=PYTHON).split()


def test_help_of_every_verb(containers: Containers) -> None:
    program = """
import subprocess
from agent.cli.main import cli
for verb in cli.commands:
    print(subprocess.run(["netpol-agent", verb, "--help"], check=True, capture_output=True, text=True).stdout)
"""
    out = containers.run("-c", program, entry=PYTHON)
    for verb in ("apply", "clean", "lab", "render", "run", "status"):
        assert f"Usage: netpol-agent {verb} " in out
    assert containers.run("--version", entry="/usr/bin/kubectl-netpol") == containers.run("--version")


def test_apply_status_clean(backend: str, kernel: Kernel, containers: Containers, objects: Path) -> None:
    """What it writes is what this checkout's agent would, to the letter."""
    before = kernel.everything()
    given = ("-f", "/objects.json", "--node", NODE)
    files = {"/objects.json": objects}
    assert containers.run("render", *given, mounts=files).startswith("# ipset restore")
    assert "changed: " in containers.run("apply", *given, "--backend", backend, mounts=files)
    assert kernel.ours() == desired(cluster())
    assert applied(backend, cluster()).writes == 0
    assert "policies" in containers.run("status", "--backend", backend)
    containers.run("clean", "--backend", backend)
    assert kernel.everything() == before


@pytest.mark.skipif(shutil.which("containerd") is None, reason="needs containerd, of Debian's package")
def test_containerd_takes_it(image: Image, tmp_path: Path) -> None:
    """Under the name that a kubelet asks for when a pod's image is netpol-agent:dev."""
    settings = {"version": 2, "root": str(tmp_path / "root"), "state": str(tmp_path / "state")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    socket = tmp_path / "socket"
    lines += ['disabled_plugins = ["io.containerd.grpc.v1.cri"]', "[grpc]", f'address = "{socket}"', ""]
    (tmp_path / "config").write_text("\n".join(lines))
    with (tmp_path / "log").open("w") as log:
        containerd = subprocess.Popen(["containerd", "--config", tmp_path / "config"], stdout=log, stderr=log)
        try:
            until(socket.exists)
            run("ctr", "--address", str(socket), "images", "import", str(image.archive))
            names = run("ctr", "--address", str(socket), "images", "list", "--quiet").split()
        finally:
            containerd.terminate()
            containerd.wait(timeout=20)
    assert names == [f"docker.io/library/netpol-agent:{tag}" for tag in (VERSION, "dev")]


# --- run -------------------------------------------------------------------------------------------------------------


def ready(container: Container) -> None:
    """Wait for /readyz."""
    deadline = time.monotonic() + DEADLINE
    why: object = ""
    while container.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HEALTH}/readyz", timeout=5) as answer:
                assert answer.read() == b"ok\n"
                return
        except urllib.error.HTTPError as error:
            why = error.read()
        except OSError as error:
            why = error
        time.sleep(0.02)
    container.delete()
    raise AssertionError(f"not ready: {why!r}")


def kubeconfig(path: Path, server: Server, user: Mapping[str, Any], **settings: Any) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server.url, **settings}}],
        "users": [{"name": "u", "user": dict(user)}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "here",
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_run_in_a_pod(backend: str, kernel: Kernel, containers: Containers, tmp_path: Path) -> None:
    """With a service account: follows the cluster, and ends within a second of SIGTERM, its rules in force."""
    run("ip", "link", "set", "lo", "up")  # it is down in a new network namespace
    authority = Authority(tmp_path / "authority")
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_bytes(authority.crt("ca").read_bytes())
    (account / "token").write_text("secret\n")
    *others, last = cluster()
    with (
        Server(*others, tls=authority.context(), tokens=frozenset({"secret"})) as server,
        containers.started(
            "run", "--node", NODE, "--backend", backend, "--health-address", HEALTH,
            mounts={"/var/run/secrets/kubernetes.io/serviceaccount": account},
            KUBERNETES_SERVICE_HOST="127.0.0.1", KUBERNETES_SERVICE_PORT=str(server.port),
        ) as container,
    ):  # fmt: skip
        ready(container)
        assert kernel.ours() == desired(others)
        server.put(last)
        until(lambda: kernel.ours() == desired([*others, last]))
        before = time.monotonic()
        container.signal("TERM")
        _, log = container.communicate(timeout=10)
        assert container.returncode == 0, log
        assert time.monotonic() - before < 1.0
        assert "enforcing" in log
    assert kernel.ours() == desired([*others, last])


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


PLUGIN = """\
#!/usr/bin/python3
import json
status = {"token": "secret"}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


@pytest.mark.parametrize("way", ["token file", "certificate", "program"])
def test_run_with_a_kubeconfig(containers: Containers, tmp_path: Path, way: str) -> None:
    """A certificate that stands in it is written to /tmp, which must be given then."""
    run("ip", "link", "set", "lo", "up")  # it is down in a new network namespace
    authority = Authority(tmp_path / "authority")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "plugin").write_text(PLUGIN)
    (tmp_path / "plugin").chmod(0o755)
    mounts = {f"/given/{name}": tmp_path / name for name in ("token", "plugin", "config", "authority")}

    def data(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    program = {"apiVersion": "client.authentication.k8s.io/v1", "command": "/given/plugin", "interactiveMode": "Never"}
    users = {
        "token file": {"tokenFile": "/given/token"},
        "certificate": {
            "client-certificate-data": data(authority.crt("client")),
            "client-key-data": data(authority.directory / "client.key"),
        },
        "program": {"exec": program},
    }
    trusted = {"certificate-authority": "/given/authority/ca.crt"}
    if way == "certificate":
        trusted = {"certificate-authority-data": data(authority.crt("ca"))}
    tokens = None if way == "certificate" else frozenset({"secret"})
    with Server(*cluster(), tls=authority.context(wants_client=way == "certificate"), tokens=tokens) as server:
        kubeconfig(tmp_path / "config", server, users[way], **trusted)
        with containers.started(
            "run", "--node", NODE, "--backend", "nft", "--health-address", HEALTH, "--kubeconfig", "/given/config",
            mounts=mounts, tmp=way == "certificate",
        ) as container:  # fmt: skip
            ready(container)
            assert Kernel("nft").ours() == desired(cluster())
