"""The lab's own world: namespaces in which it may do as it likes, and which vanish with its first process.

    caller ── keeper ── init (pid 1 of the enclosure) ── work

The keeper makes the user and pid namespaces, so that the caller stays where it was. Each process is killed
by the kernel when the one to its left ends, and the death of init kills all that runs inside; the last
process takes the network namespaces, links and mounts with it. So there is nothing to tidy up, ever.

`run` is for one command; `hold`, `join` and `end` keep an enclosure over several commands.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from agent.lab import held, supervision
from agent.lab.namespaces import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    die_with_parent,
    may_administer,
    mount,
    setns,
    unshare,
)


class LabUnavailable(Exception):
    """The lab cannot work on this machine or for this user; the text says what to do. Exit code 3."""


_inside = False


def is_inside() -> bool:
    """Whether this process runs in an enclosure, so that what it does to the network is its own affair."""
    return _inside


def run(work: Callable[[], int]) -> int:
    """Run `work` in an enclosure of its own and return its exit code.

    Standard streams, the terminal, working directory and memory are the caller's (it is forked), signals
    are passed on. Files under /run are not seen inside. To be called from the main thread.
    Raises LabUnavailable when the namespaces cannot be made.
    """
    _flush()
    mask = supervision.block()
    try:
        ours, theirs = socket.socketpair()
        alive, life = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            ours.close()
            os.close(life)
            _keep(theirs, alive, mask, lambda: _and_close(theirs, work))
        theirs.close()
        os.close(alive)
        with ours:
            trouble = next((said["error"] for said in _listen(ours) if "error" in said), None)
        code = supervision.supervise(keeper)
        os.close(life)
    finally:
        supervision.restore(mask)
    if trouble is not None:
        raise LabUnavailable(trouble)
    return code


Held = Callable[[Callable[[dict[str, Any]], None]], int]
"""What runs in a held enclosure: given `ready`, to be called once with the topology; returns an exit code."""


def hold(name: str, work: Held) -> None:
    """Start an enclosure that stays, and return when it is ready.

    `work(ready)` runs inside, without a terminal; it calls `ready(topology)` once (a JSON object that
    `join` hands out) and then serves until it is ended. Raises held.AlreadyHeld when one of this name
    runs, LabUnavailable when it cannot be made or `work` fails before it is ready.
    """
    _flush()
    with held.locked():
        if held.read(name) is not None:
            raise held.AlreadyHeld(name)
        ours, theirs = socket.socketpair()
        first = os.fork()
        if first == 0:
            ours.close()
            os.setsid()
            if os.fork():
                os._exit(0)
            _daemon(theirs, work)
        theirs.close()
        os.waitpid(first, 0)
        init: int | None = None
        with ours:
            try:
                for said in _listen(ours):
                    if "error" in said:
                        raise LabUnavailable(said["error"])
                    if "init" in said:
                        init = int(said["init"])
                    if "ready" in said and init is not None:
                        held.write(name, init, said["ready"])
                        ours.sendall(b"!")
                        return
            except BaseException:
                if init is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(init, signal.SIGKILL)
                raise
        raise LabUnavailable(f"the lab {name!r} ended before it was ready")


def join(name: str, work: Callable[[dict[str, Any]], int]) -> int:
    """Run `work(topology)` inside the held enclosure and return its exit code, as `run` does.

    Raises held.NotHeld when there is none of this name, or its state is stale.
    """
    _flush()
    state = held.read(name)
    if state is None:
        raise held.NotHeld(name)
    mask = supervision.block()
    try:
        alive, life = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            os.close(life)
            supervision.perform(lambda: _enter(state, alive, mask, work))
        os.close(alive)
        code = supervision.supervise(keeper)
        os.close(life)
        return code
    finally:
        supervision.restore(mask)


def end(name: str) -> bool:
    """End a held enclosure with all that runs in it; False when there was none."""
    with held.locked():
        return held.kill(name)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _listen(channel: socket.socket) -> Any:
    with channel.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _tell(channel: socket.socket, **what: Any) -> None:
    # MSG_NOSIGNAL is the default of Python: a caller that has gone is BrokenPipeError.
    channel.sendall(json.dumps(what).encode() + b"\n")


def _and_close(channel: socket.socket, work: Callable[[], int]) -> int:
    channel.close()
    return work()


def _keep(channel: socket.socket, alive: int | None, mask: set[int], work: Callable[[], int]) -> None:
    """Be the keeper: make the namespaces, fork init, wait for it. Never returns."""
    try:
        _own_user_and_pids()
        if alive is not None:
            die_with_parent(alive)
        inner_alive, life = os.pipe()
        init = os.fork()
        if init == 0:
            os.close(life)
            die_with_parent(inner_alive)
            _init(channel, mask, work)
        os.close(inner_alive)
        if alive is None:
            _tell(channel, init=init)
        channel.close()
    except OSError as trouble:
        _tell(channel, error=_advice(trouble))
        os._exit(3)
    os._exit(supervision.supervise(init))


def _own_user_and_pids() -> None:
    if may_administer():
        unshare(CLONE_NEWPID)
        return
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{file}", "w", encoding="ascii") as out:
            out.write(text)
    unshare(CLONE_NEWPID)


def _init(channel: socket.socket, mask: set[int], work: Callable[[], int]) -> None:
    """Be pid 1 of the enclosure. Never returns."""
    try:
        unshare(CLONE_NEWNS | CLONE_NEWNET)
        mount("none", "/", flags=MS_REC | MS_PRIVATE)
        # Its own /run holds its own /run/netns and its own /run/xtables.lock.
        mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
        os.makedirs("/run/netns")
        # In a container whose /proc is partly masked the kernel refuses these two; the outer ones do.
        with contextlib.suppress(OSError):
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        with contextlib.suppress(OSError):
            mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as trouble:
        _tell(channel, error=_advice(trouble))
        os._exit(3)
    child = os.fork()
    if child == 0:
        _settle(mask)
        supervision.perform(work)
    channel.close()
    os._exit(supervision.supervise(child, reap_all=True))


def _settle(mask: set[int]) -> None:
    global _inside
    _inside = True
    # iproute2 and iptables are in sbin, which is not on every user's path.
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    supervision.restore(mask)


def _daemon(channel: socket.socket, work: Held) -> None:
    """Be the keeper of a held enclosure, away from the caller's terminal. Never returns."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def ready(topology: dict[str, Any]) -> None:
        _tell(channel, ready=topology)
        # Unless the caller has written down that we exist, nobody could ever end us.
        if channel.recv(1) != b"!":
            raise SystemExit(1)
        channel.close()

    def told() -> int:
        try:
            return work(ready)
        except Exception as trouble:
            with contextlib.suppress(OSError):
                _tell(channel, error=f"the lab could not be built: {trouble}")
            raise

    mask = supervision.block()
    try:
        _keep(channel, None, mask, told)
    finally:
        os._exit(3)


