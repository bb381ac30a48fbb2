"""Measure training time against the size of the graph, and the memory of `imvia-graph fit`.

    IMVIA_DATA=… python benchmarks/cost.py

The first part times epochs at the default settings on made-up graphs: 5,000 entities, 40 relations,
20,000 triples, 4 image views of 512 and 4 text views of 384 per entity; then 2, 4 and 8 times as
many entities, relations, triples or views, one of these at a time. Each graph has a new process,
which runs two warm-up steps and then whole epochs, of which the best counts. Peak memory is the
largest resident set minus that of the process with its imports; on a GPU it is torch's peak. Goal:
twice the size takes at most 2.2 times as long.

The second part runs the command `imvia-graph fit DB15K` for one epoch, with made-up features in
safetensors files (8 image views of 512 and 4 text views of 384 per entity, float32), validation and
test ranking and the run folder included. Goal on the CPU: a largest resident set (``ru_maxrss``) of
at most 3 GB. The script writes benchmarks/results/cost-cpu.json (or -h100.json, …), which `python
benchmarks/plot_speed.py` draws.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import measure

VIEWS = {"image": 512, "text": 384}
FIT_VIEWS = {"image": (8, 512), "text": (4, 384)}


@measure.options
@click.option("--entities", default=5_000)
@click.option("--relations", default=40)
@click.option("--triples", default=20_000)
@click.option("--views", default=4, help="Views per entity and modality.")
@click.option("--doublings", default=3)
@click.option("--epochs", default=2, help="Timed epochs of each size.")
@click.option("--fit/--no-fit", default=True, help="Whether to measure the memory of fit.")
@click.option("--data", default="DB15K", help="Data set to fit, in IMVIA_DATA.")
def main(
    entities: int,
    relations: int,
    triples: int,
    views: int,
    doublings: int,
    epochs: int,
    fit: bool,
    data: str,
    device: str,
    threads: int,
    out: Path | None,
    row: dict[str, Any] | None,
) -> None:
    if row:
        kinds = {"features": write_features, "train": run}
        print(json.dumps(kinds[row["form"]](row)))
        return
    machine = measure.machine(device, threads)
    base = {"entities": entities, "relations": relations, "triples": triples, "views": views}
    common = {"device": device, "form": "train", "epochs": epochs}

    def measured(size: dict[str, int]) -> dict[str, Any]:
        found = measure.in_process(__file__, {**common, "size": size}, threads)
        measure.told(found, ", ".join(f"{value:,} {name}" for name, value in size.items()))
        return found

    first = measured(base)
    rows, goals = [], []
    table = measure.table_of(
        ", ".join(f"{value:,} {name}" for name, value in base.items()) + ", and more of one",
        "size", "best s an epoch", "median s", "× the half", "queries/s", "peak MB",
    )  # fmt: skip
    for name, number in base.items():
        before = first
        rows.append({**first, "varied": name, "times_size": 1, "ratio": None})
        for times in (2**i for i in range(1, doublings + 1)):
            found = measured({**base, name: number * times})
            ratio = found["best"] / before["best"]
            rows.append({**found, "varied": name, "times_size": times, "ratio": ratio})
            before = found
        mine = rows[-doublings - 1 :]
        for one in mine:
            table.add_row(
                f"{one['size'][name]:,} {name}",
                f"{one['best']:.2f}",
                f"{one['median']:.2f}",
                measure.text(one["ratio"], "{:.2f}"),
                f"{one['queries_an_epoch'] / one['median']:,.0f}",
                f"{one['peak_bytes'] / 1e6:.0f}",
            )
        worst = max(one["ratio"] for one in mine[1:])
        what = f"twice the {name}: times the cost, at worst"
        goals.append(measure.goal(what, worst, 2.2, at_least=False))
    report = {"machine": machine, "base": base, "rows": rows, "goals": goals}
    if fit:
        report["fit"] = fit_memory(data, device, threads)
        goals.append(
            measure.goal(
                f"GB that fit takes on {data}", report["fit"]["peak_bytes"] / 1e9, 3, False
            )
        )
    measure.finish(report, out or measure.result_file("cost", device), [table])


def run(row: dict[str, Any]) -> dict[str, Any]:
    """Train on one made-up graph in this process and return timings and memory."""
    import torch

    import imvia_graph as ig
    from imvia_graph.training import Trainer

    idle = measure.resident(peak=True)
    device = measure.start(row)
    size = row["size"]
    numbers = [size["entities"], size["relations"], size["entities"]]
    columns = [torch.randint(0, number, (2 * size["triples"],)) for number in numbers]
    triples = torch.stack(columns, dim=1).unique(dim=0)
    triples = triples[torch.randperm(len(triples))[: size["triples"]]]
    kg = ig.MultiViewKG(
        [f"e{i}" for i in range(size["entities"])],
        [f"r{i}" for i in range(size["relations"])],
        triples,
        name="made up",
    )
    kg = measure.with_made_up_views(kg, {name: (size["views"], w) for name, w in VIEWS.items()})
    settings = ig.Settings(device=str(device))
    peak = measure.Peak(device)
    trainer = Trainer(ig.IMVIA.from_kg(kg, settings).to(device), kg, settings)
    trainer.model.train()
    for batch in itertools.islice(trainer.batches, 2):
        trainer.train_step(batch)
    times = measure.seconds(trainer.train_epoch, row["epochs"], device, warm_up=0)
    on_gpu = device.type == "cuda"
    return {
        **measure.summary(times),
        "queries_an_epoch": trainer.batches.size,
        "steps_an_epoch": len(trainer.batches),
        "peak_bytes": peak.bytes() if on_gpu else measure.resident(peak=True) - idle,
    }


# -- the command ----------------------------------------------------------------------------------


def fit_memory(data: str, device: str, threads: int) -> dict[str, Any]:
    """Run `imvia-graph fit` and return the peak memory of its whole process."""
    with tempfile.TemporaryDirectory(prefix="imvia-cost-") as name:
        folder = Path(name)
        measure.in_process(__file__, {"form": "features", "data": data, "folder": name}, threads)
        command = [sys.executable, "-m", "imvia_graph", "fit", data, "--epochs", "1"]
        command += ["--device", device, "--out", str(folder / "run")]
        for modality in FIT_VIEWS:
            command += ["--views", f"{modality}={folder / modality}.safetensors"]
        started = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}.")
        return {
            "data": data,
            "views": FIT_VIEWS,
            "epochs": 1,
            "seconds": time.perf_counter() - started,
            "peak_bytes": used.ru_maxrss * 1024,
        }


def write_features(row: dict[str, Any]) -> dict[str, Any]:
    """Write one safetensors file per modality, of shape (entities, views, width)."""
    import torch
    from safetensors.torch import save_file

    import imvia_graph as ig

    kg = ig.load_kg(row["data"], "published")
    for modality, (views, width) in FIT_VIEWS.items():
        feat = torch.randn(kg.num_entities, views, width)
        save_file({"feat": feat}, Path(row["folder"]) / f"{modality}.safetensors")
    return {}


if __name__ == "__main__":
    main()
