"""The queries of the dashboard, as Grafana would send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.chart.helm import CHART

FILE = CHART / "dashboards/netpol-agent.json"


def panels() -> Iterator[dict[str, Any]]:
    """All but the rows."""
    for panel in json.loads(FILE.read_text())["panels"]:
        assert not panel.get("collapsed")
        if panel["type"] != "row":
            yield panel


def queries(*, node: str = ".*", interval: str = "1m") -> list[tuple[str, str]]:
    """Title and expression of every panel's every target, with variables filled in; and what the variables ask for."""
    found = [
        (f"{panel['title']}: {one['legendFormat']}", one["expr"]) for panel in panels() for one in panel["targets"]
    ]
    found.append(("variable node", 'netpol_agent_build_info{node!=""}'))
    return [(title, expr.replace("$__rate_interval", interval).replace("$node", node)) for title, expr in found]
