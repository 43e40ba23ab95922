"""`clean`: take away all that is ours."""

from __future__ import annotations

from contextlib import closing
from time import perf_counter

import click

from agent.cli.options import PATIENCE, backend_option, chosen_backend, waiting_for
from agent.cli.output import Applied, Writes, output_option, print_json
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.lock import only_writer


@click.command()
@backend_option
@click.option(
    "--patience",
    type=click.FloatRange(0, 3600),
    default=PATIENCE,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a netpol-agent that is at work here to end.",
)
@output_option
def clean(backend: str, patience: float, output: str) -> None:
    """Take away every chain, rule and set of netpol-agent in this network namespace, and nothing else.

    Works from any half-made state, on both iptables backends. Traffic is no longer judged afterwards.

    \b
    Examples:
      netpol-agent clean
      netpol-agent clean --patience 300 -o json

    Exit codes: 0 nothing of ours is left; 3 the kernel refused, or an agent is still at work.
    """
    dataplane = Dataplane(chosen_backend(backend))
    with only_writer(patience, waiting_for), closing(dataplane):
        begin = perf_counter()
        report = dataplane.clean()
        milliseconds = round((perf_counter() - begin) * 1000, 1)
    if output == "json":
        print_json(
            Applied("", dataplane.backend.name, report.writes > 0, Writes.of(report), milliseconds, None, (), ())
        )
    elif report.writes:
        click.echo(f"clean: {report} in {milliseconds} ms")
    else:
        click.echo("clean: nothing of ours is here")
