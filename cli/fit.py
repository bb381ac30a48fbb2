"""``imvia-graph fit``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from imvia_graph import _files, load_kg
from imvia_graph.checkpoint import is_run
from imvia_graph.cli import stopped
from imvia_graph.cli.display import ProgressBar, console, log_to_terminal, metrics_table, say
from imvia_graph.cli.options import loading_options, views_option
from imvia_graph.errors import SettingsError
from imvia_graph.io import with_views
from imvia_graph.run import fit as fit_model
from imvia_graph.settings import Settings
from imvia_graph.training import Callback, keep_freed_memory


@click.command()
@click.argument("source", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run folder to write.  [default: runs/NAME-1, -2, …]",
)
@click.option(
    "--views",
    "features",
    multiple=True,
    metavar="NAME=FILE",
    help="Ready features of a modality: safetensors, npz, npy, HDF5 or .pth; a row an entity in id"
    " order, or with an entity column.",
)
@loading_options
@click.option("--epochs", type=int, help="Epochs at most.")
@click.option("--seed", type=int, help="Seed of training; the setting split_seed is the data's.")
@click.option("--device", help="cpu, cuda, cuda:1, … or auto.")
@click.option(
    "--validation",
    type=click.Choice(["auto", "published", "held-out"]),
    help="The source's validation set, or 5 % of train held out; auto: held-out where the source's"
    " shares triples with train or test.",
)
@click.option(
    "--settings",
    "file",
    type=click.Path(path_type=Path),
    help="YAML or TOML file of settings; `imvia-graph settings` lists them.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@click.option("--tensorboard", is_flag=True, help="Write the curves to OUT/tensorboard, too.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
def fit(
    source: str | None,
    out: Path | None,
    features: tuple[str, ...],
    loading: dict[str, Any],
    epochs: int | None,
    seed: int | None,
    device: str | None,
    validation: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    tensorboard: bool,
    resume: bool,
) -> None:
    """Train IMVIA on SOURCE and rank its test triples.

    SOURCE is a data set's name (see `imvia-graph datasets`), a KG folder (`imvia-graph encode` and
    `convert` make them), the folder of another release (OpenKE, MoMoK, MyGO), or a file or folder
    of triples: TSV, CSV, Parquet, N-Triples, Turtle. A source without splits is split 80/10/10.

    \b
    Examples:
      imvia-graph fit countries
      imvia-graph fit countries --out runs/c --epochs 30 --seed 1 --set dim=128
      imvia-graph fit countries --set 'modalities=[text]' --set joint=false
      imvia-graph fit DB15K --views image=visual.pth --views text=text.pth
      imvia-graph fit export.csv --columns subject,predicate,object --split 0.9,0.05,0.05
      imvia-graph fit my-graph/ --settings my-settings.yaml --device cuda
      imvia-graph fit --resume --out runs/c --epochs 60
    """
    log_to_terminal()
    named = {"epochs": epochs, "seed": seed, "device": device, "validation": validation}
    changes: dict[str, Any] = Settings.read(file) if file is not None else {}
    changes.update(Settings.parse(assignments))
    changes.update({key: value for key, value in named.items() if value is not None})
    settings = Settings.create(changes)
    keep_freed_memory()
    bar = ProgressBar()
    try:
        if resume:
            if out is None:
                raise SettingsError("--resume: say with --out which run to go on with.")
            if source is not None or features or loading:
                raise click.UsageError(
                    "--resume goes on with the run's own graph: leave out SOURCE, --views and the"
                    " options that say how to read SOURCE."
                )
            run = fit_model(
                None, out=out, resume=True, callbacks=_callbacks(bar, tensorboard, out), **changes
            )
        else:
            if source is None:
                raise click.UsageError(
                    "SOURCE is missing: a data set's name or a folder. Try: imvia-graph fit"
                    " countries"
                )
            # fit itself sees to the validation set.
            kg = load_kg(source, "published", settings.split_seed, **loading)
            if features:
                kg = with_views(kg, views_option(features))
            say(repr(kg), *kg.notes)
            out = out or _free_folder(kg.name)
            run = fit_model(
                kg, out=out, settings=settings, callbacks=_callbacks(bar, tensorboard, out)
            )
    except KeyboardInterrupt as error:
        bar.close()
        more = ""
        if out is not None and is_run(out):
            more = f" Go on with: imvia-graph fit --resume --out {shlex.quote(str(out))}"
        raise stopped(error, f"Stopped.{more}") from None
    finally:
        bar.close()
    assert run.folder is not None
    for split in ("test", "valid"):
        if len(run.kg.triples(split)):
            metrics = run.evaluate(split)
            if split == "test":
                _files.write_json(run.folder / "test.json", metrics)
            console.print(metrics_table(f"{run.kg.name}: {split}, filtered", metrics))
            break
    click.echo(f"Run folder: {run.folder}")


def _callbacks(bar: ProgressBar, tensorboard: bool, out: Path) -> list[Callback]:
    if not tensorboard:
        return [bar]
    from imvia_graph.tracking import TensorBoard

    return [bar, TensorBoard(out / "tensorboard")]


def _free_folder(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, … that is not there."""
    number = 1
    plain = re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "kg"
    while (folder := Path("runs") / f"{plain}-{number}").exists():
        number += 1
    return folder
