"""The few Linux calls on namespaces and mounts that Python 3.11 has no wrapper for.

Each raises OSError with the kernel's errno and what was asked for.
"""

import ctypes
import os
import select

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move the calling thread (for CLONE_NEWPID its future children) into new namespaces."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into the namespace behind an open file; kind is its CLONE_NEW… flag."""
    _checked(_libc.setns(descriptor, kind), f"setns({kind:#x})")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); kind is the file system's type, empty for bind mounts and changes of propagation."""
    number = ctypes.c_ulong(flags)
    done = _libc.mount(source.encode(), target.encode(), kind.encode() or None, number, options.encode() or None)
    _checked(done, f"mount {kind or source} on {target}")


def unmount(target: str) -> None:
    """Detach a mount at once; what still uses it keeps it until then."""
    _checked(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def die_with_parent(alive: int) -> None:
    """Have the kernel kill -9 this process when the thread that forked it ends, however it ends.

    `alive` is the read end of a pipe whose only write end the parent holds: it tells of a parent that had
    already gone before this call. Must come after any change of user namespace, which resets the wish.
    """
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    watch = select.poll()
    watch.register(alive, 0)  # a hang-up is reported without being asked for
    if watch.poll(0):
        os._exit(128 + _SIGKILL)
    os.close(alive)


def may_administer() -> bool:
    """Whether this process may make mount, pid and network namespaces without a user namespace."""
    needed = 1 << 21 | 1 << 12  # CAP_SYS_ADMIN, CAP_NET_ADMIN
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16) & needed == needed
    return False
