"""A Prometheus of one's own, in this network namespace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.chart.helm import tool

PATIENCE = 60.0
WHERE = "127.0.0.1:19090"


class Prometheus:
    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of its HTTP API. Raises HTTPError for a query that is none."""
        url = f"http://{WHERE}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])


@contextmanager
def prometheus(folder: Path, jobs: list[dict[str, Any]], rules: Path | None = None) -> Iterator[Prometheus]:
    """Scrapes twice a second; it ends with the test."""
    program = tool("prometheus", "`make prometheus` fetches Debian's")
    document = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(document, sort_keys=False))
    log = open(folder / "log", "wb")  # noqa: SIM115
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={WHERE}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        made = Prometheus()
        until(lambda: _is_ready(process, folder / "log"))
        yield made
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def until(true: Callable[[], Any]) -> None:
    """Wait for what must become true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def _is_ready(process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        with urllib.request.urlopen(f"http://{WHERE}/-/ready", timeout=1):
            return True
    except OSError:
        return False
