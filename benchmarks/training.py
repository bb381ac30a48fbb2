"""Measure training throughput of the naive form, of the library, and of PyKEEN's ComplEx.

    IMVIA_DATA=… python benchmarks/training.py
    IMVIA_DATA=… python benchmarks/training.py --data DB15K --device cuda

The models have structure, image, text and joint heads of width 256. They train on the triples of a
published data set in both directions, in batches of 1,024 queries, with made-up features. Setting A
has one view of 256 per entity and modality, setting B 8 image views of 512 and 4 text views of 384.
The rows are:

- naive: benchmarks/naive.py, all known answers against all entities, binary cross-entropy, float32;
  a few batches after a warm-up;
- ours: all parts of the loss, relations as wide as entities, 256; then with one change each: the
  naive form's regime (kvsall and binary), float32, candidates of each relation, and relations of
  the default width, 64; whole epochs after two warm-up steps;
- PyKEEN's ComplEx of embedding_dim 256 in its LCWA training loop with inverse triples; whole epochs
  from the first batch on, in batches of 1,024 as ours and in PyKEEN's default batches of 256.

Each row runs in a new process. Ours keeps the memory that it frees, as `imvia-graph fit` does; the
naive form and PyKEEN run as in any script. Peak memory is the largest resident set minus that of
the process with its imports; on a GPU it is torch's peak. The floor is the time of a step's matrix
products and memory traffic (views read once forward and once backward, the optimizer's tables) at
the rates of a product (1,024, 256) x (256, entities) and of a copy, measured in the same run.

Goals on a CPU: at least 25 (A) and 20 (B) times the naive form's queries per second, an epoch of B
in half the time of PyKEEN's, and candidates of each relation in at most 1.5 times an epoch of
shared ones. Goals on a GPU: 15 times the naive form, and 0.25 s per epoch on DB15K. The script
writes benchmarks/results/training-cpu.json, training-DB15K-h100.json, ….
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import measure

DIM = 256
#: Number of views per entity, and their width, by modality.
SETTINGS = {
    "A": {"image": (1, 256), "text": (1, 256)},
    "B": {"image": (8, 512), "text": (4, 384)},
}
DEFAULT, PER_RELATION = "ours", "ours, candidates of each relation"
#: All parts of the paper's loss, and the dropouts and normalisation of its decoder; the defaults
#: leave some of them out.
WHOLE = {
    "relation_residual": False,
    "complex_head": False,
    "decision": "trained",
    "table_optimizer": "same",
    "label_smoothing": 0.1,
    "lambda_alignment": 0.1,
    "lambda_regularization": 0.0,
    "batch_norm": True,
    "input_dropout": 0.3,
    "relation_dropout": 0.4,
    "hidden_dropout": 0.5,
}
OURS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "ours, kvsall and binary": {"regime": "kvsall", "loss": "binary"},
    "ours, float32": {"precision": "float32"},
    PER_RELATION: {"candidates": "relation"},
    "ours, relations of width 64": {"relation_dim": 64},
}
NAIVE, PYKEEN = "naive", "PyKEEN ComplEx"
#: Batch sizes of PyKEEN's rows.
PYKEENS = {PYKEEN: 1024, f"{PYKEEN}, batches of 256": 256}


@measure.options
@click.option("--data", default="MKG-Y", help="A published data set in IMVIA_DATA.")
@click.option("--epochs", default=1, help="Timed epochs of ours and of PyKEEN.")
@click.option("--naive-batches", default=2, help="Timed batches of the naive form.")
@click.option("--only", multiple=True, help="Run only rows whose names start with this.")
@click.option("--skip", multiple=True, help="Skip rows whose names start with this.")
def main(
    data: str,
    epochs: int,
    naive_batches: int,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    device: str,
    threads: int,
    out: Path | None,
    row: dict[str, Any] | None,
) -> None:
    if row:
        kinds = {"rates": measure.rates, NAIVE: run_naive, **dict.fromkeys(PYKEENS, run_pykeen)}
        print(json.dumps(kinds.get(row["form"], run_ours)(row)))
        return
    machine = measure.machine(device, threads)
    common = {"device": device, "data": data, "epochs": epochs, "batches": naive_batches}
    entities = measure.in_process(__file__, {**common, "form": NAIVE, "count": True}, threads)
    shape = [1024, DIM, entities["entities"]]
    rates = measure.in_process(__file__, {**common, "form": "rates", "shape": shape}, threads)

    def wanted(name: str) -> bool:
        return (not only or name.startswith(only)) and not name.startswith(skip)

    rows = []
    for form in filter(wanted, PYKEENS if measure.has("pykeen") else ()):
        rows.append(measure.in_process(__file__, {**common, "form": form}, threads))
        measure.told(rows[-1], form)
    for setting in SETTINGS:
        for form in filter(wanted, [NAIVE, *OURS]):
            mine = {**common, "setting": setting, "form": form}
            found = measure.in_process(__file__, mine, threads)
            found |= measure.floor(
                found["batch_operations"] * found["batches_an_epoch"],
                found["batch_bytes"] * found["batches_an_epoch"],
                found["precision"],
                rates,
            )
            found["times_floor"] = measure.times_floor(found, found["median"])
            measure.told(found, f"{setting}, {form}")
            rows.append(found)
    report = {
        "data": data,
        "settings": SETTINGS,
        "machine": machine,
        "rates": rates,
        "rows": rows,
        "goals": goals_of(rows, device, data),
    }
    name = "training" if data == "MKG-Y" else f"training-{data}"
    measure.finish(report, out or measure.result_file(name, device), tables_of(report))


def tables_of(report: dict[str, Any]) -> list[Any]:
    rates = report["rates"]
    tables = []
    for setting, views in report["settings"].items():
        what = ", ".join(f"{n} {modality} of {width}" for modality, (n, width) in views.items())
        table = measure.table_of(
            f"{setting} on {report['data']}: {what} per entity;"
            f" {rates['float32'] / 1e9:.0f} GFLOP/s in float32,"
            f" {rates['bfloat16'] / 1e9:.0f} in bfloat16, copy {rates['copy'] / 1e9:.1f} GB/s",
            "form", "precision", "epoch s", "median s", "batch ms", "queries/s", "× naive",
            "peak MB", "products s", "traffic s", "× floor",
            texts=2,
        )  # fmt: skip
        mine = [row for row in report["rows"] if row.get("setting", setting) == setting]
        naive = next((row for row in mine if row["form"] == NAIVE), None)
        for row in mine:
            gain = naive and row["queries_a_second"] / naive["queries_a_second"]
            table.add_row(
                row["form"],
                row["precision"],
                f"{row['best']:.2f}",
                f"{row['median']:.2f}",
                measure.text(1000 * row["median"] / row["batches_an_epoch"], "{:.1f}"),
                f"{row['queries_a_second']:,.0f}",
                measure.text(gain, "{:.1f}"),
                f"{row['peak_bytes'] / 1e6:.0f}",
                measure.text(row.get("floor_operations"), "{:.2f}"),
                measure.text(row.get("floor_bytes"), "{:.2f}"),
                measure.text(row.get("times_floor"), "{:.1f}"),
            )
        tables.append(table)
    return tables


def goals_of(rows: list[dict[str, Any]], device: str, data: str) -> list[Any]:
    by_name = {(row.get("setting"), row["form"]): row for row in rows}
    on_cpu = device == "cpu"
    bounds = {"A": 25, "B": 20} if on_cpu else {"A": 15, "B": 15}
    goals = []
    for setting, bound in bounds.items():
        ours, naive = by_name.get((setting, DEFAULT)), by_name.get((setting, NAIVE))
        if ours is None:
            continue
        if naive:
            gain = ours["queries_a_second"] / naive["queries_a_second"]
            goals.append(measure.goal(f"{setting}: times the naive queries a second", gain, bound))
        if not on_cpu and data == "DB15K":
            what = f"{setting}: seconds an epoch"
            goals.append(measure.goal(what, ours["median"], 0.25, at_least=False))
        if relation := by_name.get((setting, PER_RELATION)):
            what = f"{setting}: candidates of each relation, times an epoch of shared ones"
            share = relation["median"] / ours["median"]
            goals.append(measure.goal(what, share, 1.5, at_least=False))
        if on_cpu and setting == "B" and (other := by_name.get((None, PYKEEN))):
            what = "B: an epoch's share of PyKEEN's ComplEx epoch"
            goals.append(measure.goal(what, ours["median"] / other["median"], 0.5, at_least=False))
    return goals


# -- rows, each in a process of its own -----------------------------------------------------------


def run_naive(row: dict[str, Any]) -> dict[str, Any]:
    import naive
    import torch

    import imvia_graph as ig

    idle = measure.resident(peak=True)
    device = measure.start(row, keep=False)
    if row.get("count"):
        return {"entities": graph(row).num_entities}
    kg = graph(row)
    settings = ig.Settings(dim=DIM, relation_dim=DIM, regime="kvsall", loss="binary", **WHOLE)
    peak = measure.Peak(device)
    trainer = naive.NaiveTrainer(naive.NaiveIMVIA(kg, settings).to(device), kg, settings)
    trainer.model.train()
    batches = itertools.cycle(trainer.batches())
    times = measure.seconds(lambda: trainer.step(next(batches)), row["batches"], device)
    queries = len(trainer.answers)
    number = math.ceil(queries / settings.batch_size)
    parts = torch.tensor(list(trainer.answers))[:, 1].split(settings.batch_size)
    return {
        **measure.summary([number * time for time in times]),
        "timed": f"{len(times)} batches, scaled to an epoch of {number}",
        "batches_an_epoch": number,
        "queries_an_epoch": queries,
        "queries_a_second": settings.batch_size / median(times),
        "precision": "float32",
        "peak_bytes": peak_bytes(peak, idle),
        **work(kg, settings, trainer.model, distinct_relations(parts)),
    }


def run_ours(row: dict[str, Any]) -> dict[str, Any]:
    import imvia_graph as ig
    from imvia_graph.training import Callback, Trainer

    idle = measure.resident(peak=True)
    device = measure.start(row)
    kg = graph(row)
    changes = {"dim": DIM, "relation_dim": DIM, "device": str(device), **WHOLE, **OURS[row["form"]]}
    settings = ig.Settings(**changes)
    peak = measure.Peak(device)
    trainer = Trainer(ig.IMVIA.from_kg(kg, settings).to(device), kg, settings)
    trainer.model.train()
    batches = list(itertools.islice(trainer.batches, 2))
    for batch in batches:
        trainer.train_step(batch)
    stamps: list[float] = []

    class Clock(Callback):
        """Read the clock after each step; on a GPU the step may still be running."""

        def on_step(self, trainer: Trainer, losses: dict[str, Any]) -> None:
            stamps.append(time.perf_counter())

    trainer.callbacks.append(Clock())
    # On a GPU the first epoch records steps and compiles kernels that are not cached.
    warm_up = int(device.type == "cuda")
    times = measure.seconds(trainer.train_epoch, row["epochs"], device, warm_up)
    queries = trainer.batches.size
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    relations = distinct_relations([batch.relation for batch in trainer.batches])
    return {
        **measure.summary(times),
        "timed": f"{len(times)} epochs",
        "median_batch": median(steps) if steps and device.type == "cpu" else None,
        "batches_an_epoch": len(trainer.batches),
        "queries_an_epoch": queries,
        "queries_a_second": queries / median(times),
        "precision": str(trainer.precision).removeprefix("torch."),
        "peak_bytes": peak_bytes(peak, idle),
        **work(kg, settings, trainer.model, relations),
    }


def run_pykeen(row: dict[str, Any]) -> dict[str, Any]:
    import torch
    from pykeen.models import ComplEx
    from pykeen.training import LCWATrainingLoop
    from pykeen.training.callbacks import TrainingCallback
    from pykeen.triples import CoreTriplesFactory

    idle = measure.resident(peak=True)
    device = measure.start(row, keep=False)
    kg = graph(row)
    peak = measure.Peak(device)
    triples = CoreTriplesFactory.create(
        kg.train,
        num_entities=kg.num_entities,
        num_relations=kg.num_relations,
        create_inverse_triples=True,
    )
    model = ComplEx(triples_factory=triples, embedding_dim=DIM, random_seed=0).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loop = LCWATrainingLoop(model=model, triples_factory=triples, optimizer=optimizer)
    stamps: list[float] = []
    batches: list[int] = []

    class Clock(TrainingCallback):
        def pre_batch(self, **kwargs: Any) -> None:
            if not stamps:
                stamps.append(time.perf_counter())

        def on_batch(self, epoch: int, batch: Any, batch_loss: float, **kwargs: Any) -> None:
            batches.append(epoch)

        def post_epoch(self, epoch: int, epoch_loss: float, **kwargs: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    given = {"batch_size": PYKEENS[row["form"]], "use_tqdm": False, "use_tqdm_batch": False}
    loop.train(triples, num_epochs=1, only_size_probing=True, **given)
    loop.train(triples, num_epochs=row["epochs"], callbacks=Clock(), **given)
    times = [after - before for before, after in itertools.pairwise(stamps)]
    queries = len(kg.answers(["train"]).queries())
    return {
        **measure.summary(times),
        "timed": f"{len(times)} epochs",
        "batches_an_epoch": len(batches) // row["epochs"],
        "queries_an_epoch": queries,
        "queries_a_second": queries / median(times),
        "precision": "float32",
        "peak_bytes": peak_bytes(peak, idle),
    }


def graph(row: dict[str, Any]) -> Any:
    """Load the data set as published, with the made-up views of the row's setting."""
    import imvia_graph as ig

    kg = ig.load_kg(row["data"], "published")
    return measure.with_made_up_views(kg, SETTINGS[row["setting"]] if "setting" in row else {})


