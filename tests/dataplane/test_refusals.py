"""Where the kernel refuses, the error says which object and what to do; what was enforced stays, and the next sync
repairs."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from agent.dataplane.errors import KernelError
from agent.dataplane.inspect import drift
from tests.dataplane.kernel import BASE, FAMILIES, Kernel, run
from tests.dataplane.scenes import (
    Agent,
    Object,
    cluster,
    desired,
    edited,
    namespace,
    pod,
    pods_with,
    policy,
    without,
)

pytestmark = pytest.mark.root
LOCK = Path("/run/xtables.lock")


def after() -> list[Object]:
    """A change of everything: a policy edited, one gone, one new, pods new, gone and relabelled, here and elsewhere."""
    rules = [{"from": [pods_with(app="friend"), pods_with(app="late")], "ports": [{"port": 81}]}]
    changed = edited(edited(cluster(), "NetworkPolicy/web", ingress=rules), "stranger", labels={"app": "friend"})
    return [
        *without(changed, "NetworkPolicy/db", "Pod/friend"),
        namespace("z"),
        policy("late", {"app": "db"}, egress=[{"to": [pods_with(app="late")]}]),
        *(pod(f"late-{n}", 2, 100 + n, app="late") for n in range(20)),
        pod("web-2", 1, 17, {"http": 8080}, app="web"),
    ]


def refused(
    kernel: Kernel, agent: Agent, objects: Iterable[Object], obstacle: AbstractContextManager[object] | None = None
) -> KernelError:
    """The refusal of a change; what was enforced is still whole.

    In each family the rules are the old or the new ones; the sets hold what the old held, and of the new what is in."""
    old = kernel.ours()
    assert old == desired(agent.node)
    with obstacle or nullcontext(), pytest.raises(KernelError) as caught:
        agent.change(objects)
    now, new = kernel.ours(), desired(agent.node)
    for version in FAMILIES:
        states = [{k: v for k, v in state.items() if k.startswith(f"IPv{version}")} for state in (now, old, new)]
        assert states[0] in states[1:]
    for name in {name for name in (*now, *old) if name.startswith("npa")}:
        was, will = (state[name][1] if name in state else frozenset() for state in (old, new))
        assert was <= now[name][1] <= was | will
    return caught.value


def repaired(kernel: Kernel, agent: Agent) -> None:
    """Without the obstacle the next sync brings all that the refused one would have."""
    assert agent.sync().writes > 0
    assert kernel.ours() == desired(agent.node)
    assert agent.resync().writes == 0


@contextmanager
def tools(tmp_path: Path, **scripts: str) -> Iterator[None]:
    """Shell scripts in front of the tools in PATH; $REAL is the tool itself. Names have _ for -."""
    path = os.environ["PATH"]
    folder = tmp_path / "tools"
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        program = name.replace("_", "-")
        file = folder / program
        file.write_text(f"#!/bin/sh\nREAL={shutil.which(program, path=path)}\n{script}\n")
        file.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder)


# --- sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 20])
def test_set_full(backend: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of a few members through netlink, and of many through `ipset restore`: nothing after it is done."""
    with Agent(backend, [o for o in cluster() if o["metadata"]["name"] != "web"]) as agent:
        agent.sync()

        @contextmanager
        def small_sets() -> Iterator[None]:
            with monkeypatch.context() as patch:
                for module in ("render", "plan", "ipset"):
                    patch.setattr(f"agent.dataplane.{module}.MAXELEM", 2)
                yield

        late = policy("late", {"app": "idle"}, ingress=[{"from": [pods_with(app="late")]}])
        pods = [pod(f"late-{n}", 2, 100 + n, app="late") for n in range(number)]
        error = refused(kernel, agent, [*agent.objects, late, *pods], small_sets())
        assert "full" in error.reason
        assert "npa4-p-" in error.what
        assert "10.0.2.1" in error.what
        assert "fewer addresses" in error.advice
        repaired(kernel, agent)


def test_set_that_somebody_made_smaller(backend: str, kernel: Kernel) -> None:
    """Ours by name, with room for four: a change that does not fit is refused, and the set is then rebuilt."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        for version, inet in zip(FAMILIES, ("inet", "inet6")):
            name = next(n for n, s in kernel.sets().items() if n.startswith(f"npa{version}-p-"))
            kernel.ipset("create", "small", "hash:ip", "family", inet, "maxelem", "4")
            for member in kernel.sets()[name].members:
                kernel.ipset("add", "small", member)
            kernel.ipset("swap", "small", name)
            kernel.ipset("destroy", "small")
        agent.change(
            [*cluster(), *(pod(f"{app}-{n}", 2, 9 + n, app=app) for n in range(9) for app in ("friend", "web"))]
        )
        assert kernel.ours() == desired(agent.node)
        assert agent.resync().writes == 0


def test_ipset_restore_fails_in_the_middle(
    backend: str, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the lines are in; the second attempt, from what is there then, would do."""
    monkeypatch.setattr("agent.dataplane.dataplane.ATTEMPTS", 1)
    with Agent(backend, cluster()) as agent:
        agent.sync()
        script = """[ "$1" = restore ] || exec $REAL "$@"
cat >"$0.in"; head -n $(( $(wc -l <"$0.in") / 2 )) "$0.in" | $REAL "$@"
echo "ipset v7.17: Error in line 12: Kernel error received: Cannot allocate memory" >&2; exit 1"""
        error = refused(kernel, agent, after(), tools(tmp_path, ipset=script))
        assert error.what.startswith("ipset restore: ")
        assert "npa" in error.what
        assert "Cannot allocate memory" in error.reason
        repaired(kernel, agent)