def _enter(state: held.State, alive: int, mask: set[int], work: Callable[[dict[str, Any]], int]) -> int:
    where = os.getcwd()
    files = held.namespaces(state)
    if files is None:
        raise held.NotHeld(state.name)
    for kind in (CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID):
        if kind in files:
            setns(files[kind], kind)
            os.close(files[kind])
    with contextlib.suppress(OSError):
        os.chdir(where)
    die_with_parent(alive)
    inner_alive, life = os.pipe()
    supervision.block()
    child = os.fork()
    if child == 0:
        os.close(life)
        die_with_parent(inner_alive)
        _settle(mask)
        supervision.perform(lambda: work(state.topology))
    os.close(inner_alive)
    return supervision.supervise(child)


def _advice(trouble: OSError) -> str:
    if may_administer() and os.geteuid() == 0 and not isinstance(trouble, PermissionError):
        return f"the lab's namespaces cannot be made: {trouble}"
    if trouble.errno in (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EUSERS, errno.EINVAL, errno.ENOSYS):
        return (
            f"this user may not make user namespaces ({trouble}). Run it as root, or let users make them: "
            "sysctl -w user.max_user_namespaces=15000, on Debian also kernel.unprivileged_userns_clone=1, on "
            "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in a container, run it privileged"
        )
    return f"the lab's namespaces cannot be made: {trouble}"
