"""The enclosure: what runs in it, and that nothing of it is left however it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent.lab import enclosure, held
from tests.lab.world import as_nobody, environment, marked, needs_root, nothing_left, wait_until

# A lab with its servers, and a grandchild that has left the session, as a daemon would.
LAB = """
import subprocess, sys, time
from agent.lab import enclosure
from agent.lab.fabric import build
from agent.lab.servers import Servers
from tests.lab.world import small

def work():
    fabric = build(small("routed"))
    with Servers(fabric):
        with fabric.inside("x/a"):
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print("up", flush=True)
        time.sleep(1000)
    return 0

sys.exit(enclosure.run(work))
"""

HELD = """
import sys, time
from pathlib import Path
from agent.lab import enclosure
from agent.lab.fabric import attach, build
from agent.lab.probes import Probe, probe
from agent.lab.servers import Servers
from tests.lab.world import small

def serve(ready):
    fabric = build(small("bridged"))
    with Servers(fabric):
        ready(fabric.to_json())
        time.sleep(1000)
    return 0

def ask(topology):
    (outcome,) = probe(attach(topology), [Probe("x/a", "10.244.2.10", "TCP", 80, True)])
    print(outcome.who)
    return 5

from agent.lab import held
held.directory = lambda: Path(sys.argv[2])
if sys.argv[1] == "up":
    enclosure.hold("test", serve)
elif sys.argv[1] == "ask":
    sys.exit(enclosure.join("test", ask))
else:
    sys.exit(0 if enclosure.end("test") else 1)
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """A name that all processes of a test carry; after the test nothing of them may be left."""
    with nothing_left() as name:
        yield name


@contextlib.contextmanager
def start(mark: str, command: Sequence[str] = (sys.executable,), text: str = LAB) -> Iterator[subprocess.Popen[str]]:
    """The lab in a session of its own, up and running."""
    with subprocess.Popen(
        [*command, "-c", text],
        env=environment(mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as lab:
        assert lab.stdout is not None
        if lab.stdout.readline() != "up\n":
            said = lab.communicate()[1]
            if "user namespaces" in said:
                pytest.skip(f"user namespaces are not permitted here: {said}")
            pytest.fail(said)
        yield lab


def run_held(mark: str, command: Sequence[str], verb: str, place: Path) -> subprocess.CompletedProcess[str]:
    """`up`, `ask` or `down` of a held lab whose state is in `place`."""
    command = [*command, "-c", HELD, verb, str(place)]
    return subprocess.run(command, env=environment(mark), capture_output=True, text=True, timeout=30)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def chain(lab: int, mark: str) -> list[int]:
    """Caller, keeper, init, work."""
    found = [lab]
    everyone = marked(mark)
    while len(found) < 4:
        found.append(next(pid for pid in everyone if parent(pid) == found[-1] and pid not in found))
    return found


class TestRun:
    pytestmark = needs_root

    def test_exit_code_and_streams(self, mark: str) -> None:
        script = """
import os, sys
from agent.lab import enclosure
def work():
    print(os.getpid(), len(os.listdir("/sys/class/net")), sys.stdin.read(), os.listdir("/run"))
    return 7
assert not enclosure.is_inside()
sys.exit(enclosure.run(work))
"""
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment(mark), input="in", capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (7, "2 1 in ['netns']\n", "")

    @pytest.mark.parametrize(
        "raised, code", ((SystemExit(4), 4), (SystemExit(None), 0), (KeyboardInterrupt(), 130), (OSError("no"), 3))
    )
    def test_exceptions_are_exit_codes(self, raised: BaseException, code: int) -> None:
        def work() -> int:
            raise raised

        assert enclosure.run(work) == code

    def test_normal_end(self, mark: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", LAB.replace("time.sleep(1000)", "")],
            env=environment(mark),
            stdout=subprocess.PIPE,
            timeout=20,
        )
        assert done.returncode == 0

    @pytest.mark.parametrize("victim", ("caller", "keeper", "init", "work"))
    def test_killed(self, mark: str, victim: str) -> None:
        with start(mark) as lab:
            pids = chain(lab.pid, mark)
            os.kill(pids[("caller", "keeper", "init", "work").index(victim)], signal.SIGKILL)
            code = lab.wait(10)
        assert code == (-signal.SIGKILL if victim == "caller" else 137)

    @pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)))
    @pytest.mark.parametrize("whom", ("caller", "group"))
    def test_signalled(self, mark: str, number: signal.Signals, code: int, whom: str) -> None:
        with start(mark) as lab:
            if whom == "group":
                os.killpg(lab.pid, number)
            else:
                lab.send_signal(number)
            assert lab.wait(10) == code

    def test_ctrl_c_at_a_terminal(self, mark: str) -> None:
        pid, terminal = os.forkpty()
        if pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", LAB], environment(mark))
        seen = b""
        while b"up" not in seen:
            seen += os.read(terminal, 1000)
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(status) == 130


