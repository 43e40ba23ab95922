"""`wait-clean`: wait until a clean-up DaemonSet has been everywhere."""

from __future__ import annotations

from time import monotonic, sleep

import click

from agent.cli.exits import DONE, FINDINGS
from agent.cli.options import cluster_options
from agent.dataplane.report import plural
from agent.kube.connection import Connection, configuration_source
from agent.kube.errors import ApiError, Refused
from agent.kube.rollout import Rollout, rollout

PAUSE = 1.0
"""Seconds between two questions."""


@click.command("wait-clean")
@click.argument("daemonset", metavar="DAEMONSET")
@click.option("-n", "--namespace", default="kube-system", show_default=True, help="Namespace of the DaemonSet.")
@click.option(
    "--timeout", type=click.FloatRange(0, 86400), default=300, show_default=True, metavar="SECONDS", help="How long."
)
@cluster_options
def wait_clean(daemonset: str, namespace: str, timeout: float, kubeconfig: str | None, context: str | None) -> int:
    """Wait until each pod of a DaemonSet whose init container runs `clean` is ready, so that each node is clean.

    `helm uninstall` runs it, so that it ends only when nothing is left on any node, or says where something may be.

    \b
    Examples:
      netpol-agent wait-clean netpol-agent-clean
      netpol-agent wait-clean netpol-agent-clean -n kube-system --timeout 600

    Exit codes: 0 all nodes are clean; 1 some were not within the time, each with the reason; 3 the API server did not
    tell.
    """
    connection = Connection(configuration_source(kubeconfig, context))
    deadline = monotonic() + timeout
    told: set[str] = set()
    while True:
        try:
            now = rollout(connection, namespace, daemonset)
        except ApiError as error:
            if monotonic() > deadline or (isinstance(error, Refused) and error.status in (403, 404)):
                raise
            if isinstance(error, Refused) and error.status == 401:
                connection.renew()
        else:
            for node in sorted(now.ready - told):
                click.echo(f"{node} is clean")
            told |= now.ready
            if now.done:
                click.echo(f"clean: {plural(len(now.ready), 'node')}")
                return DONE
            if monotonic() > deadline:
                _say_what_is_left(now, timeout)
                return FINDINGS
        sleep(PAUSE)


def _say_what_is_left(now: Rollout, timeout: float) -> None:
    for node, why in sorted(now.waiting.items()):
        click.secho(f"{node} is not clean: {why}", err=True, fg="red")
    desired = "an unknown number of" if now.desired is None else str(now.desired)
    click.secho(
        f"error: {len(now.ready)} of {desired} nodes are clean after {timeout:.0f} s. "
        "Helm takes the clean-up away now; for nodes that come back: kubectl apply -f deploy/netpol-agent-clean.yaml",
        err=True,
        fg="red",
    )
