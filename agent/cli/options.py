"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
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


def cluster_options(function: F) -> F:
    """`--kubeconfig` and `--context`."""
    function = click.option("--context", metavar="NAME", help="Context of the kubeconfig.")(function)
    return click.option(
        "--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, the pod's service account, ~/.kube/config."
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


def chosen_backend(name: str, *, programmed: bool = False) -> Backend:
    """The backend of the flag; by itself the one to write, or the one that is `programmed`."""
    return detect(programmed=programmed) if name == "auto" else Backend(name)


PATIENCE = 10.0
"""Seconds that a verb which writes waits for another one to end."""


def waiting_for(holder: str) -> None:
    """Say whom we wait for."""
    click.secho(f"waiting for another netpol-agent ({holder})", err=True, fg="yellow")
