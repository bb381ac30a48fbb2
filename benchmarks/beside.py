"""Time training on a CPU beside other programs, with the OpenMP settings of the command line.

    python benchmarks/beside.py

`imvia-graph fit countries` runs on all cores alone, twice at a time, beside a program that keeps a
core busy, and in two processes (`--processes 2`). "as OpenMP is set" uses GNU OpenMP's default of
300,000 spin iterations per wait, and each of two processes takes all cores. The command line sets
1,000 iterations, and the processes share the cores. The figures are the median seconds per epoch,
without the first epoch, in which loops are compiled; of two training runs, those of the slower one.
The script writes benchmarks/results/beside-cpu.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import measure

SITUATIONS = ("alone", "two at a time", "beside a busy core", "two processes")
DEFAULT, OURS = "as OpenMP is set", "as the command line sets it"


@click.command(context_settings={"show_default": True})
@click.option("--data", default="countries", help="What to train on.")
@click.option("--epochs", default=4)
@click.option("--out", type=click.Path(path_type=Path), help="Result file.")
def main(data: str, epochs: int, out: Path | None) -> None:
    """Measure each situation with OpenMP's defaults and with the command line's settings."""
    machine = measure.machine("cpu", os.cpu_count() or 1)
    table = measure.table_of("Seconds an epoch", "situation", DEFAULT, OURS, "times")
    rows = []
    for situation in SITUATIONS:
        row: measure.Row = {"situation": situation, "data": data, "epochs": epochs}
        for way in (DEFAULT, OURS):
            row[way] = seconds_an_epoch(situation, way, data, epochs)
            measure.told({"median": row[way]}, f"{situation}, {way}")
        rows.append(row)
        values = row[DEFAULT], row[OURS], row[DEFAULT] / row[OURS]
        table.add_row(situation, *(f"{value:.2f}" for value in values))
    report = {"machine": machine, "rows": rows, "goals": []}
    measure.finish(report, out or measure.result_file("beside", "cpu"), [table])


def seconds_an_epoch(situation: str, way: str, data: str, epochs: int) -> float:
    """Return the median seconds per epoch of the slowest training run."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    if way == DEFAULT:
        environment["GOMP_SPINCOUNT"] = "300000"
        if situation == "two processes":
            environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if situation == "beside a busy core":
            stack.enter_context(busy())
        runs = [Path(folder, str(i)) for i in range(1 + (situation == "two at a time"))]
        command = [sys.executable, "-m", "imvia_graph", "fit", data, "--device", "cpu"]
        command += ["--epochs", str(epochs), "--set", f"validate_every={epochs}"]
        command += ["--processes", "2"] * (situation == "two processes")
        trainings = [
            subprocess.Popen([*command, "--out", str(run)], env=environment, stderr=subprocess.PIPE)
            for run in runs
        ]
        for training in trainings:
            _, told = training.communicate()
            if training.returncode:
                raise click.ClickException(told.decode())
        return max(map(median_epoch, runs))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Run a program that keeps one core busy."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def median_epoch(run: Path) -> float:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["seconds"] for line in lines[1:])


if __name__ == "__main__":
    main()
