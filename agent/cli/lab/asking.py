"""`lab matrix`, `probe` and `play`: who reaches whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from agent.cli.exits import exit_code
from agent.cli.lab.ends import pair, parse_port, resolve
from agent.cli.lab.options import LabOptions, lab_options, name_option
from agent.cli.lab.running import inventory_of, staged_from, with_lab
from agent.cli.lab.show import print_answer, print_step, show_matrix, step_of
from agent.cli.lab.tables import CHANGES, LEGEND
from agent.cli.options import backend_option
from agent.cli.output import LabPlay, LabStep, MatrixResult, output_option, print_json
from agent.cli.sources import read_files, warn
from agent.core.findings import Finding
from agent.lab import enclosure
from agent.lab.lab import Enforced, Lab
from agent.lab.matrix import Answer, ask, mismatches, questions
from agent.lab.spec import Mode
from agent.lab.staging import Stage


@click.command("matrix")
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


@click.command("probe")
@lab_options
@name_option
@output_option
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.argument("port", metavar="[PORT[/PROTO]]", default="")
def probe(wanted: LabOptions, name: str, output: str, source: str, destination: str, port: str) -> None:
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


@click.command("play")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", "ports", multiple=True, metavar="PORT[/PROTO]", help="Ask these: 80, 53/udp, icmp.")
@click.option("--services", is_flag=True, help="Ask the cluster addresses of Services, too.")
@click.option("--mode", type=click.Choice(["routed", "bridged"]), default="routed", show_default=True)
@backend_option
@output_option
def play(directory: Path, ports: tuple[str, ...], services: bool, mode: Mode, backend: str, output: str) -> None:
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
        if output == "text":
            click.echo(f"{LEGEND}  {CHANGES}")
        played: list[LabStep] = []
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
            step = step_of(path, enforced, answers, before)
            if output == "text":
                print_step(number, step, enforced, before)
            played.append(step)
            different += step.mismatches
            before = answers
        if running is not None:
            running.close()
        if output == "json":
            print_json(LabPlay(tuple(played), different))
            return 1 if different else 0
        click.echo(f"\n{len(steps)} steps, {different} mismatches between packets and policies")
        return 1 if different else 0

    raise SystemExit(enclosure.run(lambda: exit_code(work)))
