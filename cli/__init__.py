"""The command line: ``imvia-graph``, one file a command.

Commands are imported when they are called, and what they work with when they run: ``--help`` and
what is said of a wrong option do not wait for torch and DGL.
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

#: Command, module, and what ``imvia-graph --help`` says of it.
COMMANDS = {
    "encode": "Turn pictures and texts of the entities into features: makes a KG folder.",
    "fit": "Train IMVIA on a knowledge graph and rank its test triples.",
    "tune": "Search for the settings with the best validation MRR.",
    "evaluate": "Rank the triples of a split with a trained run.",
    "predict": "Complete a triple: the best answers to a query.",
    "explain": "Say why: what each modality and each view counts for in a triple.",
    "report": "Write one HTML page about one run or several: numbers, curves, pictures.",
    "explore": "Look around in a run with the browser; the same as a JSON service.",
    "pictures": "Draw the pictures of the built-in graph `countries`, for report and explore.",
    "export": "Write embeddings or predictions of a run for other programs.",
    "inspect": "Look at a knowledge graph before trusting it: sizes, leaks, broken features.",
    "convert": "Write a knowledge graph in another form.",
    "datasets": "List the data sets: built in, and published ones.",
    "settings": "Print every setting with its default and what it is for.",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, dealt with as Ctrl-C is: work in hand is kept, and what goes on with it is said."""


def stopped(error: BaseException | None, message: str = "Stopped.") -> SystemExit:
    """What ends a command that was stopped, after a word about it: 130 for Ctrl-C, 143 for SIGTERM.

    As a shell has it: 128 and the number of the signal. Of several processes the first one speaks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0":
        click.echo(message, err=True)
    return SystemExit(143 if isinstance(error, Terminated) else 130)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command's module; it holds the command under the same name."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"imvia_graph.cli.{name}")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="imvia-graph")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.", expose_value=False)
def command_line() -> None:
    """Complete multi-modal knowledge graphs with IMVIA.

    Start with the graph that comes with the package:

    \b
      imvia-graph fit countries --out runs/countries
      imvia-graph predict runs/countries --head France --relation borders

    and go on with your own: a folder with train.tsv (head, relation, tail labels, separated by
    tabs), and views of the entities in views/. `imvia-graph fit --help` says more.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; an `IMVIAError` becomes one paragraph and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _share_the_cores()
    try:
        with _terminable():
            code = command_line.main(args=arguments, prog_name="imvia-graph", standalone_mode=False)
    except click.exceptions.Abort as error:
        raise stopped(error.__cause__) from None
    except click.ClickException as error:
        click.echo(printable(_shown(error)), err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        from imvia_graph._files import is_full
        from imvia_graph.errors import IMVIAError

        if not isinstance(error, IMVIAError | OSError) or "--debug" in arguments:
            raise
        _let_the_first_speak()
        click.echo(printable(f"Error: {error}"), err=True)
        if isinstance(error, IMVIAError):
            sys.exit(error.exit_code)
        # What the system refuses (a folder that cannot be written, say) is for the user to mend.
        sys.exit(1 if is_full(error) else 2)
    sys.exit(code if isinstance(code, int) else 0)


def _share_the_cores() -> None:
    """Have torch's threads give their cores away soon when they wait, unless the user has spoken.

    GNU OpenMP reads this when torch is loaded. Its threads otherwise stay on their cores for
    milliseconds at the end of each operation, and where another program has work for these cores,
    the last thread of an operation waits for one: a step takes several times as long. Where it sees
    more threads of its own than cores, GNU OpenMP lowers its 300,000 spins in the same way
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html); other programs it cannot see.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _let_the_first_speak() -> None:
    """Of several processes that meet one error, the first one tells of it; it ends the others."""
    from imvia_graph.distributed import is_first

    if not is_first():
        time.sleep(5)


def _shown(error: click.ClickException) -> str:
    """What click prints of an error."""
    lines = []
    if isinstance(error, click.UsageError) and error.ctx is not None:
        lines = [error.ctx.get_usage(), f"Try '{error.ctx.command_path} --help' for help.", ""]
    return "\n".join([*lines, f"Error: {error.format_message()}"])


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does, so that nothing half-done stays behind."""
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
