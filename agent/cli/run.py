"""`run`: the agent in a cluster."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import ExitStack, closing
from errno import EADDRINUSE
from time import monotonic, sleep

import click

from agent.cli.options import backend_option, chosen_backend, cluster_options, multicast_option
from agent.dataplane.dataplane import Dataplane
from agent.dataplane.lock import PAUSE, Turn
from agent.dataplane.render import Options
from agent.kube.connection import Connection, configuration_source
from agent.kube.events import Announcer
from agent.loop import logs
from agent.loop.agent import Agent
from agent.loop.health import NOT_YET, Health
from agent.loop.inbox import Inbox
from agent.loop.metrics import Metrics
from agent.loop.npm import ClusterMetrics, NodeMetrics
from agent.loop.server import Address, Paths, Server, answers, health_paths, metrics_path
from agent.loop.watching import Watching

LINGER = 1.0
"""Seconds that a set outlives its last rule, for other programs that list rules."""
PATIENCE = 300.0
"""Seconds that we wait for another writer to end: in a rolling update, the one before us, which ends when we run."""
CLOSING = 2.0
"""Seconds that the sockets of a process that ends may take to close."""
SWITCH = 0.001
"""Seconds after which a thread that decodes lets the writer have its turn."""


class _Listen(click.ParamType["Address | None"]):
    name = "host:port"

    def convert(
        self, value: str | Address | None, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address | None:
        if value in ("", "off") or not isinstance(value, str):
            return value if isinstance(value, Address) else None
        try:
            return Address.parse(value)
        except ValueError as error:
            self.fail(f"{error}; or off", param, ctx)


_LISTEN = _Listen()


@click.command()
@click.option(
    "--node",
    "node_name",
    required=True,
    envvar="NODE_NAME",
    show_envvar=True,
    help="The node whose pods are judged here, as in spec.nodeName.",
)
@cluster_options
@click.option(
    "--instance",
    default="",
    metavar="NAME:VERSION",
    help="What we are called by /readyz?instance=…, which tells whether this version could follow another one.",
)
@backend_option
@multicast_option
@click.option(
    "--health-address",
    type=_LISTEN,
    default="127.0.0.1:10093",
    show_default=True,
    help="Where /livez and /readyz are served; off for nowhere.",
)
@click.option(
    "--metrics-address",
    type=_LISTEN,
    default="127.0.0.1:10092",
    show_default=True,
    help="Where /metrics is served; off for nowhere. Prometheus needs an address of the node that it can reach.",
)
@click.option(
    "--npm-metrics-address",
    type=_LISTEN,
    default="off",
    show_default=True,
    help="Where Azure NPM's /node-metrics and /cluster-metrics are served; its port was 10091.",
)
@click.option(
    "--resync",
    type=click.IntRange(1, 3600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="How often the kernel is read to find what others changed; nftables tells at once besides.",
)
@click.option("--cleanup-on-exit", is_flag=True, help="Take away at SIGTERM what it enforces; else it stays in force.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--log-level", type=click.Choice(["info", "warning", "error"]), default="info", show_default=True)
def run(
    node_name: str,
    kubeconfig: str | None,
    context: str | None,
    instance: str,
    backend: str,
    allow_multicast: bool,
    health_address: Address | None,
    metrics_address: Address | None,
    npm_metrics_address: Address | None,
    resync: int,
    cleanup_on_exit: bool,
    log_format: str,
    log_level: str,
) -> None:
    """Watch the cluster, and enforce its policies on the pods of this node, in the current network namespace.

    Nothing is written before all namespaces, pods and policies are known; what an earlier run left stays in force until
    then, and is adopted. SIGTERM and SIGINT end within a second, and leave the rules in force.

    \b
    Examples:
      netpol-agent run --node "$(hostname)"
      netpol-agent run --node node1 --kubeconfig admin.conf --metrics-address 192.168.1.11:10092 --log-format json

    Exit codes: 0 told to stop; 2 usage; 3 no configuration, an address that cannot be listened on, or the kernel kept
    refusing. What is enforced stays in any case.
    """
    if not node_name.strip():
        raise click.UsageError("--node is empty: give the node's name, as kubectl get nodes has it")
    sys.setswitchinterval(SWITCH)
    logs.configure(log_format, log_level)
    connection = Connection(configuration_source(kubeconfig, context))
    inbox = Inbox()
    metrics, npm = Metrics(inbox), NodeMetrics()
    watching = Watching(connection, inbox, metrics)
    health = Health(watching.reasons)
    metrics.ready.set_function(lambda: float(not health.reasons()))
    metrics.in_sync.set_function(lambda: float(watching.complete))
    metrics.unenforceable.set_function(lambda: float(len(health.unenforceable)))
    announcer = Announcer(connection, node_name, lambda result: metrics.posted.labels(result).inc())
    dataplane = Dataplane(chosen_backend(backend), options=Options(multicast=allow_multicast), linger=LINGER)
    turn = Turn(PATIENCE, _wait_for, instance)
    waiting = _serve(
        (health_address, health_paths(health, instance, turn.why_not)),
        (metrics_address, metrics_path("/metrics", metrics.registry)),
        (npm_metrics_address, metrics_path("/node-metrics", npm.registry)),
        (npm_metrics_address, metrics_path("/cluster-metrics", ClusterMetrics(metrics).registry)),
    )

    def begin(prepared: bool) -> bool:
        """Whether it is our turn to write; then we answer where the agent before us did."""
        if not turn.has_come(prepared):
            health.enforcing = "" if prepared else NOT_YET
            return False
        health.enforcing = NOT_YET
        for address, paths in waiting.items():
            _take_over(address, paths)
        announcer.start()
        return True

    agent = Agent(
        node_name,
        dataplane,
        inbox,
        watching,
        metrics=metrics,
        npm=npm,
        health=health,
        announcer=announcer,
        resync=resync,
        begin=begin,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    with ExitStack() as ends:
        ends.callback(logs.flush)
        ends.enter_context(closing(dataplane))
        watching.start()
        agent.run()
        watching.stop()
        announcer.stop()
        if cleanup_on_exit and agent.adopted:
            dataplane.clean()


def _wait_for(holder: str) -> None:
    logs.log(logging.WARNING, f"waiting for another netpol-agent to end ({holder})")


def _serve(*wanted: tuple[Address | None, Paths]) -> dict[Address, Paths]:
    """One server for each address, with the paths of all that are wanted there. Those come back where another
    netpol-agent still answers; raises OSError where somebody else does."""
    servers: dict[Address, Paths] = {}
    for address, paths in wanted:
        if address is not None:
            servers[address] = {**servers.get(address, {}), **paths}
    return {address: paths for address, paths in servers.items() if not _listen(address, paths)}


def _listen(address: Address, paths: Paths) -> bool:
    """Whether we answer there now, or another netpol-agent does. Raises OSError."""
    deadline = monotonic() + CLOSING
    while True:
        try:
            Server(address, paths).start()
            return True
        except OSError as error:
            if error.errno == EADDRINUSE and answers(address):
                return False
            if error.errno != EADDRINUSE or monotonic() > deadline:
                raise OSError(f"cannot listen on {address}: {error.strerror}") from error
        sleep(PAUSE)


def _take_over(address: Address, paths: Paths) -> None:
    """Our turn has come: the process before us may still be closing what it had open. Raises OSError."""
    deadline = monotonic() + CLOSING
    while not _listen(address, paths):
        if monotonic() > deadline:
            raise OSError(f"cannot listen on {address}: a netpol-agent of another network namespace answers there")
        sleep(PAUSE)