def peak_bytes(peak: measure.Peak, idle: int) -> int:
    """Return the GPU's peak, or on a CPU that of the whole process minus that of its imports."""
    return peak.bytes() if peak.device.type == "cuda" else measure.resident(peak=True) - idle


# -- what a step has to do ------------------------------------------------------------------------


def distinct_relations(batches: Any) -> float:
    """Return the mean number of distinct relations per batch."""
    counts = [len(batch.unique()) for batch in batches]
    return sum(counts) / len(counts)


def work(kg: Any, settings: Any, model: Any, relations: float) -> dict[str, float]:
    """Return the operations of a batch's products and the bytes that it has to move.

    A multiplication counts as two operations, and the backward pass of a product as twice its
    forward pass. Scores are not counted as traffic, since they need not leave the cache.
    """
    b, n, d, r = settings.batch_size, kg.num_entities, settings.dim, settings.relation_dim
    sources = 1 + len(kg.modalities)
    heads = sources + 1
    products = heads * (b * n * d + relations * r * d * d + b * d * d)
    traffic = 0.0
    for modality in kg.modalities:
        feat, _ = kg.views(modality)
        width = feat.shape[1]
        products += (n + b) * width * d  # projections
        products += (n + b) * width * d + relations * width * r  # gates, in two halves
        views = len(feat) * (1 + b / n)
        traffic += 2 * views * width * feat.element_size()
    pairs = sources * (sources - 1)
    products += pairs * 2 * 2 * b * d * settings.information_dim  # estimators of L1
    products += pairs / 2 * b * b * d  # L2
    # Adam reads a parameter, its gradient and two moments, and writes all except the gradient.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    traffic += parameters * 7 * 4
    return {"batch_operations": 3 * 2 * products, "batch_bytes": traffic}


if __name__ == "__main__":
    main()
