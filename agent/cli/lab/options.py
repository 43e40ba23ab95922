"""The options that shape a lab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from agent.cli.options import backend_option, chosen_backend, input_options
from agent.dataplane.iptables import Backend
from agent.lab import held
from agent.lab.spec import Mode
from agent.lab.staging import Wishes

F = TypeVar("F", bound=Callable[..., Any])


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
