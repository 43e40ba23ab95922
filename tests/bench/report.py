"""docs/benchmarks.md and its plot."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.suite import GROWTH, Benchmark, Result, Row, duration, mebibytes

INTRODUCTION = """\
Every figure is from one run on this machine. Each benchmark is a process of its own in namespaces of its own, measured
from the bytes of objects as the API server sends them (pods of 4.8 kB) until the kernel holds the result. All pods have
an IPv4 and an IPv6 address. The benchmarks run at nice -10, since others use this machine too.
`python -m tests.bench --only NAME` repeats a row."""
PACKETS = """\
Five nodes stand side by side, each with a client and a server behind it: two without an agent, and three with 0, 10 and
1,000 policies in the cluster and 250 local pods, each of its own class. All have the rules that kube-proxy writes for
20 Services, so that connections are tracked and looked up with and without an agent. Slices of load of a few
milliseconds go to one after the other on one processor; a ratio is the median over the rounds, with its quartiles. The
second node without an agent shows how much two equal nodes differ.

The client is allowed by the second peer of a rule. A connection is opened, asked, answered and closed. A first packet
is one datagram from each of 1,000 sockets. The cost of forwarding is that of the same packets put ready-made on the
client's interface, less the time that this takes by itself."""
LIVE = """\
Where a row says "in the API server", the objects are in a real one (`tests/bench/live`): pods of 5.2 kB on nodes that
exist as objects only. `run` is at work in network namespaces of its own on the machine of the API server, and shares
its processors with it; what they say to each other passes a process that hands it on. From one pod's namespace to the
other's goes a packet every half millisecond, each the first of its flow. It is judged anew when the first one arrives
that did not before, or, for what is closed, when the first is sent that does not arrive. Beside that time is the one
from before the API call was made; what lies between is the API server's answer."""
NO_LIVE = "What needs an API server was not measured: set KUBECONFIG."
MET = {True: "yes", False: "**no**", None: ""}


def write(
    path: Path,
    benchmarks: Sequence[Benchmark],
    found: dict[str, list[Result]],
    *,
    seconds: float,
    load: float,
    quick: bool,
) -> None:
    """The whole report; what was not measured this time is not in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(b, row) for b in benchmarks if found[b.name] for row in b.rows(found[b.name])]
    judged = [(b, row) for b, row in rows if row.met is not None]
    others = [(b, row) for b, row in rows if row.met is None]
    missed = list(dict.fromkeys((row.aim, row.reason, row.work) for _, row in judged if row.met is False))
    met = sum(1 for _, row in judged if row.met)
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench{' QUICK=1' if quick else ''}`: {met} of {len(judged)} aims met in this run.",
        "",
        *_machine(seconds, load),
        "",
        INTRODUCTION,
        "",
        *_table(judged, aims=True),
        "",
        *_reasons(missed),
        *_packets(benchmarks),
        *_live(benchmarks, found),
        *(["## Beside the aims", "", *_table(others, aims=False), ""] if others else []),
    ]
    if all(f"growth-{over}-{sizes[over]}" in found for over, series in GROWTH.items() for sizes in series):
        plot = path.with_suffix(".svg")
        _plot(plot, found)
        lines += [
            "## How it grows",
            "",
            f"![Time and memory over pods and policies]({plot.name})",
            "",
            *_growth(found),
            "",
        ]
    path.write_text("\n".join(lines))


def _machine(seconds: float, load: float) -> list[str]:
    def version(program: str) -> str:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "kernel": platform.release(),
        "iptables, ipset": f"{version('iptables')}; {version('ipset').splitlines()[0]}",
        "Python": platform.python_version(),
        "load when it began; duration": f"{load:.1f} (a virtual machine whose cores are shared); {seconds:.0f} s",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _table(rows: Sequence[tuple[Benchmark, Row]], *, aims: bool) -> list[str]:
    head = ["| work | `--only` | measured | aim | met |", "|---|---|---|---|---|"]
    if not aims:
        head = ["| work | `--only` | measured |", "|---|---|---|"]
    for benchmark, row in rows:
        cells = [row.work, f"`{benchmark.name}`", row.measured, *([row.aim, MET[row.met]] if aims else [])]
        head.append("| " + " | ".join(cells) + " |")
    return head


def _reasons(missed: Sequence[tuple[str, str, str]]) -> list[str]:
    if not missed:
        return []
    lines = ["## Aims missed", ""]
    for reason in dict.fromkeys(reason for _, reason, _ in missed):
        works = "; ".join(work for _, why, work in missed if why == reason)
        lines += [f"- {works}: {reason or 'no reason is known; to be measured again on a quiet machine'}."]
    return [*lines, ""]


def _packets(benchmarks: Sequence[Benchmark]) -> list[str]:
    if not any(b.function == "datapath" for b in benchmarks):
        return []
    return ["## How packets are measured", "", PACKETS, ""]


def _live(benchmarks: Sequence[Benchmark], found: dict[str, list[Result]]) -> list[str]:
    live = [b for b in benchmarks if b.live]
    if not live:
        return []
    text = LIVE if all(found[b.name] for b in live) else NO_LIVE
    return ["## How an agent beside an API server is measured", "", text, ""]


def _growth(found: dict[str, list[Result]]) -> list[str]:
    lines = [
        "| pods | policies | cold start | resident memory | chains | sets | members |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for over, series in GROWTH.items():
        for sizes in series:
            result = found[f"growth-{over}-{sizes[over]}"][0]
            size = result["sizes"]
            cells = [
                f"{sizes['pods']:,}",
                f"{sizes['policies']:,}",
                duration(result["seconds"]),
                mebibytes(result["memory"]["resident"]),
                *(f"{size[name]:,}" for name in ("chains", "sets", "members")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _plot(path: Path, found: dict[str, list[Result]]) -> None:
    """Time and memory (rows) over pods and policies (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "netpol-agent", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    from matplotlib import pyplot
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(8.5, 5.2), sharey="row", sharex="col", layout="constrained")
    labels = {"pods": "pods in the cluster (100 policies)", "policies": "policies in the cluster (20,000 pods)"}
    for column, (over, series) in enumerate(GROWTH.items()):
        results = [found[f"growth-{over}-{sizes[over]}"][0] for sizes in series]
        across = [sizes[over] for sizes in series]
        for axis, values, color in (
            (axes[0][column], [r["seconds"] for r in results], "#2563eb"),
            (axes[1][column], [r["memory"]["resident"] for r in results], "#b45309"),
        ):
            axis.plot(across, values, marker="o", color=color, linewidth=1.8, markersize=4)
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", alpha=0.3)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes[1][column].set_xlabel(labels[over])
    axes[0][0].set_ylabel("cold start, seconds")
    axes[1][0].set_ylabel("resident memory, MiB")
    figure.suptitle("From the bytes of all objects to the programmed kernel, 100 pods local")
    figure.savefig(path, metadata={"Date": None})
