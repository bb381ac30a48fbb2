"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def run_argument(command: Command) -> Command:
    """The run folder."""
    return click.argument("run", type=click.Path(path_type=Path))(command)


def device_option(command: Command) -> Command:
    """The device of a command on a trained run."""
    return click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, … or auto."
    )(command)


def views_option(values: tuple[str, ...]) -> dict[str, str]:
    """Modality to file, from ``NAME=FILE`` given any number of times."""
    files: dict[str, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise click.UsageError(f"--views {value}: expected NAME=FILE, as in image=visual.pth.")
        if name in files:
            raise click.UsageError(f"--views: {name!r} is given twice.")
        files[name] = file
    return files
