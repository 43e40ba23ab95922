"""`status`: what is programmed here, and whether it drifted."""

from __future__ import annotations

import click

from agent.cli.options import backend_option, chosen_backend, input_options, multicast_option
from agent.cli.output import Status, StatusClass, StatusSet, output_option, print_json
from agent.cli.sources import node_state, read_inventory
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.environment import problems
from agent.dataplane.inspect import ProgrammedClass, drift, drift_from, programmed_classes
from agent.dataplane.render import Options
from agent.dataplane.report import plural


@click.command()
@input_options
@click.option("--node", "node_name", help="With -f: compare with what this node should have.")
@backend_option
@multicast_option
@output_option
@click.pass_context
def status(
    context: click.Context,
    files: tuple[str, ...],
    namespace: str,
    node_name: str | None,
    backend: str,
    allow_multicast: bool,
    output: str,
) -> None:
    """Show what is programmed in this network namespace, and whether somebody changed it.

    Chains and their rules are checked against the hashes in their names, the jump from FORWARD by its place. With
    -f and --node everything, set members too, is compared with what the files ask for.

    \b
    Examples:
      netpol-agent status
      kubectl get ns,pods,netpol -A -o yaml | netpol-agent status -f - --node node1 -o json

    Exit codes: 0 as programmed; 1 drifted, or not programmed at all; 2 bad input; 3 could not read the kernel.
    """
    if bool(files) != bool(node_name):
        raise click.UsageError("-f and --node go together")
    options = Options(multicast=allow_multicast)
    dataplane = Dataplane(chosen_backend(backend, programmed=True), options=options)
    try:
        applied = dataplane.read()
    finally:
        dataplane.close()
    classes = programmed_classes(applied)
    node = node_state(read_inventory(files, namespace), node_name) if node_name else None
    drifted = drift(applied) if node is None else drift_from(node, applied, options)
    result = Status(
        backend=dataplane.backend.name,
        programmed=any(table.chains for table in applied.tables.values()),
        classes=tuple(_class(c) for c in classes),
        sets=tuple(StatusSet(n, s.kind, s.family, len(s.members)) for n, s in sorted(applied.sets.items())),
        drift=tuple(drifted),
        problems=problems(node),
    )
    if output == "json":
        print_json(result)
    else:
        _print(result)
    context.exit(0 if result.programmed and not result.drift else 1)


def _class(found: ProgrammedClass) -> StatusClass:
    return StatusClass(found.chain, found.family, found.direction, found.pods, found.policies, found.rules)


def _print(result: Status) -> None:
    if not result.programmed:
        click.echo(f"nothing is programmed here ({result.backend})")
    else:
        members = sum(s.members for s in result.sets)
        sizes = ", ".join(
            (plural(len(result.classes), "class"), plural(len(result.sets), "set"), plural(members, "member"))
        )
        click.echo(f"backend {result.backend}: {sizes}")
        for found in result.classes:
            click.echo(
                f"  IPv{found.family} {found.direction.lower():7} {found.chain}  {plural(found.rules, 'rule')}"
                f"  pods {', '.join(found.pods) or 'none'}  policies {', '.join(found.policies)}"
            )
    for line in result.drift:
        click.secho(f"drift: {line}", fg="red")
    for line in result.problems:
        click.secho(f"problem: {line}", fg="yellow")
    if result.programmed and not result.drift:
        click.secho("as programmed", fg="green")
