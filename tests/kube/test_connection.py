"""Where the API server is and who we are, by kubeconfig, service account and environment; and what comes of errors."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from agent.kube import connection
from agent.kube.connection import Connection, configuration_source
from agent.kube.errors import NoConfiguration, Refused, Silent, Unreachable
from agent.kube.kinds import POD
from tests.kube.certificates import Authority
from tests.kube.following import following, plainly, pod, until
from tests.kube.server import Fault, Server
from tests.kube.test_reflector import IMPATIENT
from tests.kube.wire import Proxy

A, B = pod("a"), pod("b")


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has set."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Callable[..., str]:
    """Writes one with a single context, and tells its path."""

    def write(server: Server, user: dict[str, Any] | None = None, **cluster: Any) -> str:
        path = tmp_path / "config"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": server.url, **cluster}}],
            "users": [{"name": "u", "user": user or {}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "here",
        }
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


Write = Callable[..., str]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_token(kubeconfig: Write) -> None:
    server = Server(A, tokens=frozenset({"good"}))
    with following(server, source=configuration_source(kubeconfig(server, {"token": "good"}), None)) as found:
        found.until_known("x/a")
        assert not found.told.failures


@pytest.mark.parametrize("end", ["", "\n"])
def test_token_file_that_is_rotated(kubeconfig: Write, tmp_path: Path, end: str) -> None:
    """401 makes the file be read again; nothing is listed again. Editors end files with a new line."""
    file = tmp_path / "token"
    file.write_text(f"old{end}")
    server = Server(A, tokens=frozenset({"old"}))
    with following(server, source=configuration_source(kubeconfig(server, {"tokenFile": "token"}), None)) as found:
        found.until_known("x/a")
        server.switches.tokens = frozenset({"new"})
        server.hang_up()
        until(lambda: any(isinstance(error, Refused) and error.status == 401 for error, _ in found.told.failures))
        assert "read again" in found.told.failures[-1][1]
        file.write_text(f"new{end}")
        server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == 1
        assert found.asked[-1].token == "new"


def test_a_token_that_is_none(kubeconfig: Write, tmp_path: Path) -> None:
    """One that no request can carry is not shown to anybody; a right one in its place is taken."""
    file = tmp_path / "token"
    file.write_text("se\ncret")
    server = Server(A, tokens=frozenset({"good"}))
    with following(server, source=configuration_source(kubeconfig(server, {"tokenFile": "token"}), None)) as found:
        until(lambda: found.told.failures)
        error, _ = found.told.failures[0]
        assert isinstance(error, Unreachable)
        assert "cret" not in str(error)
        file.write_text("good")
        found.until_known("x/a")


def test_token_that_expires_now_and_then(kubeconfig: Write) -> None:
    """One 401 among good answers is just tried again."""
    server = Server(A, tokens=frozenset({"good"}))
    server.spoil("Pod", Fault("answer", status=401), Fault("none"), Fault("answer", status=401))
    with following(server, source=configuration_source(kubeconfig(server, {"token": "good"}), None)) as found:
        found.until_known("x/a")
        server.hang_up()
        server.put(B)
        found.until_known("x/a", "x/b")


PLUGIN = """\
import json, os, sys
from pathlib import Path
file = Path(sys.argv[1])
assert json.loads(os.environ["KUBERNETES_EXEC_INFO"])["kind"] == "ExecCredential"
assert os.environ["REALM"] == "of-tests"
if not file.exists():
    sys.exit("no token today")
status = {"token": file.read_text()}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, Any]:
    """A user of a kubeconfig whose token a program tells: what is in the file `token`."""
    program = tmp_path / "plugin.py"
    program.write_text(PLUGIN)
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(program), str(tmp_path / "token")],
            "env": [{"name": "REALM", "value": "of-tests"}],
            "interactiveMode": "Never",
        }
    }


def test_plugin(kubeconfig: Write, plugin: dict[str, Any], tmp_path: Path) -> None:
    """It is asked again at 401."""
    (tmp_path / "token").write_text("one")
    server = Server(A, tokens=frozenset({"one"}))
    with following(server, source=configuration_source(kubeconfig(server, plugin), None)) as found:
        found.until_known("x/a")
        (tmp_path / "token").write_text("two")
        server.switches.tokens = frozenset({"two"})
        server.hang_up()
        server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == 1


def test_plugin_that_fails_for_a_while(kubeconfig: Write, plugin: dict[str, Any], tmp_path: Path) -> None:
    """Without its token we are anonymous, which servers may answer with 403; it is asked again then, too."""
    server = Server(A, answers={"Pod": 403})
    with following(server, source=configuration_source(kubeconfig(server, plugin), None)) as found:
        until(lambda: found.told.failures)
        assert {one.token for one in found.asked} == {""}
        (tmp_path / "token").write_text("one")
        server.switches.tokens = frozenset({"one"})
        server.switches.answers = {}
        server.switches.anonymous = 403
        found.until_known("x/a")