def test_set_name_taken(backend: str, kernel: Kernel) -> None:
    """By a set of another type that somebody's rule uses."""
    with Agent(backend, [o for o in cluster() if o["metadata"]["name"] != "db"]) as agent:
        agent.sync()
        name = next(n for n in desired(cluster()) if n.startswith("npa4-p") and n not in kernel.sets())
        kernel.ipset("create", name, "hash:net")
        kernel.rules(4, ":THEIRS - [0:0]", f"-A THEIRS -m set --match-set {name} src -j DROP")
        with pytest.raises(KernelError, match=f"{name}.*in use.*[Dd]elete that rule"):
            agent.change(cluster())
        kernel.rules(4, "-F THEIRS", "-X THEIRS")
        agent.sync()
        assert kernel.ours() == desired(cluster())


# --- rules -----------------------------------------------------------------------------------------------------------

MISSING_MODULE = """cat >$0.in; echo "Warning: Extension set revision 0 not supported, missing kernel module?" >&2"""
NFT_SAYS = """echo "iptables-nft-restore v1.8.9 (nf_tables):
line $(grep -n -m1 match-set $0.in | cut -d: -f1): RULE_APPEND failed (No such file or directory): rule in chain" >&2"""
LEGACY_SAYS = """echo "iptables-restore: line $(wc -l <$0.in) failed" >&2"""


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=str)
def test_missing_module(backend: str, kernel: Kernel, tmp_path: Path, families: tuple[int, ...]) -> None:
    """In one family or both: the words are those of the real tools."""
    script = f"{MISSING_MODULE}; {NFT_SAYS if backend == 'nft' else LEGACY_SAYS}; exit 4"
    with Agent(backend, cluster()) as agent:
        agent.sync()
        obstacle = tools(tmp_path, **{f"{BASE[version]}_{backend}_restore": script for version in families})
        error = refused(kernel, agent, after(), obstacle)
        assert error.what.startswith(
            f"{BASE[families[0]]}-{backend}-restore: -A NPA-" if backend == "nft" else BASE[families[0]]
        )
        assert "missing kernel module" in error.reason
        assert "modprobe" in error.advice
        repaired(kernel, agent)


