"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from imvia_graph._forms import FORMATS

Command = TypeVar("Command", bound=Callable[..., Any])


def run_argument(command: Command) -> Command:
    """The run folder."""
    return click.argument("run", type=click.Path(path_type=Path))(command)


def device_option(command: Command) -> Command:
    """The device of a command on a trained run."""
    return click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, … or auto."
    )(command)


class NamedFile(click.Path):
    """The path of a file; ``-``, which elsewhere stands for a standard stream, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if str(value) == "-":
            self.fail(
                "standard input and output are not read and written here; name a file"
                " (./- for one that is called so).",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def _columns(
    ctx: click.Context, option: click.Parameter, value: str | None
) -> list[int] | list[str] | None:
    """``0,2,1`` or ``subject,predicate,object``."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    return parts


def separator(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    r"""One character, or what stands for one that is hard to type: ``tab``, ``\t``, ``space``."""
    return {"\\t": "\t", "tab": "\t", "space": " "}.get(value or "", value)


def _shares(
    ctx: click.Context, option: click.Parameter, value: str | None
) -> list[float] | bool | None:
    """``0.8,0.1,0.1``, or ``none``: all in train."""
    if value is None:
        return None
    if value.strip().lower() == "none":
        return False
    try:
        return [float(share) for share in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"expected three shares, as 0.8,0.1,0.1, or none; received {value!r}."
        ) from None


_LOADING = {
    "format": click.option(
        "--from",
        "format",
        type=click.Choice(FORMATS),
        help="Form of the source, where it is not recognised.",
    ),
    "columns": click.option(
        "--columns",
        callback=_columns,
        help="Tables: places from 0 or names of the head, relation and tail columns, as 0,2,1.",
    ),
    "header": click.option(
        "--header/--no-header", default=None, help="Tables: whether line 1 names columns."
    ),
    "separator": click.option(
        "--separator",
        callback=separator,
        help="Tables: the character between columns, or tab or space.",
    ),
    "literals": click.option(
        "--literals",
        type=click.Choice(["leave-out", "numbers"]),
        help="RDF: what becomes of literals.",
    ),
    "split": click.option(
        "--split",
        callback=_shares,
        help="Shares of train, validation and test for a source without splits; none: all in"
        " train.  [default: 0.8,0.1,0.1 for a file; a folder with train alone stays whole]",
    ),
}


def loading_options(command: Command) -> Command:
    """How to read a source; the command gets ``loading``, what was told of it, for `load_kg`."""

    @wraps(command)
    def gathering(**values: Any) -> Any:
        told = {name: values.pop(name) for name in _LOADING}
        loading = {name: value for name, value in told.items() if value is not None}
        return command(loading=loading, **values)

    wrapped: Any = gathering
    for option in reversed(_LOADING.values()):
        wrapped = option(wrapped)
    return cast(Command, wrapped)


def skip_unknown_option(command: Command) -> Command:
    """What becomes of views whose entity is not in the graph."""
    return click.option(
        "--skip-unknown", is_flag=True, help="Leave out views of entities not in SOURCE."
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
