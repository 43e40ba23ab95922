"""`lab`: a node and its pods on this machine in network namespaces, from manifests to packets."""

from __future__ import annotations

import click

from agent.cli.lab.asking import matrix, play, probe
from agent.cli.lab.held import apply, down, list_names, shell, up


@click.group()
def lab() -> None:
    """Make nodes and their pods on this machine, enforce the policies there, and ask who reaches whom.

    Every pod is a network namespace, every answer a packet: TCP, UDP, SCTP or ICMP, through the same iptables and
    ipset rules that the agent writes on a node. Needs root or a user namespace; nothing is left behind.

    \b
    Examples:
      netpol-agent lab matrix -f manifests/
      netpol-agent lab probe -f manifests/ shop/web-0 shop/db-0 5984
      netpol-agent lab up -f manifests/ && netpol-agent lab shell shop/web-0 -- ip addr
    """


for command in (matrix, probe, play, up, apply, shell, down, list_names):
    lab.add_command(command)
