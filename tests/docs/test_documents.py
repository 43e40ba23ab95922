"""What the documents name is there: files, headings, targets of make, commands and options, values of the chart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from agent.cli.main import cli
from tests.chart.helm import CHART, ROOT, helm, render
from tests.docs.blocks import MARKS, Block, blocks, commands

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WRITTEN = [path for path in DOCUMENTS if path.name not in ("cli.md", "benchmarks.md")]
"""Those by hand; the others are made of what they describe."""
PROGRAMS = ("helm", "kubectl", "make", "netpol-agent")
"""Whose lines count as commands in blocks without a language, which hold what programs print, too."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=named)


def shell_lines(path: Path) -> Iterator[tuple[Block, str]]:
    """Every command of a document's blocks."""
    for block in blocks(path):
        for line in commands(block.text):
            if block.language == "bash" or (not block.language and line.split()[0] in PROGRAMS):
                yield block, line


def prose(path: Path) -> str:
    """A document without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(path: Path) -> str:
    """What is in `spans` and in blocks."""
    return "\n".join([*re.findall(r"`([^`\n]+)`", prose(path)), *(block.text for block in blocks(path))])


def headings(path: Path) -> set[str]:
    """The anchors that a heading has where the documents are read: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def words(line: str) -> list[str]:
    """Words and operators of a command line, without its comment."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split = True
    return list(reader)


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands that pipes and lists join, without redirections; also what follows `--` of another program."""
    command: list[str] = []
    skip = False
    for word in [*words(line), ";"]:
        if skip:
            skip = False
        elif re.fullmatch(r"[<>]+&?", word):
            skip = True
            if command and command[-1].isdigit():
                command.pop()
        elif re.fullmatch(r"[|&;]+", word):
            if command:
                yield command
                if "--" in command and command[0] != "netpol-agent":
                    yield command[command.index("--") + 1 :]
            command = []
        else:
            command.append(word)


@each(DOCUMENTS)
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        assert not target.startswith("http"), f"{target}: what is elsewhere may go away; say what it is"
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there), f"{target}: there are {sorted(headings(there))}"


@each(WRITTEN)
def test_files_that_are_named_are_there(path: Path) -> None:
    pattern = r"(?<![\w/.$~*-])((?:agent|charts|deploy|docs|tests)/[\w./-]*\w)"
    for name in re.findall(pattern, path.read_text()):
        assert any(ROOT.glob(re.sub(r"[A-Z]{3,}", "*", name))), name  # ARCH stands for something


@each(WRITTEN)
def test_targets_of_make_are_there(path: Path) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(re.findall(r"^make ([a-z][\w-]*)", code(path), re.MULTILINE)) <= set(phony[1].split())


@each(WRITTEN)
def test_our_own_commands_have_these_verbs_and_options(path: Path) -> None:
    for block, line in shell_lines(path):
        for command in simple_commands(line):
            if Path(command[0]).name == "netpol-agent":
                try:
                    parse(command[1:])
                except click.ClickException as error:
                    pytest.fail(f"{named(path)}:{block.line}: {line.strip()}: {error.format_message()}")


def parse(arguments: list[str]) -> None:
    """Have click read a command line without running it. Raises ClickException."""
    command: click.Command = cli
    name = "netpol-agent"
    while isinstance(command, click.Group):
        name, *arguments = arguments or [""]
        found = command.commands.get(name)
        if found is None:
            raise click.UsageError(f"there is no verb {name}")
        command = found
    command.make_context(name, list(arguments), **cli.context_settings)


def test_parsing_finds_mistakes() -> None:
    for wrong in (
        ["aply"],
        ["apply", "-f", "x"],
        ["status", "--nod", "x"],
        ["lab", "prob"],
        ["clean", "--patience", "x"],
    ):
        with pytest.raises(click.ClickException):
            parse(wrong)
    parse(["apply", "-f", "-", "--node", "$(hostname)"])
    line = 'kubectl exec x -- netpol-agent status 2>&1 | tail -1  # "not a quote'
    assert list(simple_commands(line))[:2] == [
        ["kubectl", "exec", "x", "--", "netpol-agent", "status"],
        ["netpol-agent", "status"],
    ]


# --- the chart --------------------------------------------------------------------------------------------------------


def helm_lines(path: Path) -> Iterator[list[str]]:
    """Helm's commands, as words."""
    for _, line in shell_lines(path):
        for command in simple_commands(line):
            if command[0] == "helm":
                yield command


@each(WRITTEN)
def test_helm_takes_these_options(path: Path) -> None:
    for command in helm_lines(path):
        verb = next(word for word in command[1:] if word in ("install", "upgrade", "test", "uninstall", "rollback"))
        known = helm(verb, "--help").stdout
        for option in {word.partition("=")[0] for word in command if word.startswith("-")}:
            assert re.search(rf"(^|[\s,]){re.escape(option)}[\s,]", known), f"helm {verb} has no {option}"


