"""Whether the modalities help on `countries`: all heads together against structure alone.

For each seed a model with the default settings, and one trained on structure alone; validation and
test MRR of the decision and of each head. Writes benchmarks/results/countries.json.

    python benchmarks/countries.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import imvia_graph as ig

RESULT = Path(__file__).parent / "results" / "countries.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "all modalities": {},
    "structure alone": {"modalities": []},
}


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Other settings.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(seeds: int, assignments: tuple[str, ...], out: Path) -> None:
    """Train, rank, and write the table."""
    settings = ig.Settings.parse(assignments)
    kg = ig.load_kg("countries")
    rows = []
    for seed in range(seeds):
        for variant, changes in VARIANTS.items():
            started = time.perf_counter()
            run = ig.fit(kg, seed=seed, **{**settings, **changes})
            seconds = time.perf_counter() - started
            metrics = {split: run.evaluate(split) for split in ("valid", "test")}
            for head in ["decision", *run.model.heads]:
                found = {
                    split: m["both"] if head == "decision" else m["modalities"][head]
                    for split, m in metrics.items()
                }
                rows.append(
                    {
                        "variant": variant,
                        "seed": seed,
                        "head": head,
                        "valid": found["valid"]["mrr"],
                        "test": found["test"]["mrr"],
                        "epochs": run.progress.epoch,
                        "best_epoch": run.progress.best_epoch,
                        "seconds": round(seconds, 1),
                    }
                )
            decision = rows[-len(run.model.heads) - 1]
            click.echo(f"{variant}, seed {seed}: {decision}", err=True)
    report = {
        "settings": ig.Settings.create(settings).model_dump(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"countries, MRR in %, mean ± standard deviation over {seeds} seeds")
    for column in ("trained on", "ranked by", "valid", "test"):
        table.add_column(column)
    for variant in VARIANTS:
        heads = dict.fromkeys(row["head"] for row in rows if row["variant"] == variant)
        for head in heads:
            mine = [row for row in rows if row["variant"] == variant and row["head"] == head]
            table.add_row(variant, head, *(_cell([r[s] for r in mine]) for s in ("valid", "test")))
    Console().print(table)


def _cell(values: list[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean(values):.2f} ± {100 * spread:.2f}"


if __name__ == "__main__":
    main()
