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
from agent.loop.metrics import LATENCIES
from agent.loop.npm import ClusterMetrics, NodeMetrics
from tests.loop.test_operators import filled
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


METRICS_HEAD = """# Metrics

Written from the sources. `/metrics` (`--metrics-address`) has these; histograms have the buckets {buckets}
(seconds). No label holds the name of a pod, a policy or an address.

| metric | type | labels | what it is |
|---|---|---|---|
"""
NPM_HEAD = """
With `--npm-metrics-address`, the names that dashboards of Azure NPM know, with its labels and units: times are
**milliseconds**, quantiles look back ten minutes. `npm_ipset_counts` has one series for each set.

| path | metric | type | what it is |
|---|---|---|---|
"""


def metrics_reference() -> str:
    """docs/metrics.md: a row for each family."""
    metrics = filled()
    rows = [METRICS_HEAD.format(buckets=", ".join(f"{bound:g}" for bound in LATENCIES))]
    for family in sorted(metrics.registry.collect(), key=lambda family: family.name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |\n")
    rows.append(NPM_HEAD)
    for path, registry in (("node", NodeMetrics().registry), ("cluster", ClusterMetrics(metrics).registry)):
        for family in registry.collect():
            rows.append(f"| `/{path}-metrics` | `{family.name}` | {family.type} | {family.documentation} |\n")
    return "".join(rows)


def test_the_metrics_reference_is_what_is_served() -> None:
    assert metrics_reference() == (DOCS / "metrics.md").read_text()


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
    (DOCS / "metrics.md").write_text(metrics_reference())
    for each in SCHEMAS:
        (DOCS / "schemas" / f"{each}.json").write_text(schema(each))
