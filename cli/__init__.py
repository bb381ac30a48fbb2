"""The command line ``imvia-graph``, with one module per command.

A command's module is imported when the command is called, and its heavy dependencies when it runs,
so that ``--help`` and usage errors do not wait for torch and DGL.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import click

from imvia_graph._display import printable
from imvia_graph._version import __version__

#: Commands, each in the module of its name, and their descriptions in ``imvia-graph --help``.
COMMANDS = {
    "encode": "Encode pictures and texts of entities as features; write a KG folder.",
    "fit": "Train IMVIA on a knowledge graph and rank its test triples.",
    "tune": "Search for the settings with the best validation MRR.",
    "evaluate": "Rank the triples of a split with a trained run.",
    "predict": "Complete a triple: list the best answers to a query.",
    "explain": "Explain a triple: rank and score by each head, weights of the views.",
    "compare": "Compare runs in one table: means over seeds, differences; LaTeX, CSV.",
    "report": "Write an HTML page about one or more runs: metrics, curves, pictures.",
    "explore": "Explore a run in the browser, or query it as a JSON service.",
    "pictures": "Draw the pictures of the built-in graph `countries` for report and explore.",
    "export": "Export embeddings or predictions of a run for other programs.",
    "inspect": "Check a knowledge graph before training: sizes, leaks, broken features.",
    "convert": "Convert a knowledge graph to another format.",
    "datasets": "List the built-in and the published data sets.",
    "settings": "Print every setting with its default and description.",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: the command keeps its work and says how to resume it."""


def stopped(error: BaseException | None, message: str = "Stopped.") -> SystemExit:
    """Print a message and return the exit of a stopped command: 130 for Ctrl-C, 143 for SIGTERM.

    As in a shell, the status is 128 plus the signal number. Of several processes, only the first
    prints the message.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        click.echo(message, err=True)
    return SystemExit(143 if isinstance(error, Terminated) else 130)


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of a typical workflow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command's module and return the command of the same name in it."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"imvia_graph.cli.{name}")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing their modules."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="imvia-graph")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.", expose_value=False)
def command_line() -> None:
    """Complete multi-modal knowledge graphs with IMVIA.

    Start with the built-in graph:

    \b
      imvia-graph fit countries --out runs/countries
      imvia-graph predict runs/countries --head France --relation borders

    Then use your own: a folder with train.tsv (head, relation and tail labels, separated by tabs)
    and the entities' views in views/. `imvia-graph fit --help` lists the other formats.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; report an `IMVIAError` as one paragraph and an exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _limit_spinning()
    try:
        with _terminable():
            code = command_line.main(args=arguments, prog_name="imvia-graph", standalone_mode=False)
    except click.exceptions.Abort as error:
        raise stopped(error.__cause__) from None
    except click.ClickException as error:
        click.echo(printable(_error_text(error)), err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        from imvia_graph._files import is_full
        from imvia_graph.errors import IMVIAError

        if not isinstance(error, IMVIAError | OSError) or "--debug" in arguments:
            raise
        _wait_for_first_process()
        click.echo(printable(f"Error: {error}"), err=True)
        if isinstance(error, IMVIAError):
            sys.exit(error.exit_code)
        # Unless the disk is full, an OSError (say, a read-only folder) is the user's to correct.
        sys.exit(1 if is_full(error) else 2)
    sys.exit(code if isinstance(code, int) else 0)


def _limit_spinning() -> None:
    """Make torch's waiting threads release their cores soon, unless the user set how they wait.

    GNU OpenMP reads the variable when torch is loaded. By default its threads spin on their cores
    for milliseconds at the end of each operation. If another program needs these cores, the last
    thread of an operation waits for one, and a step takes several times as long. GNU OpenMP itself
    lowers its default of 300,000 spins in this way if it has more threads than cores
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html), but cannot see other programs.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _wait_for_first_process() -> None:
    """Delay the other processes, so that the first reports a shared error and ends them."""
    from imvia_graph.distributed import is_first

    if not is_first():
        time.sleep(5)


def _error_text(error: click.ClickException) -> str:
    """Return what click prints for an error."""
    lines = []
    if isinstance(error, click.UsageError) and error.ctx is not None:
        lines = [error.ctx.get_usage(), f"Try '{error.ctx.command_path} --help' for help.", ""]
    return "\n".join([*lines, f"Error: {error.format_message()}"])


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end a command like Ctrl-C, so that nothing half-finished stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
