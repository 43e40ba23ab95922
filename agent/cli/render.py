"""`render`: the text that `apply` would load."""

from __future__ import annotations

import click

from agent.cli.options import input_options, multicast_option
from agent.cli.output import Rendered, output_option, print_json
from agent.cli.sources import no_such_node, node_state, read_inventory, warn
from agent.core.addresses import V4, V6
from agent.dataplane.render import Options, ipset_text, iptables_text
from agent.dataplane.render import render as render_text


@click.command()
@input_options
@click.option("--node", "node_name", required=True, help="The node whose pods are judged, as in spec.nodeName.")
@multicast_option
@output_option
def render(files: tuple[str, ...], namespace: str, node_name: str, allow_multicast: bool, output: str) -> None:
    """Print the ipset and iptables text that `apply` would load, without touching the kernel.

    Needs no permission. The text loads into an empty kernel with `ipset restore` and `iptables-restore --noflush`.

    \b
    Examples:
      netpol-agent render -f manifests/ --node node1
      netpol-agent render -f cluster.json --node node1 -o json | jq -r .ipset

    Exit codes: 0 printed; 2 bad input.
    """
    inventory = read_inventory(files, namespace)
    node = node_state(inventory, node_name)
    options = Options(multicast=allow_multicast)
    findings = [*inventory.findings, *no_such_node(inventory, node_name)]
    warn(findings)
    if output == "text":
        click.echo(render_text(node, options), nl=False)
        return
    print_json(
        Rendered(
            node=node_name,
            ipset=ipset_text(node),
            iptables=iptables_text(node, V4, options),
            ip6tables=iptables_text(node, V6, options),
            findings=tuple(findings),
        )
    )
