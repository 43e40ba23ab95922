"""netpol-agent: the command and its exit codes."""

from __future__ import annotations

import sys

import click

from agent import __version__
from agent.cli.apply import apply
from agent.cli.clean import clean
from agent.cli.exits import exit_code
from agent.cli.lab import lab
from agent.cli.render import render
from agent.cli.run import run
from agent.cli.status import status
from agent.cli.wait_clean import wait_clean


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="netpol-agent")
def cli() -> None:
    """Enforce Kubernetes NetworkPolicy on a node with iptables and ipset, and say why.

    \b
    Examples:
      netpol-agent run --node "$(hostname)"
      kubectl get ns,pods,netpol -A -o yaml | netpol-agent apply -f - --node "$(hostname)"
      netpol-agent render -f manifests/ --node node1
      netpol-agent lab matrix -f manifests/

    \b
    Exit codes: 0 done or allowed; 1 denied or findings; 2 usage or bad input; 3 could not.
    """


for command in (run, apply, render, status, clean, wait_clean, lab):
    cli.add_command(command)


def main() -> None:
    """The entry point: runs a verb, and turns what it raises into one error and an exit code."""
    sys.exit(exit_code(lambda: cli.main(standalone_mode=False)))
