"""Where the objects come from: files, directories, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from agent.core.findings import Finding
from agent.core.inventory import Inventory
from agent.core.node import Node, load

SUFFIXES = (".yaml", ".yml", ".json")


def read_inventory(files: Iterable[str], namespace: str) -> Inventory:
    """All objects of the files. Raises BadInput for what cannot be decoded, click.UsageError for what is not there."""
    inventory = Inventory(namespace)
    for name, data in read_files(files):
        inventory.read(data, name)
    inventory.finish()
    return inventory


def read_files(files: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, bytes) of every file. Raises click.UsageError."""
    files = list(files)
    if not files:
        raise click.UsageError("no input: give -f FILE|DIR|- (as kubectl get ns,pods,netpol -A -o yaml prints it)")
    return list(_contents(files))


def _contents(files: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in files:
        path = Path(name)
        try:
            if name == "-":
                yield "stdin", sys.stdin.buffer.read()
            elif path.is_dir():
                found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
                if not found:
                    raise click.UsageError(f"{name}: holds no file that ends in {', '.join(SUFFIXES)}")
                for file in found:
                    yield str(file), file.read_bytes()
            else:
                yield name, path.read_bytes()
        except OSError as error:
            raise click.UsageError(f"{name}: {error.strerror}") from error


def node_state(inventory: Inventory, name: str | None) -> Node:
    """The desired state of one node from real pods; workloads are not counted."""
    return load(Node(name), inventory.namespaces.values(), inventory.pods.values(), inventory.policies.values())


def no_such_node(inventory: Inventory, name: str) -> list[Finding]:
    """A finding when pods of the input are on nodes, and none on this: its name may be mistyped."""
    nodes = sorted({pod.node for pod in inventory.pods.values() if pod.node})
    if name in nodes or not nodes:
        return []
    message = f"no pod of the input is on it; the nodes with pods are {', '.join(nodes)}"
    return [Finding("node-without-pods", f"Node {name}", "", message)]


def warn(findings: Iterable[Finding]) -> None:
    """Each finding once, on standard error."""
    for finding in dict.fromkeys(findings):
        click.secho(f"warning: {finding}", err=True, fg="yellow")
