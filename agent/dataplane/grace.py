"""Waiting until every packet that is on its way through the rules has left them."""

from __future__ import annotations

import ctypes
import os
from time import sleep

_SYSCALL = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_GLOBAL = 1
_LONG_ENOUGH = 0.02
_libc = ctypes.CDLL(None, use_errno=True)


def wait() -> None:
    """One grace period of the kernel, mostly 5 to 20 ms: packets are judged inside of RCU read sections.

    membarrier(MEMBARRIER_CMD_GLOBAL) is the call that waits for one without privileges and without a side effect;
    where it is not to be had (nohz_full), a pause that no packet outlasts."""
    number = _SYSCALL.get(os.uname().machine)
    if number is None or _libc.syscall(ctypes.c_long(number), _GLOBAL, 0, 0) != 0:
        sleep(_LONG_ENOUGH)
