"""Produce rows of the accuracy tables: train, select on validation, rank test once, write JSON.

    python benchmarks/accuracy/features.py                      # once: text views of names
    python benchmarks/accuracy/run.py row MKG-Y full --seed 0
    python benchmarks/accuracy/run.py all --data-set MKG-Y --variant full --seeds 3 --jobs 2
    python benchmarks/accuracy/run.py row DB15K full --seed 1 --epochs-of 0

A row's settings are the defaults, overridden by settings/DATASET.yaml, overridden by
settings/variants/VARIANT.yaml. The variant ``full`` uses the file of the data set alone,
``defaults`` no file, and ``defaults-VARIANT`` the file of the variant alone; ``complex-n3`` is the
baseline of complex_n3.py. A row is written to
benchmarks/results/accuracy/DATASET-VARIANT-SEED.json, and is not run again if that file exists.
protocol.py describes the selection on validation.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import complex_n3
import protocol
import torch
from features import ALL, DATA, held_out, load

import imvia_graph as ig
from imvia_graph import _files
from imvia_graph.training import keep_freed_memory

HERE = Path(__file__).parent
SETTINGS = HERE / "settings"
RESULTS = HERE.parent / "results" / "accuracy"
#: Variants without a file: the data set's settings, the default settings, and the baseline.
FULL, DEFAULTS, BASELINE = "full", "defaults", "complex-n3"


def variants() -> list[str]:
    """Return the names of all variants."""
    files = sorted((SETTINGS / "variants").glob("*.yaml"))
    return [FULL, DEFAULTS, BASELINE, *(file.stem for file in files)]


def settings_of(dataset: str, variant: str) -> dict[str, Any]:
    """Return the settings in the files of a row, merged."""
    if variant == BASELINE:
        file = SETTINGS / BASELINE / f"{dataset.lower()}.yaml"
        return ig.Settings.read_mapping(file, "settings") if file.exists() else {}
    if variant == DEFAULTS:
        return {}
    layers = [SETTINGS / f"{dataset.lower()}.yaml"]
    if variant.startswith(f"{DEFAULTS}-"):
        layers, variant = [], variant.removeprefix(f"{DEFAULTS}-")
    if variant != FULL:
        layers.append(SETTINGS / "variants" / f"{variant}.yaml")
        if not layers[-1].exists():
            raise click.ClickException(
                f"Unknown variant {variant!r}; expected one of {', '.join(variants())}."
            )
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(ig.Settings.read_mapping(layer, "settings"))
    return merged


def make_row(
    kg: ig.MultiViewKG,
    dataset: str,
    variant: str,
    seed: int,
    given: dict[str, Any],
    selection: protocol.Row | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> protocol.Row:
    """Train and rank a row and return its results."""
    if variant == BASELINE:
        settings = {**complex_n3.DEFAULTS, **given}
        method = complex_n3.method(settings, seed, log)
        split_seed, device = 0, "cpu"
    else:
        chosen = ig.Settings.create(given, {"seed": seed})
        settings, split_seed = chosen.model_dump(), chosen.split_seed
        method = protocol.imvia(chosen, log)
        device = ig.training.resolve_device(chosen.device).type
    found = protocol.run_row(kg, method, held_out(dataset), split_seed, selection)
    return {
        "dataset": dataset,
        "variant": variant,
        "seed": seed,
        "epochs_of": seed if selection is None else selection["seed"],
        "settings": settings,
        **found,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def path_of(results: Path, dataset: str, variant: str, seed: int) -> Path:
    """Return the path of the file of a row."""
    return results / f"{dataset}-{variant}-{seed}.json"


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True),
        click.option("--results", type=click.Path(path_type=Path), default=RESULTS),
        click.option("--device", default="cpu", help="cpu, cuda, cuda:1, …", show_default=True),
        click.option("--force", is_flag=True, help="Run rows again whose files exist."),
    ):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """Produce rows of the accuracy tables."""


@main.command()
@click.argument("dataset", type=click.Choice(ALL))
@click.argument("variant")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--epochs-of",
    type=int,
    help="DB15K: train once, for the number of epochs that the row of this seed selected.",
)
@click.option("--threads", default=1, show_default=True, help="Threads on the CPU.")
@_options
def row(
    dataset: str,
    variant: str,
    seed: int,
    epochs_of: int | None,
    threads: int,
    data: Path,
    results: Path,
    device: str,
    force: bool,
) -> None:
    """Run the row of a DATASET, a VARIANT and a seed."""
    path = path_of(results, dataset, variant, seed)
    if path.exists() and not force:
        click.echo(f"{path} exists already.")
        return
    torch.set_num_threads(threads)
    keep_freed_memory()
    given = settings_of(dataset, variant)
    if variant != BASELINE:
        given["device"] = device
    selection = None if epochs_of is None else _selection(results, dataset, variant, epochs_of)
    found = make_row(load(dataset, data), dataset, variant, seed, given, selection, click.echo)
    results.mkdir(parents=True, exist_ok=True)
    _files.write_json(path, found)
    click.echo(summary(found))


def _selection(results: Path, dataset: str, variant: str, seed: int) -> protocol.Row:
    """Read the row that selected the number of epochs for another row."""
    if not held_out(dataset):
        raise click.UsageError(f"--epochs-of: no validation triples are held out of {dataset}.")
    path = path_of(results, dataset, variant, seed)
    if not path.exists():
        raise click.UsageError(f"--epochs-of {seed}: {path} does not exist; run that row first.")
    found: protocol.Row = _files.read_json(path)
    if found["epochs_of"] != seed:
        raise click.UsageError(f"--epochs-of {seed}: {path} took its epochs from another row.")
    return found


@main.command("all")
@click.option("--data-set", "datasets", multiple=True, type=click.Choice(ALL))
@click.option("--variant", "names", multiple=True, help="Any number.  [default: full]")
@click.option("--seeds", default=3, show_default=True)
@click.option(
    "--epochs-of-first",
    is_flag=True,
    help="DB15K: select the number of epochs with the first seed only.",
)
@click.option("--jobs", default=1, show_default=True, help="Rows in parallel, one thread each.")
@_options
def run_all(
    datasets: tuple[str, ...],
    names: tuple[str, ...],
    seeds: int,
    epochs_of_first: bool,
    jobs: int,
    data: Path,
    results: Path,
    device: str,
    force: bool,
) -> None:
    """Run rows of data sets, variants and seeds, each in a new process."""
    common = ["--data", str(data), "--results", str(results), "--device", device]
    common += ["--force"] * force
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for seed in range(seeds):
            wanted = []
            for variant, dataset in itertools.product(names or (FULL,), datasets or ALL):
                row = [dataset, variant, "--seed", str(seed), *common]
                if epochs_of_first and seed and held_out(dataset):
                    row += ["--epochs-of", "0"]
                wanted.append(row)
            failed += sum(pool.map(_in_process, wanted))
    if failed:
        raise click.ClickException(f"{failed} rows failed; see above.")


def _in_process(arguments: Sequence[str]) -> bool:
    """Run a row in a new process and return whether it failed."""
    command = [sys.executable, str(Path(__file__)), "row", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines: Iterable[str] = done.stdout.splitlines()[-1:]
    if done.returncode:
        lines = [f"{' '.join(arguments[:4])} failed:", *done.stderr.splitlines()[-8:]]
    click.echo("\n".join(lines), err=bool(done.returncode))
    return bool(done.returncode)


def summary(found: protocol.Row) -> str:
    """Return one line that summarises a row."""
    parts = [f"{found['dataset']} {found['variant']} {found['seed']}: epoch {found['best_epoch']}"]
    parts += [f"{split} MRR {100 * found[split]['mrr']:.2f} %" for split in ("valid", "test")]
    return ", ".join([*parts, f"{found['seconds']} s"])


if __name__ == "__main__":
    main()
