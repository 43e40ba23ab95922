"""Options that several verbs share."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from agent.dataplane.iptables import BACKENDS, Backend, detect

F = TypeVar("F", bound=Callable[..., Any])


def input_options(function: F) -> F:
    """`-f` and `-n`."""
    function = click.option(
        "-n", "--namespace", default="default", help="Namespace of objects that name none.", show_default=True
    )(function)
    return click.option(
        "-f",
        "--filename",
        "files",
        multiple=True,
        metavar="FILE|DIR|-",
        help="Manifests: YAML or JSON, a directory of them, or - for standard input. May be given several times.",
    )(function)


def backend_option(function: F) -> F:
    """`--backend auto|nft|legacy`."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", *BACKENDS]),
        default="auto",
        help="Which iptables to write; auto is the one that kubelet and kube-proxy use here.",
        show_default=True,
    )(function)


def multicast_option(function: F) -> F:
    """`--allow-multicast`."""
    return click.option(
        "--allow-multicast",
        is_flag=True,
        help="Leave bridged broadcast and multicast open beside isolated pods.",
    )(function)


def chosen_backend(name: str) -> Backend:
    """The backend of the flag."""
    return detect() if name == "auto" else Backend(name)


_LOCK = Path("/run/netpol-agent.lock")


@contextmanager
def only_writer() -> Iterator[None]:
    """Wait until no other netpol-agent writes on this host: two plans from one reading of the kernel would mix.

    Where the lock cannot be had, the kernel refuses the rest as well, or there is nobody else (a read-only /run)."""
    try:
        file = _LOCK.open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
