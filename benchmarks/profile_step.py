"""Profile a training step: kernels on a GPU, operations on a CPU.

    IMVIA_DATA=… python benchmarks/profile_step.py --data DB15K --device cuda

For the default settings and some forms of training.py, the script prints the seconds per epoch (the
best of several) and, from one more epoch under the profiler, the time per step of each kernel or
operation, the longest first. --trace FOLDER also writes a Chrome trace of each form's profiled
epoch. Nothing else is written.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import click
import measure
import torch
from torch.profiler import ProfilerActivity, profile
from training import DIM, OURS, WHOLE, graph

import imvia_graph as ig
from imvia_graph.training import Trainer

SHAPE = {"dim": DIM, "relation_dim": DIM, **WHOLE}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "A, default settings": ("A", {}),
    **{f"A, {name}": ("A", {**SHAPE, **OURS[name]}) for name in itertools.islice(OURS, 2)},
    "B, ours": ("B", SHAPE),
}


@click.command(context_settings={"show_default": True})
@click.option("--data", default="MKG-Y", help="A published data set in IMVIA_DATA.")
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--threads", default=2, help="Threads on the CPU.")
@click.option("--epochs", default=3, help="Timed epochs of each form.")
@click.option("--top", default=25, help="Number of kernels or operations to show.")
@click.option("--only", multiple=True, help="Run only forms whose names start with this.")
@click.option("--trace", type=click.Path(path_type=Path, file_okay=False), help="Trace folder.")
def main(
    data: str,
    device: str,
    threads: int,
    epochs: int,
    top: int,
    only: tuple[str, ...],
    trace: Path | None,
) -> None:
    for name, (setting, changes) in FORMS.items():
        if only and not name.startswith(only):
            continue
        row = {"device": device, "threads": threads, "data": data, "setting": setting}
        where = measure.start(row)
        kg, settings = graph(row), ig.Settings(device=device, **changes)
        trainer = Trainer(ig.IMVIA.from_kg(kg, settings).to(where), kg, settings)
        trainer.model.train()
        best = min(measure.seconds(trainer.train_epoch, epochs, where))
        steps = len(trainer.batches)
        on_gpu = where.type == "cuda"
        kinds = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        with profile(activities=kinds) as found:
            trainer.train_epoch()
            if on_gpu:
                torch.cuda.synchronize()
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, spent))
        total = sum(getattr(event, spent) for event in events)
        what = "kernel" if on_gpu else "operation"
        title = (
            f"{name}: {best:.3f} s per epoch of {steps} steps, {1000 * best / steps:.2f} ms per"
            f" step; profiled, {total / steps / 1000:.2f} ms per step in"
            f" {sum(event.count for event in events) / steps:.0f} {what}s"
        )
        table = measure.table_of("", what, "µs per step", "calls per step", "share %")
        for event in events[:top]:
            time = getattr(event, spent)
            table.add_row(
                event.key[:100],
                f"{time / steps:.0f}",
                f"{event.count / steps:.1f}",
                f"{100 * time / total:.1f}",
            )
        measure.shown(title, table)
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
            file = re.sub(r"\W+", "-", name)
            found.export_chrome_trace(str(trace / f"{file}.json.gz"))


if __name__ == "__main__":
    main()
