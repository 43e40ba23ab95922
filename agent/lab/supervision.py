"""Waiting for a child process while passing on the signals that were meant for it."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_TYPED = (signal.SIGINT, signal.SIGQUIT)
_WATCHED = {*_ENDING, *_TYPED, signal.SIGCHLD}
_SI_KERNEL = 0x80
_GRACE = 3.0  # seconds from a request to end until the child is killed


def block() -> set[int]:
    """Hold back the signals that `supervise` waits for; returns the mask from before, for `restore`."""
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)}


def restore(mask: set[int]) -> None:
    """Put back the signal mask that `block` returned."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def exit_code(status: int) -> int:
    """The shell's exit code for a wait status: 128 + the signal for a killed process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def supervise(child: int, *, reap_all: bool = False) -> int:
    """Wait until `child` ends and return its exit code; signals must have been blocked by `block`.

    Signals that another process sent are passed on to the child. A Ctrl-C that was typed is not: the
    terminal has sent it to the child too. A child that ignores a request to end is killed after some
    seconds. With `reap_all` (the init of a pid namespace) orphans are collected as well.
    """
    deadline: float | None = None
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1 if reap_all else child, os.WNOHANG)
            except ChildProcessError:
                return 0
            if pid == child:
                return exit_code(status)
            if pid == 0:
                break
        # The time-out is for a SIGCHLD that another thread of a host program took away.
        told = signal.sigtimedwait(_WATCHED, 0.5)
        if told is not None and told.si_signo != signal.SIGCHLD:
            if told.si_signo in _ENDING or told.si_code != _SI_KERNEL:
                os.kill(child, told.si_signo)
            if told.si_signo in _ENDING:
                deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)


def perform(work: Callable[[], int]) -> None:
    """Run `work` as the whole life of a forked process: its result is the exit code. Never returns.

    SystemExit is respected, Ctrl-C is 130; any other exception prints its traceback and is 3.
    """
    for number in (*_ENDING, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 3
    try:
        code = work()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # the reader of the pipe has gone
            code = code or 1
        os._exit(code)
