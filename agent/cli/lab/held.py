"""`lab up`, `apply`, `shell`, `down`, `list`: a lab that stays."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import click
import msgspec

from agent.cli.lab.ends import end_key
from agent.cli.lab.options import LabOptions, lab_options, name_option
from agent.cli.lab.running import inventory_of, joined, load_input, save_input, staged_from, with_name
from agent.cli.lab.show import enforced_of, print_enforced
from agent.cli.options import input_options
from agent.cli.output import LabList, LabPod, LabUp, output_option, print_json
from agent.cli.sources import read_files, warn
from agent.lab import enclosure, held
from agent.lab.lab import Lab


@click.command("up")
@lab_options
@name_option
@output_option
def up(wanted: LabOptions, name: str, output: str) -> None:
    """Make a lab that stays, with the policies of the files enforced, until `lab down`.

    \b
    Examples:
      netpol-agent lab up -f manifests/
      netpol-agent lab matrix
      netpol-agent lab apply -f manifests/ -f new-policy.yaml
      netpol-agent lab shell shop/web-0 -- curl -m 2 http://10.244.1.3
      netpol-agent lab down

    Exit codes: 0 it is up; 2 bad input, or one of this name is up; 3 no lab can be made here.
    """
    contents = read_files(wanted.files)
    inventory = inventory_of(contents, wanted.namespace)
    warn(inventory.findings)
    staged = staged_from(inventory, wanted)

    def work(ready: Callable[[dict[str, Any]], None]) -> int:
        running = Lab.start(staged, wanted.chosen())
        running.enforce(inventory, staged.pods)
        save_input(contents, wanted)
        ready(running.fabric.to_json())
        while True:
            signal.pause()

    try:
        enclosure.hold(name, work)
    except held.AlreadyHeld as error:
        raise click.UsageError(f"the lab {name!r} is up; take it down with: {with_name('down', name)}") from error
    if output == "json":
        pods = tuple(LabPod(pod.key, pod.addresses, pod.node) for pod in staged.fabric.pods)
        print_json(LabUp(name, tuple(node.name for node in staged.fabric.nodes), pods))
        return
    click.echo(f"lab {name!r} is up: {len(staged.fabric.nodes)} nodes, {len(staged.pods)} pods")
    for pod in staged.fabric.pods:
        click.echo(f"  {pod.key}  {' '.join(pod.addresses)}  on {pod.node}")
    for service in staged.services:
        ports = [f"{p.port}/{p.protocol}" + (f" (node port {p.node_port})" * bool(p.node_port)) for p in service.ports]
        click.echo(f"  {service.key}  {' '.join(service.cluster_ips) or 'headless'}  {', '.join(ports)}")


@click.command("apply")
@input_options
@name_option
@output_option
def apply(files: tuple[str, ...], namespace: str, name: str, output: str) -> None:
    """Enforce the files' policies, labels and namespaces in the held lab, in place of those before.

    The pods stay as they are: another set of pods is another lab.

    \b
    Examples:
      netpol-agent lab apply -f manifests/ -f edited-policy.yaml

    Exit codes: 0 enforced; 2 bad input or other pods; 3 the kernel refused, or no lab is up.
    """
    contents = read_files(files)
    inventory = inventory_of(contents, namespace)
    warn(inventory.findings)

    def work(topology: dict[str, Any]) -> int:
        wanted = msgspec.structs.replace(load_input()[1], namespace=namespace)
        running = Lab.join(topology, wanted.chosen())
        staged = staged_from(inventory, wanted, running.pods())
        if set(staged.pods) != set(running.pods()):
            different = sorted(set(staged.pods) ^ set(running.pods()))
            raise click.UsageError(f"other pods than the lab's ({', '.join(different[:3])}): take it down and up again")
        running.load_services(staged)
        enforced = running.enforce(inventory, staged.pods)
        save_input(contents, wanted)
        if output == "json":
            print_json(enforced_of(enforced))
        else:
            print_enforced(enforced)
        return 0

    raise SystemExit(joined(name, work))


@click.command("shell", context_settings={"ignore_unknown_options": True})
@name_option
@click.argument("end", metavar="POD|node/NAME|outside")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(name: str, end: str, command: tuple[str, ...]) -> None:
    """Run a command, or a shell, in the network of a pod, a node or the outside host of the held lab.

    \b
    Examples:
      netpol-agent lab shell shop/web-0
      netpol-agent lab shell node/node1 -- iptables -S NPA-FORWARD

    The exit code is the command's.
    """
    argv = list(command) or [os.environ.get("SHELL", "/bin/sh")]

    def work(topology: dict[str, Any]) -> int:
        running = Lab.join(topology, load_input()[1].chosen())
        key = end_key(running, end)
        if shutil.which(argv[0]) is None:
            click.secho(f"error: {argv[0]}: no such command", err=True, fg="red")
            return 127
        with running.fabric.inside(key):
            return os.spawnvp(os.P_WAIT, argv[0], argv)

    raise SystemExit(joined(name, work))


@click.command("down")
@name_option
def down(name: str) -> None:
    """End the held lab with all that runs in it; nothing is left.

    \b
    Examples:
      netpol-agent lab down

    Exit code 0, also when there was none.
    """
    click.echo(f"lab {name!r} is down" if enclosure.end(name) else f"no lab {name!r} is up")


@click.command("list")
@output_option
def list_names(output: str) -> None:
    """Print the names of the held labs."""
    names = tuple(name for name in held.names() if held.read(name) is not None)
    if output == "json":
        print_json(LabList(names))
    elif names:
        click.echo("\n".join(names))