def test_a_module_that_really_is_missing(backend: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel_lacks_ipvs(kernel):
        pytest.skip("this kernel has the match ipvs; no other that it lacks is known to the test")
    with Agent(backend, cluster()) as agent:
        agent.sync()
        with monkeypatch.context() as patch:
            patch.setattr("agent.dataplane.dataplane.ATTEMPTS", 1)
            patch.setattr("agent.dataplane.plan.bucket_rules", lambda *_: ["-m ipvs --ipvs -j DROP"])
            with pytest.raises(KernelError, match=r"Extension ipvs .*missing kernel module.*modprobe"):
                agent.change(after())
        repaired(kernel, agent)


def kernel_lacks_ipvs(kernel: Kernel) -> bool:
    kernel.iptables(4, "-N", "TRY")
    kernel.iptables(4, "-A", "TRY", "-m", "ipvs", "--ipvs", fine=True)
    lacks = "ipvs" not in kernel.save(4)
    kernel.iptables(4, "-F", "TRY")
    kernel.iptables(4, "-X", "TRY")
    return lacks


def test_rule_that_leads_into_our_chain(backend: str, kernel: Kernel) -> None:
    """Somebody's rule keeps a chain from being removed: the change goes in, the chain stays until the rule goes."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        for version in FAMILIES:
            chains = [name for name in kernel.tables(version).chains if name.startswith("NPA-I-")]
            kernel.rules(version, ":THEIRS - [0:0]", *(f"-A THEIRS -p udp -j {name}" for name in chains))
        agent.change(after())
        new = desired(agent.node)
        assert {key: rules for key, rules in kernel.ours().items() if key in new and "jumps" not in key} == {
            key: rules for key, rules in new.items() if "jumps" not in key
        }
        assert "leads into" in " ".join(drift(agent.dataplane.read()))
        for version in FAMILIES:
            kernel.rules(version, "-F THEIRS")
        agent.resync()
        assert kernel.ours() == new


def test_tool_killed(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    """As when memory is short; the first two times only: the third attempt is taken."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        name = f"iptables_{backend}_restore"
        error = refused(kernel, agent, after(), tools(tmp_path, **{name: "kill -9 $$"}))
        assert error.what == f"iptables-{backend}-restore"
        assert "killed" in error.reason
        with tools(tmp_path, **{name: 'echo >>"$0.n"; [ $(wc -l <"$0.n") -lt 3 ] && kill -9 $$; exec $REAL "$@"'}):
            assert agent.sync().attempts == 3
        assert kernel.ours() == desired(agent.node)


def test_read_fails(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    """Nothing is known, so nothing is written."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        before = kernel.everything()
        for name in ("ipset", f"ip6tables_{backend}_save"):
            with (
                tools(tmp_path, **{name: "echo no >&2; exit 1"}),
                pytest.raises(KernelError, match=name.replace("_", "-")),
            ):
                agent.resync()
            assert kernel.everything() == before
        assert agent.sync().writes == 0


def test_read_is_tried_again(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    with Agent(backend, cluster()) as agent:
        script = '[ -e "$0.n" ] || { touch "$0.n"; echo busy >&2; exit 1; }; exec $REAL "$@"'
        with tools(tmp_path, **{f"iptables_{backend}_save": script}):
            agent.sync()
        assert kernel.ours() == desired(cluster())


def test_locked(backend: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legacy waits for its lock, then says so; nft knows no lock."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        monkeypatch.setattr("agent.dataplane.iptables.LOCK_SECONDS", 1)
        monkeypatch.setattr("agent.dataplane.dataplane.ATTEMPTS", 1)

        @contextmanager
        def locked() -> Iterator[None]:
            with LOCK.open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                yield

        if backend == "nft":
            with locked():
                agent.change(after())
            return
        error = refused(kernel, agent, after(), locked())
        assert error.what == "iptables-legacy-restore"
        assert "xtables lock" in error.reason
        assert "fuser" in error.advice
        repaired(kernel, agent)


@pytest.mark.parametrize("backend", ["nft"])
@pytest.mark.parametrize("rule", ["tcp dport 22 reject", "meta mark set 5", "meta cpu 1 drop"])
def test_rules_that_only_nft_can_read(kernel: Kernel, rule: str) -> None:
    """iptables-nft-save prints nothing of such a table, and says that it succeeded: nothing must be concluded."""
    with Agent("nft", cluster()) as agent:
        agent.sync()
        run("nft", "add", "rule", "ip", "filter", "FORWARD", *rule.split())
        before = run("nft", "list", "ruleset")
        agent.change(cluster())
        with Agent("nft", cluster()) as restarted:
            for act in (agent.resync, restarted.sync, restarted.dataplane.clean, restarted.dataplane.read):
                with pytest.raises(KernelError, match=r"iptables-nft-save -t filter: .*only nft can read.*--backend"):
                    act()
        assert run("nft", "list", "ruleset") == before
        run("nft", "flush", "chain", "ip", "filter", "FORWARD")
        agent.resync()
        assert kernel.ours() == desired(cluster())


@pytest.mark.parametrize("backend", ["legacy"])
def test_other_backend_unreadable(kernel: Kernel) -> None:
    """Where we never were: it is not our affair."""
    run("nft", "add table ip filter; add chain ip filter native; add rule ip filter native tcp dport 22 reject")
    before = run("nft", "list", "ruleset")
    with Agent("legacy", cluster()) as agent:
        agent.sync()
        agent.dataplane.leave_other_backend()
        agent.dataplane.clean()
    assert run("nft", "list", "ruleset") == before
    assert not kernel.sets()


# --- the process -----------------------------------------------------------------------------------------------------

NET_ADMIN = 12


def without_net_admin() -> None:
    """Drop the capability for this process and for the tools that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(24, NET_ADMIN, 0, 0, 0) == 0  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for index in range(3):
        data[index] &= ~(1 << NET_ADMIN)
    assert libc.capset(header, data) == 0


def as_nobody() -> None:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def in_child(body: Callable[[], Any]) -> Any:
    """What the body returns, run in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(body()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    assert text, "the child failed; see standard error"
    return json.loads(text)


@pytest.mark.parametrize("drop", [without_net_admin, as_nobody])
@pytest.mark.parametrize("begun", [False, True])
def test_no_permission(
    backend: str, kernel: Kernel, drop: Callable[[], None], begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a process that starts so, and for one that has lost it: the first thing that it writes says so."""
    monkeypatch.setattr("agent.dataplane.dataplane.ATTEMPTS", 1)
    events: list[Callable[[list[Object]], list[Object]]] = [
        lambda objects: [*objects, pod("new", 2, 9, app="friend")],
        lambda objects: without(objects, "Pod/web"),
        lambda _: after(),
    ]
    for event in events:
        with Agent(backend, cluster()) as agent:
            agent.resync()
            before = kernel.everything()

            def body(agent: Agent = agent, event: Callable[[list[Object]], list[Object]] = event) -> list[str]:
                if begun:
                    drop()
                    with pytest.raises(KernelError) as caught:
                        agent.change(event(cluster()))
                else:
                    drop()
                    with Agent(backend, event(cluster())) as fresh, pytest.raises(KernelError) as caught:
                        fresh.sync()
                error = caught.value
                return [error.what, error.reason, error.advice]

            what, reason, advice = in_child(body)
            assert "NET_ADMIN" in advice
            assert what.startswith(("ipset", "conntrack", "ipset restore") if begun else "ipset save")
            assert "permitted" in reason
            assert kernel.everything() == before
            agent.change(event(cluster()))
            assert kernel.ours() == desired(event(cluster()))


def test_lock_file_not_mounted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pod legacy needs the host's lock file; elsewhere the tools make their own."""
    Agent(backend)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert not LOCK.exists()
    if backend == "nft":
        Agent(backend)
        return
    with pytest.raises(KernelError, match=r"/run/xtables.lock: is not there. Mount the host's file"):
        Agent(backend)
    LOCK.touch()
    Agent(backend)
    monkeypatch.setenv("XTABLES_LOCKFILE", "/run/other.lock")
    with pytest.raises(KernelError, match=r"/run/other.lock"):
        Agent(backend)


@pytest.mark.parametrize("missing", ["ipset", "iptables", "ip6tables"])
def test_missing_tools(backend: str, kernel: Kernel, tmp_path: Path, missing: str) -> None:
    with Agent(backend, cluster()) as agent:
        agent.sync()
        before = kernel.everything()
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("ipset", *(f"{base}-{backend}-{verb}" for base in BASE.values() for verb in ("save", "restore"))):
            if not name.startswith(missing):
                (folder / name).symlink_to(shutil.which(name) or "")
        path, os.environ["PATH"] = os.environ["PATH"], str(folder)
        try:
            for act in (lambda: agent.change(after()), agent.resync, agent.sync):
                with pytest.raises(KernelError, match=f"{missing}.* is not installed. Install the package"):
                    act()
        finally:
            os.environ["PATH"] = path
        before_sets, sets = before.pop("sets"), (now := kernel.everything()).pop("sets")
        assert now == before
        assert all(sets[name][1] >= members for name, (_, members) in before_sets.items())
        repaired(kernel, agent)


def test_plain_names(backend: str, kernel: Kernel, tmp_path: Path) -> None:
    """Where the tools have no backend in their names, they are asked which they are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ipset").symlink_to(shutil.which("ipset") or "")
    for base in BASE.values():
        for verb in ("", "-save", "-restore"):
            real = shutil.which(f"{base}-{backend}{verb}")
            (folder / f"{base}{verb}").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
            (folder / f"{base}{verb}").chmod(0o755)
    path, os.environ["PATH"] = os.environ["PATH"], str(folder)
    try:
        with Agent(backend, cluster()) as agent:
            agent.sync()
            [other] = {"nft", "legacy"} - {backend}
            with Agent(other) as wrong, pytest.raises(KernelError, match=f"iptables-{other}-save.*not installed"):
                wrong.sync()
            os.environ["PATH"] = path
            assert kernel.ours() == desired(cluster())
            os.environ["PATH"] = str(folder)
            agent.dataplane.clean()
    finally:
        os.environ["PATH"] = path
    assert not [key for key in kernel.ours() if " NPA" in key or "npa" in key]


# --- connections -----------------------------------------------------------------------------------------------------


def test_released_addresses_are_not_lost(backend: str, tmp_path: Path) -> None:
    """The connections of an address that changed hands are forgotten by the sync that goes in, if not by the first."""
    with Agent(backend, cluster()) as agent:
        agent.sync()
        connection = ("-p", "tcp", "--sport", "1", "--dport", "2", "--state", "ESTABLISHED", "-t", "600")
        run("conntrack", "-I", "-s", "192.0.2.1", "-d", "10.0.1.3", *connection)
        without_idle = without(cluster(), "Pod/idle", "Pod/web")
        refusing = tools(tmp_path, **{f"iptables_{backend}_restore": "cat >/dev/null; echo no >&2; exit 1"})
        with refusing, pytest.raises(KernelError):
            agent.change(without_idle)
        run("conntrack", "-I", "-s", "192.0.2.9", "-d", "10.0.1.3", *connection, fine=True)
        assert agent.sync().connections_forgotten >= 1
        assert "10.0.1.3" not in run("conntrack", "-L")