class TestHeld:
    pytestmark = needs_root

    @pytest.fixture(autouse=True)
    def place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr(held, "directory", lambda: tmp_path)
        return tmp_path

    def command(self, mark: str, place: Path, verb: str) -> subprocess.CompletedProcess[str]:
        return run_held(mark, [sys.executable], verb, place)

    def test_up_ask_down(self, mark: str, place: Path) -> None:
        up = self.command(mark, place, "up")
        assert (up.returncode, up.stderr) == (0, "")
        assert held.names() == ["test"]
        for _ in range(2):
            asked = self.command(mark, place, "ask")
            assert (asked.returncode, asked.stdout, asked.stderr) == (5, "x/c\n", "")
        again = self.command(mark, place, "up")
        assert "AlreadyHeld" in again.stderr
        assert self.command(mark, place, "down").returncode == 0
        assert self.command(mark, place, "down").returncode == 1
        assert held.names() == []

    @pytest.mark.parametrize("victim", ("init", "keeper", "work"))
    def test_killed(self, mark: str, place: Path, victim: str) -> None:
        assert self.command(mark, place, "up").returncode == 0
        state = held.read("test")
        assert state is not None
        work = next(pid for pid in marked(mark) if parent(pid) == state.pid)
        os.kill({"init": state.pid, "keeper": parent(state.pid), "work": work}[victim], signal.SIGKILL)
        assert wait_until(lambda: held.read("test") is None)
        assert "NotHeld" in self.command(mark, place, "ask").stderr

    def test_a_pid_that_is_another_process_is_stale(self, place: Path) -> None:
        file = place / "test.json"
        file.write_text(json.dumps({"name": "test", "pid": os.getpid(), "started": 1, "topology": {}}))
        assert held.read("test") is None
        assert not file.exists()
        with pytest.raises(held.NotHeld):
            enclosure.join("test", lambda _: 0)
        assert enclosure.end("test") is False

    @pytest.mark.usefixtures("mark")
    def test_what_fails_before_it_is_ready_is_said(self) -> None:
        def work(_: object) -> int:
            raise ValueError("no such pod")

        with pytest.raises(enclosure.LabUnavailable, match="no such pod"):
            enclosure.hold("test", work)
        with pytest.raises(enclosure.LabUnavailable, match="ended before it was ready"):
            enclosure.hold("test", lambda _: 0)
        assert held.names() == []

    @pytest.mark.parametrize("name", ("", "../x", "a b"))
    def test_names_are_plain(self, name: str) -> None:
        with pytest.raises(ValueError, match="letters"):
            held.read(name)


