"""The troubleshooting document leaves nothing out: alerts, findings, metrics, errors, exit codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import yaml

from agent.cli import exits
from agent.dataplane.errors import ADVICE
from agent.kube.errors import ApiError
from tests.chart.helm import CHART, ROOT
from tests.docs.test_documents import headings

DOCS = ROOT / "docs"
PATH = DOCS / "troubleshooting.md"
TEXT = PATH.read_text()


def section(title: str) -> str:
    """From one heading to the next of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}$\n(.*?)(?=^#{{1,2}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def first_column(title: str) -> list[str]:
    """What is in code in the first column of a section's tables."""
    rows = re.findall(r"^\| (.*?) \|", section(title), re.MULTILINE)
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row)]


def described(file: str) -> set[str]:
    """The first column of a document that tests/test_golden.py holds against the sources."""
    return set(re.findall(r"^\| `([\w-]+)`", (DOCS / file).read_text(), re.MULTILINE))


def test_every_alert_has_a_heading_where_its_runbook_says() -> None:
    (group,) = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]
    rules = group["rules"]
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"docs/troubleshooting.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in headings(PATH), rule["alert"]
    alerts = re.findall(r"^### (\w+)$", TEXT, re.MULTILINE)
    assert alerts == [rule["alert"] for rule in rules], "in the order of the file, and no other"


def test_every_finding() -> None:
    documented = first_column("Findings")
    assert set(documented) == described("findings.md")
    assert len(documented) == len(set(documented))


def test_which_findings_end_a_command() -> None:
    said = set(re.findall(r"^\| `([a-z-]+)` \*\*2\*\*", section("Findings"), re.MULTILINE))
    assert said == set(re.findall(r"^\| `([a-z-]+)` .* exit 2 \|$", (DOCS / "findings.md").read_text(), re.MULTILINE))


def test_every_metric() -> None:
    documented = first_column("Metrics")
    assert set(documented) == described("metrics.md")
    assert len(documented) == len(set(documented))


def test_every_metric_of_npm() -> None:
    known = set(re.findall(r"^\| `/\S+` \| `(npm_\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    assert known
    text = (DOCS / "migrating-from-npm.md").read_text()
    assert known <= set(re.findall(r"`(npm_\w+)`", text[text.index("\n## Metrics\n") :]))


def test_every_word_of_the_kernel_with_advice() -> None:
    documented = first_column("The kernel's words")
    assert {words for words, _ in ADVICE} <= set(documented)


def test_every_error_of_the_api_server() -> None:
    def kinds(error: type[ApiError]) -> Iterator[str]:
        yield error.kind
        for below in error.__subclasses__():
            yield from kinds(below)

    assert set(first_column("The API server's words")) == set(kinds(ApiError)) - {"configuration"}
    assert "`configuration`" in section("The API server's words")


def test_stages() -> None:
    """Those of a sync, as the metric's help has them."""
    told = re.search(r"each stage of a sync took: (.*?)\. \|", (DOCS / "metrics.md").read_text())
    assert told
    stages = re.sub(r" \(.*?\)", "", told[1]).split(", ")
    assert set(first_column("NetpolAgentSlowEnforcement")) == set(stages)
    refusing = set(re.findall(r"`(\w+)`", section("The kernel's words").partition("\n|")[0])) - {"stage"}
    assert refusing - {"netpol_agent_kernel_failures_total"} <= set(stages)


def said_by_the_agent() -> str:
    """All string constants of the sources."""
    found = []
    for path in (ROOT / "agent").rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        found += [value for value in constants if isinstance(value, str)]
    return "\n".join(found)


@pytest.mark.parametrize("title", ["What /readyz says", "The kernel's words"])
def test_what_is_quoted_is_said(title: str) -> None:
    said = said_by_the_agent()
    for words in first_column(title):
        assert words in said, words


def test_what_keeps_an_agent_from_being_ready() -> None:
    """Each reason that agent/loop and agent/dataplane/environment.py can give has a row."""
    rows = " ".join(first_column("What /readyz says"))
    for words in (
        "nothing has been enforced yet",
        "the first list is not complete",
        "the kernel refuses:",
        "is --node right?",
        "kube-proxy runs in IPVS mode",
        "passes by iptables and is not judged",
        "no answer from the API server:",
    ):
        assert words in rows
    assert "the writer has been stuck for" in section("What /readyz says")


def test_exit_codes() -> None:
    rows = set(re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE))
    codes = (exits.DONE, exits.FINDINGS, exits.BAD_INPUT, exits.COULD_NOT, exits.INTERRUPTED)
    assert {str(code) for code in codes} <= rows
