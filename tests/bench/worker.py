"""One benchmark in this process: `python -m tests.bench.worker NAME '{"argument": …}'` prints its result as JSON.

Only inside network and mount namespaces of its own: see tests.bench.enclosure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tests.bench import control, datapath
from tests.bench.live.enclosure import prepare

BENCHMARKS: dict[str, Callable[..., control.Result]] = {
    "cold": control.cold,
    "many_policies": control.many_policies,
    "remote": control.remote,
    "here": control.here,
    "edit": control.edit,
    "restart": control.restart,
    "idle": control.idle,
    "datapath": datapath.datapath,
    "crossover": control.crossover,
}
LIVE = {
    "live_event": "tests.bench.live.events:event",
    "live_start": "tests.bench.live.sizes:start",
    "live_processor": "tests.bench.live.sizes:processor",
}
"""Against an API server: the network is the machine's, and what is measured makes namespaces of its own. Imported only
then: a client of the API would count as memory of the others."""


def main() -> None:
    name, arguments = sys.argv[1:3]
    links = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if os.getpid() != 1 or ("eth0" in links and name not in LIVE):
        sys.exit("this is not a namespace of the benchmarks' own: run python -m tests.bench")
    prepare()
    function = _live(LIVE[name]) if name in LIVE else BENCHMARKS[name]
    with suppress(OSError):  # ahead of others on this machine, as a process and as a session
        os.nice(-10)
        Path("/proc/self/autogroup").write_text("-10")
    profile = os.environ.get("BENCH_PROFILE")
    if profile and name not in LIVE:
        import cProfile

        profiler = cProfile.Profile()
        result = profiler.runcall(function, **json.loads(arguments))
        profiler.dump_stats(profile)
    else:
        result = function(**json.loads(arguments))
    print(json.dumps(result))


def _live(where: str) -> Callable[..., control.Result]:
    module, _, name = where.partition(":")
    function: Callable[..., control.Result] = getattr(import_module(module), name)
    return function


if __name__ == "__main__":
    main()
