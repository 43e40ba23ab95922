"""What is written down about enclosures that stay, one JSON file each, and whether it is still true."""

import contextlib
import fcntl
import json
import os
import select
import signal
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.lab.namespaces import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER

_KINDS = {"user": CLONE_NEWUSER, "mnt": CLONE_NEWNS, "net": CLONE_NEWNET, "pid": CLONE_NEWPID}


class NotHeld(Exception):
    """No lab of this name is up."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no lab {name!r} is up; start one with `netpol-agent lab up`")


class AlreadyHeld(Exception):
    """A lab of this name is up already."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the lab {name!r} is up already; end it with `netpol-agent lab down`")


@dataclass(frozen=True)
class State:
    """An enclosure that stays: init's pid as seen from outside, its start in clock ticks since boot."""

    name: str
    pid: int
    started: int
    topology: dict[str, Any]


def directory() -> Path:
    """Where the state files are: of root under /run, of others in their runtime directory. Made if missing.

    Raises PermissionError when the place in /tmp (for users without a runtime directory) is another's.
    """
    if os.geteuid() == 0:
        place = Path("/run/netpol-agent/lab")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        place = Path(runtime) / "netpol-agent" / "lab"
    else:
        base = Path(f"/tmp/netpol-agent-{os.geteuid()}")
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
            raise PermissionError(f"{base} must be a directory that only you can enter")
        place = base / "lab"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Only one process at a time starts or ends enclosures of this user."""
    descriptor = os.open(directory(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Said aloud: an enclosure forked meanwhile has the same open file, so closing ours would not do.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def names() -> list[str]:
    """The enclosures that are up, by name; state that is stale is taken away."""
    found = sorted(file.stem for file in directory().glob("*.json"))
    return [name for name in found if read(name) is not None]


def write(name: str, pid: int, topology: dict[str, Any]) -> None:
    """Write down that the enclosure runs. Raises OSError when its init has gone already."""
    started = _started(f"/proc/{pid}")
    if started is None:
        raise ProcessLookupError(f"the lab {name!r} has ended")
    file = _file(name)
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(asdict(State(name, pid, started, topology))), encoding="utf-8")
    draft.replace(file)


def read(name: str) -> State | None:
    """The state of an enclosure that runs; None, and the file taken away, when it does not."""
    file = _file(name)
    try:
        state = State(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        file.unlink(missing_ok=True)
        return None
    if _started(f"/proc/{state.pid}") != state.started:
        file.unlink(missing_ok=True)
        return None
    return state


def namespaces(state: State) -> dict[int, int] | None:
    """Open files of the enclosure's namespaces by CLONE_NEW… flag, or None when it has gone.

    The user namespace is missing where it is the caller's own (setns to it would be refused).
    """
    try:
        # An open /proc/PID never comes to mean a later process of the same number.
        home = os.open(f"/proc/{state.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _started(f"/proc/self/fd/{home}") != state.started:
            return None
        files = {}
        for name, kind in _KINDS.items():
            if name == "user" and os.readlink("ns/user", dir_fd=home) == os.readlink("/proc/self/ns/user"):
                continue
            files[kind] = os.open(f"ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=home)
        return files
    except OSError:
        return None
    finally:
        os.close(home)


def kill(name: str) -> bool:
    """Kill init, wait until it is gone, remove the state; False when the enclosure did not run."""
    state = read(name)
    if state is None:
        return False
    try:
        process = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return read(name) is not None
    try:
        if _started(f"/proc/{state.pid}") == state.started:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            watch = select.poll()
            watch.register(process, select.POLLIN)
            watch.poll(10_000)
    finally:
        os.close(process)
    _file(name).unlink(missing_ok=True)
    return True


def is_name(name: str) -> bool:
    """Whether a lab can be called so."""
    return bool(name) and all(letter.isalnum() or letter in "-_" for letter in name)


def _file(name: str) -> Path:
    if not is_name(name):
        raise ValueError(f"the name of a lab is letters, digits, - and _: {name!r}")
    return directory() / f"{name}.json"


def _started(process: str) -> int | None:
    try:
        with open(f"{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
