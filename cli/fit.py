"""``imvia-graph fit``."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imvia_graph.cli import stopped
from imvia_graph.cli.display import Bar, console, log_to_terminal, metrics_table, say
from imvia_graph.cli.options import (
    DEVICE_HELP,
    loading_options,
    skip_unknown_option,
    views_option,
)
from imvia_graph.errors import SettingsError

if TYPE_CHECKING:
    from imvia_graph.training import Callback


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
    help="Precomputed features of a modality: safetensors, npz, npy, HDF5 or .pth; one row per"
    " entity in id order, or rows that name their entities; repeat for more modalities.",
)
@skip_unknown_option
@loading_options
@click.option("--epochs", type=int, help="Maximum number of epochs.")
@click.option(
    "--seed", type=int, help="Seed of training; the setting split_seed is that of data splits."
)
@click.option("--device", help=DEVICE_HELP)
@click.option(
    "--validation",
    type=click.Choice(["auto", "published", "held-out"]),
    help="Validate on the source's validation set (published) or on 5 % of train (held-out); auto:"
    " held-out if the source's set shares triples with train or test, else published.",
)
@click.option(
    "--settings",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help='YAML or TOML file of settings (`imvia-graph settings` lists them), or "paper" for the'
    " paper's; repeatable, later ones override earlier ones.",
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable."
)
@click.option("--tensorboard", is_flag=True, help="Also write the curves to OUT/tensorboard.")
@click.option("--resume", is_flag=True, help="Resume the run in --out.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of training processes on this machine, which divide queries and entities among"
    " them; for several machines, start this command with torchrun.  [default: 1]",
)
def fit(
    source: str | None,
    out: Path | None,
    features: tuple[str, ...],
    skip_unknown: bool,
    loading: dict[str, Any],
    epochs: int | None,
    seed: int | None,
    device: str | None,
    validation: str | None,
    files: tuple[Path, ...],
    assignments: tuple[str, ...],
    tensorboard: bool,
    resume: bool,
    processes: int | None,
) -> None:
    """Train IMVIA on SOURCE and rank its test triples.

    SOURCE is the name of a data set (see `imvia-graph datasets`), a KG folder (as `imvia-graph
    encode` and `convert` write it), a folder in the layout of OpenKE, MoMoK or MyGO, or a file or
    folder of triples: TSV, CSV, Parquet, N-Triples, Turtle. A source without splits is split
    80/10/10.

    \b
    Examples:
      imvia-graph fit countries
      imvia-graph fit countries --out runs/c --epochs 30 --seed 1 --set dim=128
      imvia-graph fit countries --set 'modalities=[text]' --set joint=false
      imvia-graph fit DB15K --views image=visual.pth --views text=text.pth
      imvia-graph fit export.csv --columns subject,predicate,object --split 0.9,0.05,0.05
      imvia-graph fit my-graph/ --settings my-settings.yaml --device cuda
      imvia-graph fit DB15K --settings paper --views image=visual.pth --views text=text.pth
      imvia-graph fit --resume --out runs/c --epochs 60
      imvia-graph fit my-graph/ --processes 2
      torchrun --nproc-per-node 8 --max-restarts 3 -m imvia_graph fit my-graph/ --out runs/g
    """
    from imvia_graph import _files
    from imvia_graph.checkpoint import TEST, is_of_job, is_run
    from imvia_graph.distributed import is_first, is_launched, job
    from imvia_graph.io import load_kg, with_views
    from imvia_graph.run import fit as fit_model
    from imvia_graph.settings import Settings
    from imvia_graph.tracking import ProgressBar
    from imvia_graph.training import Callback, keep_freed_memory

    if processes is not None and processes > 1 and not is_launched():
        _launch(processes, source, out)
        return
    if is_first():
        log_to_terminal()
    else:
        console.quiet = True
    if is_launched() and out is None:
        raise SettingsError(
            "Under torchrun, name the run folder with --out: restarted processes resume the run in"
            " it."
        )
    this = job()
    if out is not None and is_of_job(out, this):  # restarted: this job has made the run folder
        resume, source, features, loading = True, None, (), {}
    named = {"epochs": epochs, "seed": seed, "device": device, "validation": validation}
    changes = Settings.read_all(files)
    changes.update(Settings.parse(assignments))
    changes.update({key: value for key, value in named.items() if value is not None})
    settings = Settings.create(changes)
    keep_freed_memory()
    bar = ProgressBar(console) if is_first() else Callback()
    try:
        if resume:
            if out is None:
                raise SettingsError("--resume: name the run to resume with --out.")
            if source is not None or features or loading:
                raise click.UsageError(
                    "--resume trains on the run's own graph: leave out SOURCE, --views and the"
                    " options for reading SOURCE."
                )
            run = fit_model(
                None, out=out, resume=True, callbacks=_callbacks(bar, tensorboard, out), **changes
            )
        else:
            if source is None:
                raise click.UsageError(
                    "SOURCE is missing: name a data set, a file or a folder. Try: imvia-graph fit"
                    " countries"
                )
            # None: fit_model chooses the validation set.
            kg = load_kg(source, None, settings.split_seed, **loading)
            if features:
                kg = with_views(kg, views_option(features), skip_unknown=skip_unknown)
            if is_first():
                say(repr(kg), *kg.notes)
            out = out or _free_folder(kg.name)
            run = fit_model(
                kg, out=out, settings=settings, callbacks=_callbacks(bar, tensorboard, out)
            )
    except KeyboardInterrupt as error:
        more = ""
        if out is not None and is_run(out):
            more = f" Resume with: imvia-graph fit --resume --out {shlex.quote(str(out))}"
        raise stopped(error, f"Stopped.{more}") from None
    assert run.folder is not None
    for split in ("test", "valid"):
        if len(run.kg.triples(split)):
            with Bar() as ranking:
                metrics = run.evaluate(split, on_batch=partial(ranking.show, "Queries ranked"))
            if split == "test" and is_first():
                _files.write_json(run.folder / TEST, metrics)
            console.print(metrics_table(f"{run.kg.name}: {split}, filtered", metrics))
            break
    if is_first():
        click.echo(f"Run folder: {run.folder}")


#: How often the processes are restarted after one of them was killed.
_MAX_RESTARTS = 10
#: Seconds that stopped processes have to finish their step and write a checkpoint.
_STOP_TIMEOUT = 600


def _launch(processes: int, source: str | None, out: Path | None) -> None:
    """Run this command in several processes; if one is killed, restart all from the checkpoint."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from imvia_graph.checkpoint import is_run
    from imvia_graph.distributed import JOB, NOT_JOINED

    arguments = sys.argv[1:]
    if out is None:
        if source is None:
            raise click.UsageError("SOURCE is missing: name a data set, a file or a folder.")
        out = _free_folder(Path(source).name)
        arguments += ["--out", str(out)]
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    # Older versions of torch lack the option and kill after 30 seconds.
    timeout: dict[str, Any] = (
        {"shutdown_timeout": _STOP_TIMEOUT} if "shutdown_timeout" in known else {}
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
        **timeout,
    )
    os.environ[JOB] = config.run_id
    # By default each process uses all cores, and they wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    for attempt in range(_MAX_RESTARTS + 1):
        try:
            elastic_launch(config, sys.executable)("-m", "imvia_graph", *arguments)
            return
        except SignalException as error:  # the processes received and reported it, too
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            failed = [code for code in codes if code > 0 and code != NOT_JOINED]
            if failed:  # the processes reported why
                raise SystemExit(failed[0]) from None
            if attempt == _MAX_RESTARTS or not is_run(out):
                raise
            click.echo("A process was killed; all resume from the last checkpoint.", err=True)


def _callbacks(bar: Callback, tensorboard: bool, out: Path) -> list[Callback]:
    from imvia_graph.distributed import is_first

    if not tensorboard or not is_first():
        return [bar]
    from imvia_graph.tracking import TensorBoard

    return [bar, TensorBoard(out / "tensorboard")]


def _free_folder(name: str) -> Path:
    """Return the first of runs/NAME-1, runs/NAME-2, … that does not exist."""
    number = 1
    plain = re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "kg"
    while (folder := Path("runs") / f"{plain}-{number}").exists():
        number += 1
    return folder
