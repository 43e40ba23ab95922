"""What a verb raises, as one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from agent.core.findings import BadInput
from agent.dataplane.errors import KernelError
from agent.kube.errors import ApiError
from agent.lab.enclosure import LabUnavailable

DONE, FINDINGS, BAD_INPUT, COULD_NOT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; a verb that answers with FINDINGS says for what."""


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work; what it raises is told on standard error. Used for the process, and inside each enclosure."""
    try:
        return work() or DONE
    except (click.exceptions.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BadInput as error:
        for finding in dict.fromkeys(error.findings):
            click.secho(f"error: {finding}", err=True, fg="red")
        return BAD_INPUT
    except (ApiError, KernelError, LabUnavailable) as error:
        click.secho(f"error: {error}", err=True, fg="red")
        return COULD_NOT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        click.secho(f"error: {error}", err=True, fg="red")
        return COULD_NOT