def test_service_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Authority) -> None:
    """Of the pod that we are in: its token is rotated, its authority is trusted."""
    token, ca = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("one")
    ca.write_bytes(authority.crt("ca").read_bytes())
    monkeypatch.setattr(connection, "SERVICE_ACCOUNT", token)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(ca))
    server = Server(A, tls=authority.context(), tokens=frozenset({"one"}))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    with following(server, source=configuration_source(None, None)) as found:
        found.until_known("x/a")
        token.write_text("two\n")
        server.switches.tokens = frozenset({"two"})
        server.hang_up()
        server.put(B)
        found.until_known("x/a", "x/b")
        assert found.lists == 1


# --- certificates ----------------------------------------------------------------------------------------------------


def as_data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("inline", [False, True])
def test_certificates(kubeconfig: Write, authority: Authority, inline: bool) -> None:
    """An authority and a client's certificate, as files and as data."""
    crt, key = authority.crt("client"), authority.directory / "client.key"
    server = Server(A, tls=authority.context(wants_client=True))
    if inline:
        user = {"client-certificate-data": as_data(crt), "client-key-data": as_data(key)}
        path = kubeconfig(server, user, **{"certificate-authority-data": as_data(authority.crt("ca"))})
    else:
        user = {"client-certificate": str(crt), "client-key": str(key)}
        path = kubeconfig(server, user, **{"certificate-authority": str(authority.crt("ca"))})
    with following(server, source=configuration_source(path, None)) as found:
        found.until_known("x/a")
        server.put(B)
        found.until_known("x/a", "x/b")


def test_an_authority_that_is_not_trusted(kubeconfig: Write, authority: Authority, tmp_path: Path) -> None:
    """It is told so; a right one in its place is taken without a restart."""
    ca = tmp_path / "ca.crt"
    ca.write_bytes(Authority(tmp_path / "other").crt("ca").read_bytes())
    server = Server(A, tls=authority.context())
    source = configuration_source(kubeconfig(server, None, **{"certificate-authority": str(ca)}), None)
    with following(server, source=source) as found:
        until(lambda: found.told.failures)
        error, _ = found.told.failures[0]
        assert isinstance(error, Unreachable)
        assert "its certificate is not trusted" in str(error)
        ca.write_bytes(authority.crt("ca").read_bytes())
        found.until_known("x/a")


def test_a_client_certificate_that_is_wanted(kubeconfig: Write, authority: Authority) -> None:
    """Without one, no answer: told, and tried again."""
    server = Server(A, tls=authority.context(wants_client=True))
    path = kubeconfig(server, None, **{"certificate-authority": str(authority.crt("ca"))})
    with following(server, source=configuration_source(path, None)) as found:
        until(lambda: len(found.told.failures) >= 2)
        assert not found.told.objects


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_insecure(kubeconfig: Write, authority: Authority) -> None:
    """`insecure-skip-tls-verify`, which urllib3 warns of."""
    server = Server(A, tls=authority.context())
    path = kubeconfig(server, None, **{"insecure-skip-tls-verify": True})
    with following(server, source=configuration_source(path, None)) as found:
        found.until_known("x/a")


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_proxy_of_the_kubeconfig(kubeconfig: Write, authority: Authority, tls: bool) -> None:
    """`proxy-url`, plain and through a tunnel."""
    server = Server(A, tls=authority.context() if tls else None)
    with Proxy() as proxy:
        settings = {"proxy-url": proxy.url, "certificate-authority": str(authority.crt("ca"))}
        with following(server, source=configuration_source(kubeconfig(server, **settings), None)) as found:
            found.until_known("x/a")
            server.put(B)
            found.until_known("x/a", "x/b")
            assert proxy.asked[0].startswith("CONNECT 127.0.0.1:" if tls else f"GET {server.url}/api/v1/pods?")


def test_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, kubeconfig: Write, authority: Authority) -> None:
    """HTTPS_PROXY, and NO_PROXY for what it is not for."""
    for exempt in ("192.0.2.0/24", "127.0.0.0/8"):
        server = Server(A, tls=authority.context())
        with Proxy() as proxy, monkeypatch.context() as patch:
            patch.setenv("HTTPS_PROXY", proxy.url)
            patch.setenv("NO_PROXY", exempt)
            path = kubeconfig(server, **{"certificate-authority": str(authority.crt("ca"))})
            with following(server, source=configuration_source(path, None)) as found:
                found.until_known("x/a")
                assert len(proxy.asked) == (exempt == "192.0.2.0/24")


