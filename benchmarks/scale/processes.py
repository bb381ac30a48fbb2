"""Compare two training processes with one: losses of the first steps, final metrics and memory.

    IMVIA_DATA=... python benchmarks/scale/processes.py --data countries --data MKG-Y

Each training runs in one process and, with torchrun and gloo, in two, in float32 on the CPU, with
the same seed and the same global batches. The results are written to
``benchmarks/results/scale-processes.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

REGIMES = ("1vsall", "kvsall", "sampled")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "scale-processes.json"
STEPS = 50


def work(source: str, regime: str, path: str, epochs: int | None) -> None:
    """Train as one of the processes; the first process writes the results to ``path``."""
    import imvia_graph as ig
    from imvia_graph.distributed import Shards
    from imvia_graph.training import Callback

    class FirstLosses(Callback):
        def __init__(self) -> None:
            self.losses: list[dict[str, float]] = []

        def on_start(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step(self, trainer: Any, losses: dict[str, torch.Tensor]) -> None:
            if len(self.losses) < STEPS:
                self.losses.append({name: float(value) for name, value in losses.items()})

    torch.set_num_threads(1)
    first = FirstLosses()
    options = {} if epochs is None else {"epochs": epochs}
    run = ig.fit(
        source,
        callbacks=[first],
        regime=regime,
        precision="float32",
        device="cpu",
        seed=0,
        **options,
    )
    model = run.model
    tables = {id(table.weight) for table in model.entity_tables}
    states = 0
    trainer = first.trainer
    for optimizer in (trainer.optimizer, trainer.table_optimizer, trainer.row_optimizer):
        for weight, state in () if optimizer is None else optimizer.state.items():
            if id(weight) in tables:
                states += sum(value.nbytes for value in state.values() if value.dim())
    result = {
        "losses": first.losses,
        "seconds": run.progress.seconds,
        "table_bytes": sum(table.weight.nbytes for table in model.entity_tables),
        "state_bytes": states,
    }
    result |= {split: run.evaluate(split)["both"] for split in ("valid", "test")}
    if Shards.of_world(run.kg.num_entities).is_first:
        Path(path).write_text(json.dumps(result), encoding="utf-8")


def compared(source: str, regime: str, epochs: int | None) -> dict[str, Any]:
    """Run one training in one process and in two, and return their differences."""
    found = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            start = [sys.executable]
            if processes > 1:
                start += ["-m", "torch.distributed.run", "--standalone"]
                start += [f"--nproc-per-node={processes}"]
            arguments = [__file__, "--work", str(path), "--data", source, "--regime", regime]
            if epochs is not None:
                arguments += ["--epochs", str(epochs)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*start, *arguments], check=True, env=environment)
            found.append(json.loads(path.read_text(encoding="utf-8")))
    alone, together = found
    steps = list(zip(alone["losses"], together["losses"], strict=True))
    return {
        "data": source,
        "regime": regime,
        "steps": len(steps),
        "largest_difference_of_losses": max(
            abs(one["loss"] - two["loss"]) / abs(one["loss"]) for one, two in steps
        ),
        "difference_of_mrr": {
            split: 100 * abs(alone[split]["mrr"] - together[split]["mrr"])
            for split in ("valid", "test")
        },
        "mrr": {
            name: {split: 100 * part[split]["mrr"] for split in ("valid", "test")}
            for name, part in (("one", alone), ("two", together))
        },
        "seconds": [alone["seconds"], together["seconds"]],
        "table_bytes": [alone["table_bytes"], together["table_bytes"]],
        "state_bytes": [alone["state_bytes"], together["state_bytes"]],
    }


@click.command()
@click.option("--data", "sources", multiple=True, default=("countries",))
@click.option("--regime", "regimes", multiple=True, default=REGIMES)
@click.option("--epochs", type=int, help="Default: the setting `epochs`.")
@click.option("--work", hidden=True)
def main(
    sources: tuple[str, ...], regimes: tuple[str, ...], epochs: int | None, work: str | None
) -> None:
    """Compare two processes with one."""
    if work is not None:
        globals()["work"](sources[0], regimes[0], work, epochs)
        return
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    for source in sources:
        for regime in regimes:
            row = compared(source, regime, epochs)
            click.echo(json.dumps(row))
            rows = [r for r in rows if (r["data"], r["regime"]) != (row["data"], row["regime"])]
            rows.append(row)
            machine = {"device": "cpu", "backend": "gloo", "torch": torch.__version__}
            content = json.dumps({"machine": machine, "rows": rows}, indent=1)
            RESULTS.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
