"""`apply`: enforce what files say, once, in this network namespace."""

from __future__ import annotations

from contextlib import closing
from time import perf_counter

import click

from agent.cli.options import (
    PATIENCE,
    backend_option,
    chosen_backend,
    input_options,
    multicast_option,
    waiting_for,
)
from agent.cli.output import Applied, Counts, Writes, output_option, print_json
from agent.cli.sources import no_such_node, node_state, read_inventory, warn
from agent.core.node import Node
from agent.dataplane.applied import dispatched
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.environment import problems
from agent.dataplane.lock import only_writer
from agent.dataplane.render import Options
from agent.dataplane.report import plural


@click.command()
@input_options
@click.option("--node", "node_name", required=True, help="The node whose pods are judged here, as in spec.nodeName.")
@backend_option
@multicast_option
@output_option
def apply(
    files: tuple[str, ...], namespace: str, node_name: str, backend: str, allow_multicast: bool, output: str
) -> None:
    """Enforce the policies of files on the pods of one node, in the current network namespace.

    Prints what it changed; a second time nothing is written. Pods count as they are: what a Deployment would create
    is not enforced (see `lab`). Rules of other programs are left alone.

    \b
    Examples:
      kubectl get ns,pods,netpol -A -o yaml | netpol-agent apply -f - --node node1
      netpol-agent apply -f cluster.yaml -f policies/ --node node1 --backend nft -o json

    Exit codes: 0 enforced; 2 bad input, nothing was written; 3 the kernel refused, what was enforced before stays.
    """
    inventory = read_inventory(files, namespace)
    node = node_state(inventory, node_name)
    findings = [*inventory.findings, *no_such_node(inventory, node_name)]
    warn(findings)
    dataplane = Dataplane(chosen_backend(backend), options=Options(multicast=allow_multicast))
    with only_writer(PATIENCE, waiting_for), closing(dataplane):
        if not any(pod.node == node_name for pod in inventory.pods.values()):
            _refuse_to_open(dataplane, node_name)
        begin = perf_counter()
        report = dataplane.sync(node)
        report.add(dataplane.leave_other_backend())
        milliseconds = (perf_counter() - begin) * 1000
    result = Applied(
        node=node_name,
        backend=dataplane.backend.name,
        changed=report.writes > 0,
        writes=Writes.of(report),
        milliseconds=round(milliseconds, 1),
        counts=count(node),
        findings=tuple(findings),
        problems=problems(node),
    )
    if output == "json":
        print_json(result)
        return
    for problem in result.problems:
        click.secho(f"warning: {problem}", err=True, fg="yellow")
    counts = result.counts
    assert counts is not None
    click.echo(
        f"{node_name} ({result.backend}): {plural(counts.policies, 'policy')} in force, {counts.isolated_pods} of "
        f"{plural(counts.local_pods, 'pod')} isolated; {plural(counts.chains, 'class')}, "
        f"{plural(counts.sets, 'set')}, {plural(counts.members, 'member')}"
    )
    if result.changed:
        click.echo(f"changed: {report} in {result.milliseconds} ms")
    else:
        click.echo("unchanged: 0 kernel writes")


def _refuse_to_open(dataplane: Dataplane, node_name: str) -> None:
    """No pod of the input is on the node: a name mistyped, or input without pods, would take away all that is enforced
    here. Raises click.UsageError when something is."""
    isolated = {address for table in dataplane.read().tables.values() for address in dispatched(table)}
    if isolated:
        raise click.UsageError(
            f"no pod of the input is on node {node_name}, and {plural(len(isolated), 'address')} of pods would be "
            "opened here. Give this node's name, and its pods; if it has none any more, run clean"
        )


def count(node: Node) -> Counts:
    """The sizes of a node's desired state."""
    cluster = node.cluster
    return Counts(
        policies=len(node.enforced_policies),
        pods=len(cluster.pods),
        local_pods=sum(1 for pod in cluster.pods.values() if pod.local and pod.group is not None),
        isolated_pods=len(node.isolated_pods),
        sets=len(node.sets.active),
        members=sum(len(set(active.members())) for active in node.sets.active.values()),
        chains=len(node.chains),
    )
