"""`python -m tests.bench`: measure, print, and write docs/benchmarks.md with its plot.

Each benchmark is a process of its own in network, mount and process namespaces of its own, which end with it."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

from tests.bench import report
from tests.bench.live.api import Api, unavailable
from tests.bench.live.enclosure import UNSHARE
from tests.bench.live.load import unload
from tests.bench.suite import BENCHMARKS, Benchmark, Result

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", help="names that begin with this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: to see that it works")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the report here (the plot beside it)")
    parser.add_argument("--list", action="store_true", help="the names")
    parser.add_argument("--keep", action="store_true", help="leave in the API server what was loaded into it")
    options = parser.parse_args()
    chosen = [b for b in BENCHMARKS if not options.only or any(b.name.startswith(n) for n in options.only)]
    if options.list or not chosen:
        sys.exit("\n".join(b.name for b in BENCHMARKS))
    begin = monotonic()
    found: dict[str, list[Result]] = {}
    load = os.getloadavg()[0]
    why = unavailable() if any(b.live for b in chosen) else ""
    try:
        for benchmark in chosen:
            if benchmark.live and why:
                print(f"{benchmark.name}: not measured: {why}", flush=True)
                found[benchmark.name] = []
                continue
            found[benchmark.name] = run(benchmark, quick=options.quick)
            for row in benchmark.rows(found[benchmark.name]):
                mark = {True: "met", False: "MISSED", None: ""}[row.met]
                print(f"{row.work}\n    {row.measured}\n    {row.aim} {mark}".rstrip(), flush=True)
    finally:
        if any(b.live for b in chosen) and not why and not options.keep:
            unload(Api())
    seconds = monotonic() - begin
    print(f"{len(chosen)} benchmarks in {seconds:.0f} s")
    if options.out:
        report.write(options.out, chosen, found, seconds=seconds, load=load, quick=options.quick)


def run(benchmark: Benchmark, *, quick: bool) -> list[Result]:
    """The results of its processes, one after the other."""
    arguments = {**benchmark.arguments, **(benchmark.quick if quick else {})}
    times = 1 if quick else benchmark.times
    return [_one(benchmark.function, json.dumps(arguments), live=benchmark.live) for _ in range(times)]


def _one(function: str, arguments: str, *, live: bool) -> Result:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = [
        "unshare",
        *user,
        *([] if live else ["--net"]),
        *UNSHARE,
        sys.executable,
        "-m",
        "tests.bench.worker",
        function,
        arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, preexec_fn=_die_with_us)
    try:
        output = process.communicate()[0]
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        sys.exit(f"{function} {arguments} failed")
    result: Result = json.loads(output.splitlines()[-1])
    return {**result, "arguments": json.loads(arguments)}


def _die_with_us() -> None:
    """The kernel ends the enclosure, and with it all that is inside, when this process ends, however it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
