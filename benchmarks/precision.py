"""Compare the MRR of training in bfloat16 with that of training in float32.

For each seed and precision, one model is trained on MKG-Y, structure alone, with default settings.
The MRR on validation and test is that of the best validation epoch. The script writes
benchmarks/results/precision.json.

    python benchmarks/precision.py      # needs IMVIA_DATA
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import imvia_graph as ig
from imvia_graph.training import keep_freed_memory

RESULT = Path(__file__).parent / "results" / "precision.json"
PRECISIONS = ("float32", "bfloat16")
#: Largest allowed difference of the mean MRR over the seeds, in points.
GOAL = 0.3


@click.command()
@click.option("--data", default="MKG-Y", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(data: str, seeds: int, epochs: int, out: Path) -> None:
    """Train, rank, print the table and write the results."""
    keep_freed_memory()
    kg = ig.load_kg(data)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for precision in PRECISIONS:
            run = ig.fit(kg, epochs=epochs, seed=seed, precision=precision)
            valid, test = (run.evaluate(split)["both"]["mrr"] for split in ("valid", "test"))
            seconds = round(run.progress.seconds, 1)
            row = {"seed": seed, "precision": precision, "valid": valid, "test": test}
            rows.append(row | {"best_epoch": run.progress.best_epoch, "seconds": seconds})
            click.echo(str(rows[-1]))
    means = {
        split: {
            precision: 100 * mean(row[split] for row in rows if row["precision"] == precision)
            for precision in PRECISIONS
        }
        for split in ("valid", "test")
    }
    apart = {split: abs(m["float32"] - m["bfloat16"]) for split, m in means.items()}
    table = Table("MRR, %", *PRECISIONS, "apart")
    for split, of_split in means.items():
        shown = [f"{of_split[precision]:.2f}" for precision in PRECISIONS]
        table.add_row(split, *shown, f"{apart[split]:.2f}")
    Console().print(table)
    report = {
        "data": kg.name,
        "epochs": epochs,
        "rows": rows,
        "means": means,
        "goal": GOAL,
        "met": max(apart.values()) <= GOAL,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
