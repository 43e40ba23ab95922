"""What is rendered for a small cluster, as text in the repository, and the schemas of `-o json`.

Run `python -m tests.test_golden` after a meant change, and read the difference."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

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
    for each in SCHEMAS:
        (DOCS / "schemas" / f"{each}.json").write_text(schema(each))
