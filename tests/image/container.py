"""Containers of the image, as a kubelet would have the DaemonSet's run, but in the test's own network namespace.

Root, two capabilities, a read-only root file system, no new privileges, and none of the system calls that the default
profile of container runtimes refuses."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.lab.namespaces import unmount

CAPABILITIES = ["CAP_NET_ADMIN", "CAP_NET_RAW"]
REFUSED = """
acct add_key bpf chroot delete_module fanotify_init finit_module fsconfig fsmount fsopen fspick init_module ioperm iopl
kexec_load keyctl lookup_dcookie mount mount_setattr move_mount open_by_handle_at open_tree perf_event_open
process_vm_readv process_vm_writev ptrace quotactl reboot request_key setdomainname sethostname setns settimeofday
swapoff swapon syslog umount umount2 unshare userfaultfd
"""
"""Of the default profile, without CAP_SYS_ADMIN, CAP_SYS_PTRACE and their like."""
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
RUNC = shutil.which("runc", path="/usr/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin")
needs_runc = [pytest.mark.root, pytest.mark.skipif(RUNC is None, reason="needs runc, of Debian's package")]
_numbers = itertools.count(1)


class Containers:
    """Runs the image, whose root is `root` and whose configuration is `config`; in a test's enclosure."""

    def __init__(self, root: Path, config: Mapping[str, Any], place: Path) -> None:
        self.root = root
        self.config = config
        self.place = place
        self.lock = place / "xtables.lock"
        self.lock.touch()

    def run(self, *arguments: str, mounts: Mapping[str, Path] | None = None, entry: str = "") -> str:
        """What it prints, to the end; a failure is the test's."""
        with self.started(*arguments, mounts=mounts, entry=entry) as container:
            out, err = container.communicate(timeout=60)
        assert container.returncode == 0, f"exit {container.returncode}: {err or out}"
        return out

    @contextmanager
    def started(
        self,
        *arguments: str,
        mounts: Mapping[str, Path] | None = None,
        entry: str = "",
        tmp: bool = False,
        **environment: str,
    ) -> Iterator[Container]:
        """A container with these files of ours in it, read-only; `tmp` gives it a /tmp that can be written."""
        name = f"netpol-agent-test-{os.getpid()}-{next(_numbers)}"
        bundle = self.place / name
        bundle.mkdir()
        words = [*([entry] if entry else self.config["Entrypoint"]), *arguments]
        env = [*self.config["Env"], *(f"{key}={value}" for key, value in environment.items())]
        binds = {str(to): _bind(of, "ro") for to, of in (mounts or {}).items()}
        binds["/run/xtables.lock"] = _bind(self.lock, "rw")
        if tmp:
            binds["/tmp"] = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
        spec = _spec(self.root, words, env, binds, name)
        (bundle / "config.json").write_text(json.dumps(spec))
        if any("/cgroup" in line for line in Path("/proc/self/mounts").read_text().splitlines()):
            _uncover_cgroups()
        state = self.place / "state"
        assert RUNC
        container = Container([RUNC, "--root", str(state)], bundle, name)
        try:
            yield container
        finally:
            container.delete()


class Container(subprocess.Popen[str]):
    """`runc run` in the foreground; its streams are the container's."""

    def __init__(self, runc: list[str], bundle: Path, name: str) -> None:
        self.runc = runc
        self.name = name
        pipe = subprocess.PIPE
        super().__init__(
            [*runc, "run", "--bundle", str(bundle), name], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def signal(self, name: str) -> None:
        """To the container's first process."""
        subprocess.run([*self.runc, "kill", self.name, name], check=True, capture_output=True)

    def delete(self) -> None:
        """With all that runs in it."""
        subprocess.run([*self.runc, "delete", "--force", self.name], check=False, capture_output=True)
        try:
            self.wait(timeout=10)
        finally:
            self.kill()
            for stream in (self.stdout, self.stderr):
                if stream:
                    stream.close()


def _uncover_cgroups() -> None:
    """The enclosure has a /sys of its own, in front of the machine's, which has the control groups that runc wants."""
    if not list(Path("/sys/fs/cgroup").glob("*")):
        unmount("/sys")


def _bind(source: Path, mode: str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "options": ["rbind", mode]}


def _spec(root: Path, words: list[str], env: list[str], binds: Mapping[str, Any], name: str) -> dict[str, Any]:
    machine = {"x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "aarch64": ["SCMP_ARCH_AARCH64"]}[platform.machine()]
    plain = ["nosuid", "noexec", "nodev"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": plain},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro", *plain]},
        *({"destination": to, **mount} for to, mount in binds.items()),
    ]
    return {
        "ociVersion": "1.0.2",
        "hostname": name,
        "root": {"path": str(root), "readonly": True},
        "mounts": mounts,
        "process": {
            "args": words,
            "cwd": "/",
            "env": env,
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        },
        "linux": {
            "cgroupsPath": f"/{name}",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": machine,
                "syscalls": [
                    {"names": REFUSED.split(), "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
                    {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                ],
            },
        },
    }
