"""`lab`: a node and its pods on this machine in network namespaces, from manifests to packets."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from agent.cli.options import backend_option, chosen_backend, input_options
from agent.cli.output import MatrixResult, output_option, print_json
from agent.cli.sources import read_files, warn
from agent.cli.tables import CHANGES, LEGEND, matrix_lines
from agent.core.findings import Finding
from agent.core.inventory import Inventory
from agent.dataplane.errors import KernelError
from agent.dataplane.iptables import Backend
from agent.lab import enclosure, held
from agent.lab.lab import Enforced, Lab
from agent.lab.matrix import Answer, Question, ask, mismatches, questions
from agent.lab.spec import Mode, PodSpec, family, node_key, plain
from agent.lab.staging import Port, Stage, Wishes, stage

F = TypeVar("F", bound=Callable[..., Any])
_INPUT = Path("/run/netpol-agent-lab-input.json")
"""Inside the enclosure only: what the held lab enforces."""


@click.group()
def lab() -> None:
    """Make nodes and their pods on this machine, enforce the policies there, and ask who reaches whom.

    Every pod is a network namespace, every answer a packet: TCP, UDP, SCTP or ICMP, through the same iptables and
    ipset rules that the agent writes on a node. Needs root or a user namespace; nothing is left behind.

    \b
    Examples:
      netpol-agent lab matrix -f manifests/
      netpol-agent lab probe -f manifests/ shop/web-0 shop/db-0 5984
      netpol-agent lab up -f manifests/ && netpol-agent lab shell shop/web-0 -- ip addr
    """


class LabOptions(msgspec.Struct, frozen=True):
    """What the options of a lab say."""

    files: tuple[str, ...]
    namespace: str
    nodes: int
    mode: Mode
    families: tuple[int, ...]
    replicas: int
    backend: str
    outside: tuple[str, ...]

    @property
    def wishes(self) -> Wishes:
        return Wishes(self.nodes, self.mode, self.families, self.replicas, self.outside)

    def chosen(self) -> Backend:
        """The backend; inside an enclosure there is nobody else to agree with."""
        return chosen_backend(self.backend)


_LAB_FIELDS = ("files", "namespace", "nodes", "mode", "families", "replicas", "backend", "outside")


def lab_options(function: F) -> F:
    """The options that shape a lab, gathered into one LabOptions as `wanted`."""

    def gathered(**arguments: Any) -> Any:
        fields = {name: arguments.pop(name) for name in _LAB_FIELDS}
        fields["families"] = tuple(int(part) for part in fields["families"].split(","))
        return function(wanted=LabOptions(**fields), **arguments)

    gathered.__name__, gathered.__doc__ = function.__name__, function.__doc__
    gathered.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    options = [
        click.option(
            "--nodes", type=click.IntRange(1, 50), default=2, show_default=True, help="At least so many nodes."
        ),
        click.option(
            "--mode",
            type=click.Choice(["routed", "bridged"]),
            default="routed",
            show_default=True,
            help="Pods behind host routes (ptp, Azure CNI), or on a bridge (bridge, flannel).",
        ),
        click.option(
            "--families",
            type=click.Choice(["4", "6", "4,6"]),
            default="4,6",
            show_default=True,
            help="Families of the addresses that are given to pods without any.",
        ),
        click.option(
            "--replicas",
            type=click.IntRange(1, 1000),
            default=2,
            show_default=True,
            help="At most so many pods of a workload that comes without its pods.",
        ),
        click.option(
            "--outside", multiple=True, metavar="IP", help="Address of the host outside the cluster; several times."
        ),
        backend_option,
        input_options,
    ]
    wrapped: Any = gathered
    for option in options:
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def _checked_name(_context: click.Context, _option: click.Parameter, value: str) -> str:
    if not held.is_name(value):
        raise click.BadParameter(f"{value!r} has to be letters, digits, - and _")
    return value


name_option = click.option(
    "--name", default="default", show_default=True, callback=_checked_name, help="The held lab's name."
)


# --- asking ----------------------------------------------------------------------------------------------------------


@lab.command("matrix")
@lab_options
@name_option
@click.option("--port", "ports", multiple=True, metavar="PORT[/PROTO]", help="Ask these instead: 80, 53/udp, icmp.")
@click.option("--services", is_flag=True, help="Ask the cluster addresses of Services, too.")
@click.option("--no-policies", is_flag=True, help="Leave the policies out, to see the network alone.")
@output_option
@click.argument("ends", nargs=-1, metavar="[END]...")
def matrix(
    wanted: LabOptions,
    name: str,
    ports: tuple[str, ...],
    services: bool,
    no_policies: bool,
    output: str,
    ends: tuple[str, ...],
) -> None:
    """Print who reaches whom, as packets found it, with any difference to what the policies say marked.

    Without -f the held lab (`lab up`) is asked. With ends, only these ask each other; one alone asks all, and is asked.
    An end is ns/pod, svc/ns/name, node/NAME or outside.

    \b
    Examples:
      netpol-agent lab matrix -f manifests/
      netpol-agent lab matrix -f manifests/ shop/web-0 svc/shop/api outside
      netpol-agent lab matrix -f manifests/ --mode bridged --port 80 --port icmp -o json

    Exit codes: 0 packets and policies agree; 1 they differ; 2 bad input; 3 no lab can be made here.
    """
    asked = tuple(parse_port(text) for text in ports)

    def work(running: Lab, staged: Stage, enforced: Enforced | None) -> int:
        keys = [resolve(running, staged, end, None)[0] for end in ends]
        found = questions(staged, running.fabric, ports=asked, ends=keys, with_services=services)
        answers = ask(running.fabric, running.expectation(staged), found)
        return show_matrix(answers, enforced, output)

    raise SystemExit(with_lab(wanted, name, work, policies=not no_policies))


@lab.command("probe")
@lab_options
@name_option
@output_option
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.argument("port", metavar="[PORT[/PROTO]]", default="")
def probe_command(wanted: LabOptions, name: str, output: str, source: str, destination: str, port: str) -> None:
    """Ask whether SRC reaches DST, with packets of each family that both have.

    Ends are ns/pod, svc/ns/name, node/NAME, an IP address, or outside; PORT is 80, 53/udp or icmp; without it the
    destination's own ports are asked. Without -f the held lab (`lab up`) is asked.

    \b
    Examples:
      netpol-agent lab probe -f manifests/ shop/web-0 svc/shop/api 8080
      netpol-agent lab probe shop/web-0 outside icmp

    Exit codes: 0 every packet arrived; 1 some did not, or packets and policies differ; 2 bad input; 3 no lab.
    """
    asked = (parse_port(port),) if port else ()

    def work(running: Lab, staged: Stage, _: Enforced | None) -> int:
        answers = ask(running.fabric, running.expectation(staged), pair(running, staged, source, destination, asked))
        if not answers:
            raise click.UsageError(f"{source} and {destination} have no address family in common")
        if output == "json":
            print_json(MatrixResult(tuple(answers), sum(1 for _ in mismatches(answers))))
        else:
            for answer in answers:
                print_answer(answer)
        return 0 if all(a.reached and not a.mismatch for a in answers) else 1

    raise SystemExit(with_lab(wanted, name, work))


# --- a lab that stays ------------------------------------------------------------------------------------------------


@lab.command("up")
@lab_options
@name_option
def up(wanted: LabOptions, name: str) -> None:
    """Make a lab that stays, with the policies of the files enforced, until `lab down`.

    \b
    Examples:
      netpol-agent lab up -f manifests/
      netpol-agent lab matrix
      netpol-agent lab apply -f manifests/ -f new-policy.yaml
      netpol-agent lab shell shop/web-0 -- curl -m 2 http://10.244.1.3
      netpol-agent lab down
    """
    contents = read_files(wanted.files)
    inventory = inventory_of(contents, wanted.namespace)
    warn(inventory.findings)
    staged = staged_from(inventory, wanted)

    def work(ready: Callable[[dict[str, Any]], None]) -> int:
        running = Lab.start(staged, wanted.chosen())
        running.enforce(inventory, staged.pods)
        save_input(contents, wanted)
        ready(running.fabric.to_json())
        while True:
            signal.pause()

    try:
        enclosure.hold(name, work)
    except held.AlreadyHeld as error:
        raise click.UsageError(f"the lab {name!r} is up; take it down with: {_with_name('down', name)}") from error
    click.echo(f"lab {name!r} is up: {len(staged.fabric.nodes)} nodes, {len(staged.pods)} pods")
    for pod in staged.fabric.pods:
        click.echo(f"  {pod.key}  {' '.join(pod.addresses)}  on {pod.node}")
    for service in staged.services:
        ports = [f"{p.port}/{p.protocol}" + (f" (node port {p.node_port})" * bool(p.node_port)) for p in service.ports]
        click.echo(f"  {service.key}  {' '.join(service.cluster_ips) or 'headless'}  {', '.join(ports)}")


@lab.command("apply")
@input_options
@name_option
def apply_command(files: tuple[str, ...], namespace: str, name: str) -> None:
    """Enforce the files' policies, labels and namespaces in the held lab, in place of those before.

    The pods stay as they are: another set of pods is another lab.

    \b
    Examples:
      netpol-agent lab apply -f manifests/ -f edited-policy.yaml

    Exit codes: 0 enforced; 2 bad input or other pods; 3 the kernel refused, or no lab is up.
    """
    contents = read_files(files)
    inventory = inventory_of(contents, namespace)
    warn(inventory.findings)

    def work(topology: dict[str, Any]) -> int:
        wanted = msgspec.structs.replace(load_input()[1], namespace=namespace)
        running = Lab.join(topology, wanted.chosen())
        staged = staged_from(inventory, wanted, running.pods())
        if set(staged.pods) != set(running.pods()):
            different = sorted(set(staged.pods) ^ set(running.pods()))
            raise click.UsageError(f"other pods than the lab's ({', '.join(different[:3])}): take it down and up again")
        running.load_services(staged)
        enforced = running.enforce(inventory, staged.pods)
        save_input(contents, wanted)
        print_enforced(enforced)
        return 0

    raise SystemExit(joined(name, work))


@lab.command("shell", context_settings={"ignore_unknown_options": True})
@name_option
@click.argument("end", metavar="POD|node/NAME|outside")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(name: str, end: str, command: tuple[str, ...]) -> None:
    """Run a command, or a shell, in the network of a pod, a node or the outside host of the held lab.

    \b
    Examples:
      netpol-agent lab shell shop/web-0
      netpol-agent lab shell node/node1 -- iptables -S NPA-FORWARD

    The exit code is the command's.
    """
    argv = list(command) or [os.environ.get("SHELL", "/bin/sh")]

    def work(topology: dict[str, Any]) -> int:
        running = Lab.join(topology, load_input()[1].chosen())
        key = end_key(running, end)
        if shutil.which(argv[0]) is None:
            click.secho(f"error: {argv[0]}: no such command", err=True, fg="red")
            return 127
        with running.fabric.inside(key):
            return os.spawnvp(os.P_WAIT, argv[0], argv)

    raise SystemExit(joined(name, work))


@lab.command("down")
@name_option
def down(name: str) -> None:
    """End the held lab with all that runs in it; nothing is left.

    \b
    Examples:
      netpol-agent lab down
    """
    click.echo(f"lab {name!r} is down" if enclosure.end(name) else f"no lab {name!r} is up")


@lab.command("list")
def list_command() -> None:
    """Print the names of the held labs."""
    for name in held.names():
        if held.read(name) is not None:
            click.echo(name)


# --- a scenario, step by step ----------------------------------------------------------------------------------------


@lab.command("play")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", "ports", multiple=True, metavar="PORT[/PROTO]", help="Ask these: 80, 53/udp, icmp.")
@click.option("--services", is_flag=True, help="Ask the cluster addresses of Services, too.")
@click.option("--mode", type=click.Choice(["routed", "bridged"]), default="routed", show_default=True)
@backend_option
def play(directory: Path, ports: tuple[str, ...], services: bool, mode: Mode, backend: str) -> None:
    """Play a directory of manifests file by file: after each, who reaches whom, what changed, and how fast.

    A file's first comment is its title; an object that comes again takes the place of the one before.

    \b
    Examples:
      netpol-agent lab play docs/scenarios/a-three-tiers --services

    Exit codes: 0 packets and policies agree at every step; 1 they differ; 2 bad input; 3 no lab can be made here.
    """
    steps = sorted(path for path in directory.iterdir() if path.suffix in (".yaml", ".yml"))
    if not steps:
        raise click.UsageError(f"{directory}: holds no YAML file")
    asked = tuple(parse_port(text) for text in ports)
    wanted = LabOptions((), "default", 2, mode, (4, 6), 2, backend, ())

    contents = read_files(map(str, steps))
    # The same questions at every step, also of a port that only a later policy names.
    asked_ports = staged_from(inventory_of(contents, wanted.namespace), wanted).ports

    def work() -> int:
        click.echo(f"{LEGEND}  {CHANGES}")
        running: Lab | None = None
        before: list[Answer] = []
        different = 0
        told: set[Finding] = set()
        for number, path in enumerate(steps):
            inventory = inventory_of(contents[: number + 1], wanted.namespace)
            # An object that comes again is what a play is made of.
            new = [f for f in inventory.findings if f.id != "duplicate-object" and f not in told]
            warn(new)
            told.update(new)
            known = running.pods() if running else None
            staged = staged_from(inventory, wanted, known)
            if running is None:
                running = Lab.start(staged, wanted.chosen())
            elif set(staged.pods) != set(running.pods()):
                raise click.UsageError(f"{path}: brings other pods; all pods belong into the first file")
            enforced = running.enforce(inventory, staged.pods)
            again = replace(staged, ports=asked_ports)
            found = questions(again, running.fabric, ports=asked, with_services=services)
            answers = ask(running.fabric, running.expectation(staged), found)
            print_step(number, path, enforced, answers, before)
            different += sum(1 for _ in mismatches(answers))
            before = answers
        if running is not None:
            running.close()
        click.echo(f"\n{len(steps)} steps, {different} mismatches between packets and policies")
        return 1 if different else 0

    raise SystemExit(enclosure.run(guarded(work)))


def print_step(
    number: int, path: Path, enforced: Enforced, answers: Sequence[Answer], before: Sequence[Answer]
) -> None:
    """One step of a play: its title, what it cost, the matrix, and what is new in it."""
    title = re.search(r"^#\s*(.+)$", path.read_text(), re.MULTILINE)
    click.echo()
    click.secho(f"{number}. {title[1] if title else path.stem}", bold=True)
    print_enforced(enforced)
    for line in matrix_lines(answers, before):
        click.echo(line)
    old = {(a.source, a.address, a.protocol, a.port): a.reached for a in before}
    opened = sum(1 for a in answers if a.reached and old.get((a.source, a.address, a.protocol, a.port)) is False)
    closed = sum(1 for a in answers if not a.reached and old.get((a.source, a.address, a.protocol, a.port)) is True)
    wrong = sum(1 for _ in mismatches(answers))
    change = f"{opened} opened, {closed} closed; " if before else ""
    click.echo(f"  {len(answers)} probes: {change}{wrong} mismatches")


# --- pieces ----------------------------------------------------------------------------------------------------------

Contents = list[tuple[str, bytes]]


def inventory_of(contents: Contents, namespace: str) -> Inventory:
    """The objects of these files. Raises BadInput."""
    inventory = Inventory(namespace)
    for file, data in contents:
        inventory.read(data, file)
    inventory.finish()
    return inventory


def staged_from(inventory: Inventory, wanted: LabOptions, known: dict[str, PodSpec] | None = None) -> Stage:
    try:
        staged = stage(inventory, wanted.wishes, known)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not staged.pods:
        raise click.UsageError("the input holds no pods, and no workload that would create any")
    return staged


def with_lab(
    wanted: LabOptions, name: str, work: Callable[[Lab, Stage, Enforced | None], int], *, policies: bool = True
) -> int:
    """Do `work` in a lab of its own made from -f, or without -f in the held one. Answers with its exit code."""
    if not wanted.files:
        return joined(name, lambda topology: _in_held(topology, work))
    contents = read_files(wanted.files)
    inventory = inventory_of(contents, wanted.namespace)
    if not policies:
        inventory.policies.clear()
    warn(inventory.findings)
    staged = staged_from(inventory, wanted)

    def inside() -> int:
        running = Lab.start(staged, wanted.chosen())
        try:
            return work(running, staged, running.enforce(inventory, staged.pods))
        finally:
            running.close()

    return enclosure.run(guarded(inside))


def _in_held(topology: dict[str, Any], work: Callable[[Lab, Stage, Enforced | None], int]) -> int:
    contents, wanted = load_input()
    inventory = inventory_of(contents, wanted.namespace)
    running = Lab.join(topology, wanted.chosen())
    staged = staged_from(inventory, wanted, running.pods())
    running.observe(inventory, staged.pods)
    return work(running, staged, None)


def joined(name: str, work: Callable[[dict[str, Any]], int]) -> int:
    """Do `work` inside the held lab."""
    try:
        return enclosure.join(name, lambda topology: guarded(lambda: work(topology))())
    except held.NotHeld as error:
        raise enclosure.LabUnavailable(
            f"no lab {name!r} is up; give -f FILE, or make one with: {_with_name('up -f FILE', name)}"
        ) from error


def _with_name(verb: str, name: str) -> str:
    """What the user has to type for this lab."""
    return f"netpol-agent lab {verb}" + ("" if name == "default" else f" --name {name}")


def guarded(work: Callable[[], int]) -> Callable[[], int]:
    """What `work` raises inside an enclosure becomes its message and exit code there, as `main` does outside."""

    def inside() -> int:
        try:
            return work()
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (KernelError, enclosure.LabUnavailable) as error:
            click.secho(f"error: {error}", err=True, fg="red")
            return 3
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return inside


def save_input(contents: Contents, wanted: LabOptions) -> None:
    """Leave what is enforced for those who join the held lab."""
    _INPUT.write_bytes(msgspec.json.encode({"contents": contents, "wanted": wanted}))


def load_input() -> tuple[Contents, LabOptions]:
    """What the held lab enforces."""
    saved = msgspec.json.decode(_INPUT.read_bytes(), type=_Saved)
    return saved.contents, saved.wanted


class _Saved(msgspec.Struct):
    contents: list[tuple[str, bytes]]
    wanted: LabOptions


def parse_port(text: str) -> Port:
    """`80`, `53/udp`, `icmp`."""
    number, _, protocol = text.partition("/")
    if text.lower() in ("icmp", "ping"):
        return "ICMP", 0
    protocol = (protocol or "TCP").upper()
    if not number.isdigit() or not 1 <= int(number) <= 65535 or protocol not in ("TCP", "UDP", "SCTP"):
        raise click.UsageError(f"{text!r} is no port: write 80, 53/udp, 9999/sctp or icmp")
    return protocol, int(number)


def end_key(running: Lab, text: str) -> str:
    """The fabric's key of `ns/pod`, a pod's bare name, `node/NAME` or `outside`."""
    kind, _, name = text.partition("/")
    if kind == "node" and node_key(name) in running.fabric.sources():
        return node_key(name)
    if text in running.fabric.sources():
        return text
    alike = [key for key in running.pods() if key.partition("/")[2] == text]
    if len(alike) == 1:
        return alike[0]
    there = ", ".join(sorted(running.pods())[:8])
    raise click.UsageError(f"{text!r} is not in the lab; there are outside, {there}")


def resolve(running: Lab, staged: Stage, text: str, ports: Sequence[Port] | None) -> tuple[str, list[str], list[Port]]:
    """(key, addresses, ports) of an end; an address of nobody is a key of its own."""
    kind, _, rest = text.partition("/")
    if kind == "svc":
        for service in staged.services:
            if rest in (service.key.removeprefix("svc/"), service.name):
                if not service.cluster_ips:
                    raise click.UsageError(f"{text!r} is headless: it has no address; ask its pods")
                return service.key, list(service.cluster_ips), [(p.protocol, p.port) for p in service.ports]
        raise click.UsageError(f"{text!r} is no Service of the input")
    try:
        version = family(text)
    except ValueError:
        version = 0
    if version:
        owner = running.fabric.owner(text)
        if owner is None and not has_address(running, staged, text):
            raise click.UsageError(f"nobody in the lab has {text}; the host outside gets it by: --outside {text}")
        return owner or text, [text], list(staged.ports.get(owner or "", ()))
    key = end_key(running, text)
    addresses = [address for holder, address in running.fabric.spec.held() if holder == key]
    pod = running.pods().get(key)
    return key, addresses or list(pod.addresses if pod else ()), list(staged.ports.get(key, ports or ()))


def has_address(running: Lab, staged: Stage, address: str) -> bool:
    """Whether an address that is no pod's, node's or outside is a Service's or a bridge's."""
    others = [a for service in staged.services for a in service.cluster_ips]
    others += [a for _, a in running.fabric.spec.gateways]
    return plain(address) in map(plain, others)


def pair(running: Lab, staged: Stage, source: str, destination: str, asked: Sequence[Port]) -> list[Question]:
    """The questions of one pair, in each family that both ends have."""
    key, own, _ = resolve(running, staged, source, None)
    if key not in running.fabric.sources():
        raise click.UsageError(f"{source!r} cannot send: give a pod, node/NAME or outside")
    other_key, others, ports = resolve(running, staged, destination, None)
    return [
        Question(key, a, other_key, b, protocol, port)
        for protocol, port in (asked or ports or [("TCP", 80)])
        for version in (4, 6)
        for a in [x for x in own if family(x) == version][:1]
        for b in [x for x in others if family(x) == version][:1]
    ]


def print_answer(answer: Answer) -> None:
    """One probe, in one line."""
    port = "ping" if answer.protocol == "ICMP" else f"{answer.port}/{answer.protocol}"
    found = "reaches" if answer.reached else "does not reach"
    who = f" (answered by {answer.who})" if answer.who and answer.who != answer.destination else ""
    line = f"{answer.source} {found} {answer.destination} {answer.address} {port}{who}: {answer.why}"
    click.secho(line, fg="green" if answer.reached else "red")
    if answer.mismatch:
        says = "allow" if answer.expected else "deny"
        click.secho(f"  MISMATCH: the policies {says} it", fg="magenta", bold=True)


def print_enforced(enforced: Enforced) -> None:
    """What a change cost, by node."""
    if not enforced.writes:
        click.echo("  enforced: nothing to write")
        return
    parts = [f"{name} {report.writes}" for name, report in enforced.reports.items()]
    click.echo(f"  enforced in {enforced.seconds * 1000:.0f} ms (kernel writes: {', '.join(parts)})")
    for problem in enforced.problems:
        click.secho(f"  problem: {problem}", fg="yellow")


def show_matrix(answers: Sequence[Answer], enforced: Enforced | None, output: str) -> int:
    """A matrix as asked for; answers with the exit code."""
    different = list(mismatches(answers))
    if output == "json":
        print_json(MatrixResult(tuple(answers), len(different)))
        return 1 if different else 0
    if enforced is not None:
        print_enforced(enforced)
    for line in matrix_lines(answers):
        click.echo(line)
    click.echo(f"  {LEGEND}")
    for answer in different:
        print_answer(answer)
    click.echo(f"  {len(answers)} probes, {len(different)} mismatches")
    return 1 if different else 0