def test_proxy_that_is_not_there(kubeconfig: Write) -> None:
    server = Server(A)
    with Proxy() as proxy:
        path = kubeconfig(server, **{"proxy-url": proxy.url})
    with following(server, source=configuration_source(path, None)) as found:
        until(lambda: found.told.failures)
        assert isinstance(found.told.failures[0][0], Unreachable)


# --- what is configured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{", "clusters: 5", "apiVersion: v1\nkind: Config\ncurrent-context: none\n"]
)
def test_no_configuration(content: str | None, tmp_path: Path) -> None:
    """The file is named, and what to do."""
    path = tmp_path / "config"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NoConfiguration, match=r"config: .*--kubeconfig FILE"):
        Connection(configuration_source(str(path), None))


def test_configuration_that_is_spoilt_later(kubeconfig: Write) -> None:
    """A file that is just being written costs nothing: the last good one stays."""
    server = Server(A, tokens=frozenset({"good"}))
    path = kubeconfig(server, {"token": "good"})
    with following(server, source=configuration_source(path, None)) as found:
        found.until_known("x/a")
        Path(path).write_text("{")
        server.spoil("Pod", Fault("answer", status=401), Fault("hang up"))
        server.hang_up()
        server.put(B)
        found.until_known("x/a", "x/b")


def test_kubeconfig_of_the_environment(monkeypatch: pytest.MonkeyPatch, kubeconfig: Write) -> None:
    server = Server(A)
    monkeypatch.setenv("KUBECONFIG", kubeconfig(server))
    with following(server, source=configuration_source(None, None)) as found:
        found.until_known("x/a")


# --- requests --------------------------------------------------------------------------------------------------------


def test_post() -> None:
    """Of Events: created, there already, and refused."""
    with Server() as server:
        connected = Connection(plainly(server))
        body = {"metadata": {"namespace": "x", "name": "e"}, "message": "ü"}
        connected.post("/api/v1/namespaces/x/events", body)
        assert server.events == {"x/e": body}
        with pytest.raises(Refused, match=r"already exists \(HTTP 409\)"):
            connected.post("/api/v1/namespaces/x/events", body)
        with pytest.raises(Refused, match="HTTP 400"):
            connected.post("/api/v1/namespaces/y/events", body)


def test_who_asks() -> None:
    """The API server's audit log can tell us from others."""
    with Server() as server:
        Connection(plainly(server)).get(POD.path, {})
        assert server.asked[0].agent.startswith("netpol-agent/")


@pytest.mark.parametrize(
    "fault, words",
    [
        (Fault("hang up"), "closed connection without response"),
        (Fault("answer", status=500, body=b"<html>oops</html>"), r"<html>oops</html> \(HTTP 500\)"),
        (Fault("answer", status=500, body=json.dumps({"message": "etcd"}).encode()), r"^etcd \(HTTP 500\)$"),
        (Fault("answer", status=500, body=b""), r"HTTP 500"),
        (Fault("cut"), "^the answer was cut$"),
    ],
    ids=str,
)
def test_words(fault: Fault, words: str) -> None:
    """What an operator reads has no Python in it."""
    with Server(A) as server:
        server.spoil("Pod", fault)
        with pytest.raises(Exception, match=words) as raised:
            Connection(plainly(server)).get(POD.path, {})
        assert not any(sign in str(raised.value) for sign in ("('", "', ", "object at", "Error(", "Read("))


def test_nobody_answers() -> None:
    with Server() as server:
        url = server.url
    with pytest.raises(Unreachable, match=f"{url}: .*refused"):
        Connection(plainly(server)).get(POD.path, {})


def test_an_answer_that_does_not_come() -> None:
    with Server(A) as server:
        server.spoil("Pod", Fault("delay", seconds=5))
        with pytest.raises((Unreachable, Silent)):
            Connection(plainly(server), IMPATIENT).get(POD.path, {})


@pytest.mark.parametrize(
    "text, seconds", [("7", 7.0), ("0", 0.0), ("9" * 30, 300.0), ("soon", None), ("-1", None), ("\u00b2", None)]
)
def test_retry_after(text: str, seconds: float | None) -> None:
    """Only seconds are understood; what nobody would wait for is not waited for."""
    with Server(A) as server:
        server.spoil("Pod", Fault("answer", status=429, headers={"Retry-After": text}))
        with pytest.raises(Refused) as raised:
            Connection(plainly(server)).get(POD.path, {})
        assert raised.value.retry_after == seconds
