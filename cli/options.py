"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from imvia_graph._forms import FORMATS

Command = TypeVar("Command", bound=Callable[..., Any])
DEVICE_HELP = "cpu, cuda, cuda:1, … or auto: a GPU if there is one, else the CPU."


def run_argument(command: Command) -> Command:
    """Add the argument RUN, a run folder."""
    return click.argument("run", type=click.Path(path_type=Path))(command)


def device_option(command: Command) -> Command:
    """Add --device for a command that uses a trained run."""
    return click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)(command)


def split_option(command: Command) -> Command:
    """Add --split for a command that ranks triples."""
    return click.option(
        "--split",
        type=click.Choice(["train", "valid", "test"]),
        default="test",
        show_default=True,
        help="Split whose triples are ranked.",
    )(command)


class NamedFile(click.Path):
    """A file path; ``-``, which often stands for a standard stream, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fail if it is ``-``."""
        if str(value) == "-":
            self.fail(
                "standard input and output are not supported; name a file (./- for a file"
                " called -).",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def _columns(
    ctx: click.Context, option: click.Parameter, value: str | None
) -> list[int] | list[str] | None:
    """Parse ``0,2,1`` or ``subject,predicate,object``."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    return parts


def separator(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    r"""Return the separator; ``tab``, ``\t`` and ``space`` stand for characters hard to type."""
    return {"\\t": "\t", "tab": "\t", "space": " "}.get(value or "", value)


def _shares(
    ctx: click.Context, option: click.Parameter, value: str | None
) -> list[float] | bool | None:
    """Parse ``0.8,0.1,0.1``; ``none`` gives False, which keeps all triples in train."""
    if value is None:
        return None
    if value.strip().lower() == "none":
        return False
    try:
        return [float(share) for share in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"expected three shares, as in 0.8,0.1,0.1, or none; received {value!r}."
        ) from None


_LOADING = {
    "format": click.option(
        "--from",
        "format",
        type=click.Choice(FORMATS),
        help="Format of the source.  [default: detected]",
    ),
    "columns": click.option(
        "--columns",
        callback=_columns,
        help="Tables: head, relation and tail columns, by name or by position from 0, as in 0,2,1.",
    ),
    "header": click.option(
        "--header/--no-header", default=None, help="Tables: whether line 1 names the columns."
    ),
    "separator": click.option(
        "--separator",
        callback=separator,
        help="Tables: the character between columns; also the words tab and space.",
    ),
    "literals": click.option(
        "--literals",
        type=click.Choice(["leave-out", "numbers"]),
        help="RDF: skip all literals, or read numbers as a modality.  [default: leave-out]",
    ),
    "split": click.option(
        "--split",
        callback=_shares,
        help="Shares of train, validation and test for a source without splits, or none to keep all"
        " triples in train.  [default: 0.8,0.1,0.1 for a file, none for a folder with train only]",
    ),
}


def loading_options(command: Command) -> Command:
    """Add the options for reading a source; those given become ``loading``, for `load_kg`."""

    @wraps(command)
    def gathering(**values: Any) -> Any:
        options = {name: values.pop(name) for name in _LOADING}
        loading = {name: value for name, value in options.items() if value is not None}
        return command(loading=loading, **values)

    wrapped: Any = gathering
    for option in reversed(_LOADING.values()):
        wrapped = option(wrapped)
    return cast(Command, wrapped)


def skip_unknown_option(command: Command) -> Command:
    """Add --skip-unknown for views of entities that are not in the graph."""
    return click.option(
        "--skip-unknown",
        is_flag=True,
        help="Skip views of entities that are not in SOURCE, instead of failing.",
    )(command)


def views_option(values: tuple[str, ...]) -> dict[str, str]:
    """Return the file of each modality from repeated ``NAME=FILE`` options."""
    files: dict[str, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise click.UsageError(f"--views {value}: expected NAME=FILE, as in image=visual.pth.")
        if name in files:
            raise click.UsageError(f"--views: {name!r} is given twice.")
        files[name] = file
    return files