class TestWithoutRoot:
    pytestmark = needs_root

    @pytest.fixture
    def nobody(self) -> list[str]:
        command = as_nobody()
        if command is None:
            pytest.skip("no Python that the user nobody can run with this project")
        return command

    @pytest.mark.parametrize("mode", ("routed", "bridged"))
    def test_packets_services_and_drops(self, mark: str, nobody: list[str], mode: str) -> None:
        script = f"""
import os, subprocess, sys
from agent.lab import enclosure, services
from agent.lab.fabric import build
from agent.lab.probes import Probe, probe
from agent.lab.servers import Servers
from agent.lab.services import ServicePort, ServiceSpec
from tests.lab.world import small

def work():
    fabric = build(small({mode!r}))
    with Servers(fabric):
        asked = [Probe("x/a", to, protocol, 80, True) for to in ("10.244.1.11", "fd00:244:0:2::a")
                 for protocol in ("TCP", "UDP", "SCTP", "ICMP")]
        assert all(outcome.who for outcome in probe(fabric, asked))
        port = ServicePort("TCP", 80, 30080, (("10.244.1.10", 80),))
        for backend in ("nft", "legacy"):
            services.load(fabric, [ServiceSpec("x", "web", ("10.96.0.1",), (port,))], backend)
            (outcome,) = probe(fabric, [Probe("x/b", "10.96.0.1", "TCP", 80, True)])
            assert outcome.who == "x/a", outcome
        with fabric.inside("node:n1"):
            subprocess.run(["ipset", "create", "npa-test", "hash:ip"], check=True)
            subprocess.run(["ipset", "add", "npa-test", "10.244.1.11"], check=True)
            subprocess.run(["iptables-nft", "-A", "FORWARD", "-m", "set", "--match-set", "npa-test", "dst",
                            "-j", "DROP"], check=True)
        dropped = [Probe("x/a", "10.244.1.11", protocol, 80) for protocol in ("TCP", "UDP", "SCTP", "ICMP")]
        assert not any(outcome.reached for outcome in probe(fabric, dropped))
    return 9

assert os.geteuid() == 65534
try:
    code = enclosure.run(work)
except enclosure.LabUnavailable as reason:
    print(reason, file=sys.stderr)
    code = 33
sys.exit(code)
"""
        done = subprocess.run(
            [*nobody, "-c", script], env=environment(mark), capture_output=True, text=True, timeout=60
        )
        if done.returncode == 33:
            pytest.skip(f"user namespaces are not permitted here: {done.stderr}")
        assert done.returncode == 9, done.stderr

    def test_held(self, mark: str, nobody: list[str], tmp_path: Path) -> None:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.owner() == "root" and str(folder).startswith("/tmp/"):
                folder.chmod(0o755)
        tmp_path.chmod(0o777)
        codes = []
        for verb in ("up", "ask", "down"):
            done = run_held(mark, nobody, verb, tmp_path)
            if "user namespaces" in done.stderr:
                pytest.skip(f"user namespaces are not permitted here: {done.stderr}")
            codes.append((done.returncode, done.stdout))
        assert codes == [(0, ""), (5, "x/c\n"), (0, "")], done.stderr

    def test_killed(self, mark: str, nobody: list[str]) -> None:
        with start(mark, nobody) as lab:
            lab.kill()

    def test_refused_user_namespaces_are_one_clear_error(self, mark: str, nobody: list[str]) -> None:
        script = """
import sys
from agent.lab import enclosure, namespaces
def refuse(flags): raise PermissionError(1, "unshare: Operation not permitted")
enclosure.unshare = refuse
try:
    enclosure.run(lambda: 0)
except enclosure.LabUnavailable as reason:
    print(reason)
"""
        done = subprocess.run([*nobody, "-c", script], env=environment(mark), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "may not make user namespaces" in done.stdout
        assert "sysctl -w" in done.stdout


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes network namespaces")
def test_a_signal_that_is_ignored_ends_in_a_kill(mark: str) -> None:
    deaf = LAB.replace("def work():\n", "def work():\n    import signal\n    signal.signal(15, signal.SIG_IGN)\n")
    with start(mark, text=deaf) as lab:
        began = time.monotonic()
        lab.terminate()
        assert lab.wait(20) == 137
        assert time.monotonic() - began < 8