@each(WRITTEN)
def test_the_chart_takes_these_values(path: Path) -> None:
    for command in helm_lines(path):
        settings = [word for pair in pairwise(command) if pair[0] == "--set" for word in pair]
        if str(CHART.relative_to(ROOT)) in command:
            done = helm("template", "netpol-agent", str(CHART), *settings)
            assert done.returncode == 0, done.stderr
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for key in re.findall(r"--set ([\w.]+)", path.read_text()):
        assert has(values, key), key


def has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def test_values_that_the_documents_speak_of_are_there() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    heads = "|".join(values)
    for path in WRITTEN:
        spans = re.findall(r"`([^`\n]+)`", prose(path))
        for key in (span for span in spans if re.fullmatch(rf"(?:{heads})(?:\.[A-Za-z]+)+(?:=\S+)?", span)):
            if not key.endswith((".yaml", ".md", ".py")):
                assert has(values, key.partition("=")[0]), f"{named(path)}: {key}"


def test_objects_that_kubectl_is_asked_for_are_the_charts() -> None:
    """DaemonSets by name, and pods by their labels."""
    objects = render()
    daemonsets = {one["metadata"]["name"] for one in objects if one["kind"] == "DaemonSet"} | {"azure-npm"}
    templates = [one["spec"]["template"] for one in objects if "template" in one.get("spec", {})]
    for path in WRITTEN:
        text = code(path)
        assert set(re.findall(r"\b(?:daemonset|ds)[/ ]([a-z][a-z-]+)", text)) <= daemonsets, path
        for selector in re.findall(r"kubectl [^\n|]*-l ([\w./=,-]+)", text):
            wanted = dict(pair.split("=") for pair in selector.split(","))
            assert any(wanted.items() <= one["metadata"]["labels"].items() for one in templates), selector


# --- form -------------------------------------------------------------------------------------------------------------


@each(WRITTEN)
def test_blocks(path: Path) -> None:
    for block in blocks(path):
        assert block.mark in ("", *MARKS), f"{named(path)}:{block.line}: {block.mark}"
        if block.language == "yaml":
            list(yaml.safe_load_all(block.text))


@each(WRITTEN)
def test_no_line_is_too_long_to_read(path: Path) -> None:
    """Tables aside, and older documents."""
    if path.name in ("install.md", "migrating-from-npm.md", "troubleshooting.md"):
        assert not [line for line in prose(path).splitlines() if len(line) > 150 and not line.startswith("|")]


@each(DOCUMENTS)
def test_no_registry_is_named(path: Path) -> None:
    """Images have no host: whose registry it is, the reader knows."""
    text = path.read_text()
    images = re.findall(r"(?:--image[= ]|image: ?|repository=|docker (?:push|tag|load|pull|run) )([^\s`]+)", text)
    for image in images:
        host, slash, _ = image.strip("\"'").partition("/")
        assert not slash or host.startswith("$") or host == "dist" or not re.search(r"[.:]|localhost", host), image
    assert not re.findall(r"https?://(?!127\.|10\.|NODE|\$|localhost|\[)\S+", text)


def test_the_drawing_shows_the_files_of_the_table() -> None:
    """docs/architecture.md: its table of six, and the drawing's numbered boxes."""
    table = re.findall(r"^\| (\d)\. `agent/(\S+)`", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    drawing = (ROOT / "docs/architecture.svg").read_text()
    shown = re.findall(r'class="number"[^>]*>(\d)</text>\s*<text class="name[^>]*>([^<]+)</text>', drawing)
    assert shown == table
    for file in re.findall(r'class="name[^>]*>([\w/]+\.py)<', drawing):
        assert (ROOT / "agent" / file).exists(), file
    sources = "\n".join(one.read_text() for one in (ROOT / "agent").rglob("*.py"))
    for owner, function in re.findall(r">([A-Z]\w+)\.(\w+):", drawing):
        assert re.search(rf"^class {owner}\b", sources, re.MULTILINE), owner
        assert f"    def {function}(" in sources


def test_the_kind_cluster() -> None:
    """Its own plugin has an engine, so it is left out; kube-proxy is in a mode whose traffic can be judged."""
    cluster = yaml.safe_load((ROOT / "docs/kind/cluster.yaml").read_text())
    networking = cluster["networking"]
    assert (cluster["kind"], cluster["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    assert networking["disableDefaultCNI"] is True
    assert networking["kubeProxyMode"] in ("iptables", "nftables")
    assert networking["ipFamily"] == "dual"
    assert len(networking["podSubnet"].split(",")) == len(networking["serviceSubnet"].split(",")) == 2
