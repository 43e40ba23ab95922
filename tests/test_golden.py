"""What is rendered for a small cluster, as text in the repository, and the schemas of `-o json`.

Run `python -m tests.test_golden` after a meant change, and read the difference."""

from __future__ import annotations

import re
from pathlib import Path

import click
import msgspec
import pytest

from agent.cli.main import cli
from agent.cli.output import SCHEMAS
from agent.core.inventory import Inventory
from agent.core.node import Node, load
from agent.dataplane.render import OPTIONS, render
from tests.nodes import Kernel

HERE = Path(__file__).parent / "golden"
DOCS = Path(__file__).parent.parent / "docs"


def rendered(name: str) -> str:
    inventory = Inventory()
    inventory.read((HERE / f"{name}.yaml").read_bytes(), f"{name}.yaml")
    inventory.finish()
    parts = (inventory.namespaces, inventory.pods, inventory.policies)
    return render(load(Node("node1"), *(part.values() for part in parts)), OPTIONS)


def schema(name: str) -> str:
    made = msgspec.json.schema(SCHEMAS[name])
    return msgspec.json.format(msgspec.json.encode(made), indent=2).decode() + "\n"


CLI_HEAD = """# The command line

Written from the help texts. Exit codes: 0 done or allowed; 1 denied or findings, as each verb says; 2 usage or bad
input, nothing was written; 3 could not (no permission, the kernel refused), what was enforced before stays. Warnings
and errors go to standard error, one a line: `FILE:LINE: Kind namespace/name: field: sentence [id]`; ids are stable.
Colours come on terminals only.

`-o json` prints one document. Its schema: [apply](schemas/apply.json), [clean](schemas/clean.json),
[render](schemas/render.json), [status](schemas/status.json), [lab matrix and probe](schemas/lab.json),
[lab up](schemas/lab-up.json), [lab list](schemas/lab-list.json), [lab apply](schemas/lab-apply.json),
[lab play](schemas/lab-play.json). Fields may be added, never changed.
"""


def cli_reference() -> str:
    """docs/cli.md: the help of each verb."""
    parts = [CLI_HEAD]

    def walk(command: click.Command, path: str) -> None:
        help_names = ["-h", "--help"]
        context = click.Context(
            command, info_name=path, terminal_width=100, max_content_width=100, help_option_names=help_names
        )
        parts.append(f"## {path}\n\n```\n{command.get_help(context).strip()}\n```\n")
        for name, below in sorted(getattr(command, "commands", {}).items()):
            walk(below, f"{path} {name}")

    walk(cli, "netpol-agent")
    return "\n".join(parts)


def test_the_command_line_reference_is_the_help() -> None:
    assert cli_reference() == (DOCS / "cli.md").read_text()


def test_every_finding_is_documented() -> None:
    """Each id that the sources name where they find something, and no other."""
    calls = re.compile(r"(?:fault|find|Finding|_wrong|_?bad)\(\s*(?:file, )?\"([a-z]+(?:-[a-z]+)+)\"")
    agent = DOCS.parent / "agent"
    used = {id for path in agent.rglob("*.py") for id in calls.findall(path.read_text())}
    documented = set(re.findall(r"^\| `([a-z-]+)`", (DOCS / "findings.md").read_text(), re.MULTILINE))
    assert used == documented


NAMES = sorted(path.stem for path in HERE.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_rendered(name: str) -> None:
    assert rendered(name) == (HERE / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_rendered_loads_into_an_empty_kernel(name: str) -> None:
    kernel = Kernel()
    sets, *tables = rendered(name).split("*filter")
    kernel.sets.apply_restore("\n".join(line for line in sets.splitlines() if not line.startswith("#")))
    for version, text in zip((4, 6), tables):
        kernel.tables[version].apply("*filter" + text.partition("\n#")[0] + "\n")
    assert kernel.sets


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema(name: str) -> None:
    assert schema(name) == (DOCS / "schemas" / f"{name}.json").read_text()


if __name__ == "__main__":
    for each in NAMES:
        (HERE / f"{each}.txt").write_text(rendered(each))
    (DOCS / "cli.md").write_text(cli_reference())
    for each in SCHEMAS:
        (DOCS / "schemas" / f"{each}.json").write_text(schema(each))
