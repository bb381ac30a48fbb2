"""``imvia-graph tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.status import Status
from rich.table import Table

from imvia_graph.cli import stopped
from imvia_graph.cli.display import cell, console, log_to_terminal, say
from imvia_graph.cli.options import (
    DEVICE_HELP,
    loading_options,
    skip_unknown_option,
    views_option,
)
from imvia_graph.errors import SettingsError

if TYPE_CHECKING:
    from imvia_graph.tuning import Tuned

#: Number of trials in the table at the end.
LISTED = 5


@click.command()
@click.argument("source")
@click.option(
    "--study",
    type=click.Path(path_type=Path),
    required=True,
    help="SQLite file of the search; an existing one is resumed.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write the best settings to.  [default: the study's path with .yaml]",
)
@click.option(
    "--trials", default=50, show_default=True, type=click.IntRange(min=1), help="Trials in total."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0), help="Minutes after which no new trial starts."
)
@click.option(
    "--space",
    "space_file",
    type=click.Path(path_type=Path),
    help="YAML or TOML file of the search space: for each setting a list of values, or low, high"
    " and step or log.  [default: learning rate, batch size, dropouts and others]",
)
@click.option(
    "--views",
    "features",
    multiple=True,
    metavar="NAME=FILE",
    help="Precomputed features of a modality, as in image=visual.pth; repeat for more modalities.",
)
@skip_unknown_option
@loading_options
@click.option("--epochs", type=int, help="Maximum number of epochs of a trial.")
@click.option("--device", help=DEVICE_HELP)
@click.option(
    "--settings",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help='YAML or TOML file of settings that all trials share, or "paper"; repeatable, later ones'
    " override earlier ones.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting that all trials share; repeatable.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the search.")
@click.option(
    "--prune/--no-prune",
    default=True,
    help="Whether to end trials early that fall behind the median.  [default: prune]",
)
def tune(
    source: str,
    study: Path,
    out: Path | None,
    trials: int,
    timeout: float | None,
    space_file: Path | None,
    features: tuple[str, ...],
    skip_unknown: bool,
    loading: dict[str, Any],
    epochs: int | None,
    device: str | None,
    files: tuple[Path, ...],
    assignments: tuple[str, ...],
    seed: int,
    prune: bool,
) -> None:
    """Search for the settings with the best validation MRR on SOURCE.

    The study is a file. To resume it after a stop or a kill, run the same command again. To search
    in parallel, run the same command in another terminal, if need be on another --device; no
    settings are tried twice. Test triples are set aside before the search. The best settings are
    written when it ends or is stopped; --timeout 0 writes them at once.

    \b
    Examples:
      imvia-graph tune countries --study studies/countries.db --trials 30 --epochs 40
      imvia-graph fit countries --settings studies/countries.yaml
      imvia-graph tune MKG-Y --study y.db --space space.yaml --set dim=128 --timeout 120

    \b
    space.yaml:
      learning_rate: {low: 0.0003, high: 0.01, log: true}
      batch_size: [256, 512, 1024]
      hidden_dropout: {low: 0.2, high: 0.6, step: 0.1}
    """
    from imvia_graph import _files
    from imvia_graph.io import load_kg, with_views
    from imvia_graph.settings import Settings
    from imvia_graph.training import keep_freed_memory
    from imvia_graph.tuning import SPACE, read_space, write_best
    from imvia_graph.tuning import tune as search

    log_to_terminal()
    fixed = Settings.read_all(files)
    fixed.update(Settings.parse(assignments))
    named = {"epochs": epochs, "device": device}
    fixed.update({key: value for key, value in named.items() if value is not None})
    space = SPACE if space_file is None else read_space(space_file)
    if space_file is None:  # fixed settings are not searched
        space = {key: part for key, part in space.items() if key not in fixed}
    best_file = out or study.with_suffix(".yaml")
    if best_file.resolve() == study.resolve():
        raise SettingsError(f"--out and --study are both {study}; give the study another name.")
    _files.check_target(best_file)
    settings = Settings.create(fixed)
    keep_freed_memory()
    kg = load_kg(source, None, settings.split_seed, **loading)
    if features:
        kg = with_views(kg, views_option(features), skip_unknown=skip_unknown)
    say(repr(kg), *kg.notes)
    line = _Line(trials, settings.epochs)

    def resume(minutes: float | None) -> Tuned:
        return search(
            kg,
            study,
            trials=trials,
            space=space,
            settings=fixed,
            seed=seed,
            prune=prune,
            timeout=None if minutes is None else 60 * minutes,
            progress=line.show,
        )

    stop: KeyboardInterrupt | None = None
    try:
        found = resume(timeout)
    except KeyboardInterrupt as error:
        stop = error
        found = resume(0)  # the trials so far
    finally:
        line.close()
    _print_best(found)
    if found.trial is None:
        click.echo("No trial was finished, so there are no best settings yet.")
    else:
        share = (
            f"validation MRR {100 * (found.mrr or 0):.2f} %, trial {found.trial} of {study.name}"
        )
        write_best(best_file, found, f"{kg.name}: {share}")
        click.echo(f"Best settings: {best_file} ({share})")
    if stop is not None:
        raise stopped(stop, f"Stopped. Run the same command again to resume {study}.")


def _print_best(found: Tuned) -> None:
    """Print a table of the best trials."""
    counts: dict[str, int] = {}
    for trial in found.trials:
        counts[trial["state"]] = counts.get(trial["state"], 0) + 1
    table = Table(title=", ".join(f"{count} {state}" for state, count in counts.items()))
    table.add_column("trial", justify="right")
    table.add_column("validation MRR %", justify="right")
    table.add_column("epochs", justify="right")
    table.add_column("settings")
    best = sorted(
        (trial for trial in found.trials if trial["state"] == "complete"),
        key=lambda trial: -trial["mrr"],
    )
    for trial in best[:LISTED]:
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial["settings"].items())
        table.add_row(
            str(trial["number"]), f"{100 * trial['mrr']:.2f}", str(trial["epochs"]), cell(values)
        )
    if best:
        console.print(table)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Line:
    """A status line for the running trial, and a line for each ended trial."""

    def __init__(self, trials: int, epochs: int | None) -> None:
        self.trials = trials
        self.of = "" if epochs is None else f"/{epochs}"
        self.best: tuple[float, int] | None = None
        self.status: Status | None = None

    def show(self, trial: int, state: str, mrr: float | None, epoch: int) -> None:
        """Show the state of a trial; an `imvia_graph.tuning.Progress`."""
        if state == "done" and mrr is not None and (self.best is None or mrr > self.best[0]):
            self.best = (mrr, trial)
        value = "-" if mrr is None else f"{100 * mrr:.2f} %"
        best = "-" if self.best is None else f"{100 * self.best[0]:.2f} % (trial {self.best[1]})"
        if state != "training":
            epochs = "1 epoch" if epoch == 1 else f"{epoch} epochs"
            console.print(
                f"Trial {trial} {state} after {epochs}: validation MRR {value}, best {best}.",
                markup=False,
                highlight=False,
            )
            return
        text = f"Trial {trial}, epoch {epoch}{self.of}: {value}; best here {best}"
        if console.is_terminal:
            if self.status is None:
                self.status = console.status(text)
                self.status.start()
            self.status.update(text)

    def close(self) -> None:
        """Remove the status line from the terminal."""
        if self.status is not None:
            self.status.stop()
