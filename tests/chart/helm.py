"""The chart as Helm renders it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/netpol-agent"
Object = dict[str, Any]


def tool(name: str, how: str) -> str:
    """Where a program is, in the virtual environment or on PATH; without it the test is skipped, and says so."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/usr/local/go/bin")
    return found or shutil.which(name) or pytest.skip(f"needs {name}: {how}")


def promtool() -> str:
    return tool("promtool", "`make prometheus` fetches Debian's")


def helm(*words: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
    """Run it, with values as a file."""
    program = tool("helm", "`make helm` builds it where there is Go")
    given = ["--values", "-"] if values is not None else []
    text = yaml.safe_dump(values) if values is not None else None
    return subprocess.run(
        [program, *words, *given], input=text, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )


def render(
    values: Object | None = None, *, release: str = "netpol-agent", namespace: str = "kube-system"
) -> list[Object]:
    """All objects, those of hooks, too."""
    done = helm("template", release, str(CHART), "--namespace", namespace, values=values or {})
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def find(objects: list[Object], kind: str, name: str) -> Object:
    """One object, by kind and name."""
    found = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    assert len(found) == 1, [f"{one['kind']} {one['metadata']['name']}" for one in objects]
    return found[0]


def events(one: Object) -> set[str]:
    """Of which events of Helm it is a hook."""
    told = one["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    return {event for event in told.split(",") if event}
