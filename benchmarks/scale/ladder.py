"""Train on graphs of growing size: python benchmarks/scale/ladder.py

For each size, a graph is generated (`generate.py`) in a temporary folder, and a new process calls
`imvia_graph.fit` on it with a run folder, for one epoch or for ``--seconds``. The process reports
the loading time, triples per second, the time of ranking 1,000 queries against all entities, the
time of the matrix products of this ranking alone (the floor), and two peaks of memory: anonymous
memory, and resident memory, which includes mapped features.

The results are written to benchmarks/results/scale-cpu.json, and a plot of time, memory and
throughput against size to docs/images/scale.svg. ``--plot-only`` plots existing results.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parents[1] / "docs" / "images" / "scale.svg"
SIZES = ("10k", "30k", "100k", "300k", "1m")
#: First steps, which are not timed: they compile kernels and allocate memory.
WARM_UP = 10
#: Number of ranked queries.
QUERIES = 1000
#: Goals at a million entities: anonymous bytes, and throughput relative to 10,000 entities.
MOST_ANONYMOUS, LEAST_RATE = 6e9, 0.7


@measure.options
@click.option("--sizes", default=",".join(SIZES), help="Numbers of entities: 10k, 1m, …")
@click.option("--seconds", default=300.0, help="Seconds of training, at most one epoch.")
@click.option(
    "--settings",
    type=click.Path(exists=True, path_type=Path),
    default=HERE / "settings.yaml",
    help="Settings file.",
)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for the temporary graphs.")
@click.option("--keep", is_flag=True, help="Keep existing results of other sizes.")
@click.option("--picture", type=click.Path(path_type=Path), default=PICTURE, help="Plot file.")
@click.option("--plot-only", is_flag=True, help="Only plot existing results.")
def main(
    row: measure.Row | None,
    out: Path | None,
    threads: int,
    device: str,
    sizes: str,
    seconds: float,
    settings: Path,
    changes: tuple[str, ...],
    folder: Path | None,
    keep: bool,
    picture: Path,
    plot_only: bool,
) -> None:
    """Measure training and ranking on graphs of growing size."""
    if row is not None:
        click.echo(json.dumps(run_row(row)))
        return
    out = out or measure.result_file("scale", device)
    if plot_only:
        plot(json.loads(out.read_text("utf-8")), picture)
        return
    report: dict[str, Any] = {"machine": measure.machine(device, threads), "rows": []}
    if keep and out.is_file():
        report["rows"] = json.loads(out.read_text("utf-8"))["rows"]
    for entities in map(size_of, sizes.split(",")):
        with graph_of(entities, folder) as (made, about):
            found = measure.in_process(
                __file__,
                {
                    "folder": str(made),
                    "settings": str(settings),
                    "changes": [*changes, f"device={device}"],
                    "seconds": seconds,
                    "device": device,
                },
                threads,
            )
        del found["folder"]
        kept = [one for one in report["rows"] if one["entities"] != entities]
        found = {**about, **found, "load": round(os.getloadavg()[0], 2)}
        report["rows"] = sorted([*kept, found], key=lambda one: one["entities"])
        report["goals"] = goals(report["rows"])
        # Written after each size, so that an interrupted ladder keeps its results.
        measure.finish(report, out, [table(report["rows"])])
    plot(report, picture)


def size_of(text: str) -> int:
    """Convert a size such as 10k or 5m to a number."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text.strip()[-1:].lower(), 1)
    return int(float(text.strip().rstrip("kKmM")) * factor)


@contextlib.contextmanager
def graph_of(entities: int, folder: Path | None) -> Iterator[tuple[Path, measure.Row]]:
    """Generate a temporary graph, and yield its folder and its sizes."""
    made = Path(tempfile.mkdtemp(prefix="imvia-scale-", dir=folder))
    try:
        # In a new process, so that its memory is freed.
        row = {"generate": str(made / "kg"), "entities": entities}
        about = measure.in_process(__file__, row, threads=1)
        del about["generate"]
        about["generate_seconds"] = about.pop("seconds")
        yield made / "kg", about
    finally:
        shutil.rmtree(made, ignore_errors=True)


# -- one size, in its process ---------------------------------------------------------------------


class Memory:
    """Peaks of this process's anonymous memory by phase, sampled in a thread."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.phase = "start"
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        """Update the peak of the current phase."""
        now = anonymous()
        self.peaks[self.phase] = max(now, self.peaks.get(self.phase, 0))

    def begin(self, phase: str) -> None:
        """Start a new phase."""
        self.look()
        self.phase = phase


def anonymous() -> int:
    """Return the bytes of memory of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def run_row(row: measure.Row) -> measure.Row:
    """Generate a graph, or load it, train on it and rank."""
    if "generate" in row:
        from generate import Size, generate

        return generate(Path(row["generate"]), Size(row["entities"]))
    device = measure.start(row)
    import imvia_graph as ig

    memory = Memory()
    started = time.perf_counter()
    memory.begin("load")
    kg = ig.load_kg(row["folder"], "published")
    loaded = time.perf_counter()
    chosen = ig.Settings.create(
        ig.Settings.read(Path(row["settings"])), ig.Settings.parse(row["changes"])
    )
    memory.begin("prepare")
    clock = clock_of(row["seconds"], memory)
    out = Path(row["folder"]).parent / "run"
    ig.fit(kg, out=out, settings=chosen, callbacks=[clock])
    trained = time.perf_counter()
    memory.begin("rank")
    model = clock.trainer.model.eval()
    ranked = rank(model, kg, chosen, device)
    memory.begin("end")
    steps = clock.steps[WARM_UP:] if len(clock.steps) > 2 * WARM_UP else clock.steps
    # Each triple makes two queries, one per direction.
    rate = chosen.batch_size / 2 / (sum(steps) / len(steps))
    return {
        "views_loaded": {m: list(kg.views(m)[0].shape) for m in kg.modalities},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "load_seconds": loaded - started,
        "prepare_seconds": clock.began - loaded,
        "train_seconds": sum(clock.steps),
        "steps": len(clock.steps),
        "steps_an_epoch": clock.steps_an_epoch,
        "whole_epoch": len(clock.steps) >= clock.steps_an_epoch,
        "validate_and_save_seconds": trained - clock.last,
        "step_median": median(steps),
        "triples_a_second": rate,
        "loss_first": clock.losses[0],
        "loss_last": sum(clock.losses[-10:]) / len(clock.losses[-10:]),
        **ranked,
        "anonymous": memory.peaks,
        "anonymous_peak": max(memory.peaks.values()),
        "resident_peak": measure.resident(peak=True),
        "feature_bytes": sum(kg.views(m)[0].nbytes for m in kg.modalities),
        "settings": chosen.model_dump(exclude_defaults=True),
    }


def clock_of(seconds: float, memory: Memory) -> Any:
    """Return a callback that times steps and stops training after the given seconds."""
    from imvia_graph import Callback

    class Clock(Callback):
        trainer: Any = None
        steps_an_epoch = 0
        began = last = 0.0

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.losses: list[float] = []

        def on_start(self, trainer: Any) -> None:
            self.trainer = trainer
            self.steps_an_epoch = len(trainer.batches)
            self.began = self.last = time.perf_counter()
            memory.begin("train")

        def on_step(self, trainer: Any, losses: Any) -> None:
            self.losses.append(float(losses["completion"]))  # waits for a GPU
            now = time.perf_counter()
            self.steps.append(now - self.last)
            self.last = now
            if len(self.steps) >= self.steps_an_epoch:
                memory.begin("validate and save")
            elif now - self.began > seconds:
                memory.begin("validate and save")
                trainer.stop()

    return Clock()


def rank(model: Any, kg: Any, settings: Any, device: Any) -> measure.Row:
    """Rank queries against all entities, and time the matrix products alone."""
    import torch

    import imvia_graph as ig

    some = kg.test[: QUERIES // 2]
    known = kg.answers()
    ig.rank(model, some[:1], known, heads=())  # compiles kernels
    started = time.perf_counter()
    ranking = ig.rank(model, some, known, settings.ranking_batch_size, heads=())
    found = time.perf_counter() - started
    ranks = torch.cat([ranking.head["decision"], ranking.tail["decision"]]).double()
    expected_by_chance = torch.arange(1, kg.num_entities + 1).double().reciprocal().mean()
    # The floor: for each head, the product of queries and candidates.
    query = torch.randn(len(ranks), settings.dim, device=device)
    block = min(kg.num_entities, 2**15)
    candidate = torch.randn(block, settings.dim, device=device)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        query @ candidate.T
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return {
        "rank_queries": len(ranks),
        "rank_seconds": found,
        "rank_floor_seconds": min(times) * len(model.heads) * kg.num_entities / block,
        "mrr": float(ranks.reciprocal().mean()),
        "mrr_by_chance": float(expected_by_chance),
    }


# -- tables and plot ------------------------------------------------------------------------------


def goals(rows: list[measure.Row]) -> list[measure.Row]:
    """Return the goals at a million entities, if this size was measured."""
    by_size = {row["entities"]: row for row in rows}
    found = []
    if large := by_size.get(1_000_000):
        name = "1M entities: GB beside the mapped features"
        found.append(
            measure.goal(name, large["anonymous_peak"] / 1e9, MOST_ANONYMOUS / 1e9, at_least=False)
        )
        if small := by_size.get(10_000):
            share = large["triples_a_second"] / small["triples_a_second"]
            found.append(measure.goal("throughput at 1M against 10k entities", share, LEAST_RATE))
    return found


def table(rows: list[measure.Row]) -> Any:
    columns = ("load", "epoch", "triples/s", "anonymous", "features", "rank 1,000", "floor", "MRR")
    found = measure.table_of("Scale", "entities", "triples", *columns, texts=0)
    for row in rows:
        epoch = row["steps_an_epoch"] * row["step_median"]
        found.add_row(
            f"{row['entities']:,}",
            f"{row['triples']:,}",
            f"{row['load_seconds']:.1f} s",
            f"{epoch:.0f} s",
            f"{row['triples_a_second']:,.0f}",
            f"{row['anonymous_peak'] / 1e9:.2f} GB",
            f"{row['feature_bytes'] / 1e9:.2f} GB",
            f"{row['rank_seconds']:.1f} s",
            f"{row['rank_floor_seconds']:.1f} s",
            f"{row['mrr']:.3f}",
        )
    return found


def plot(report: dict[str, Any], picture: Path) -> None:
    """Plot time, memory and throughput against size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Equal results give equal bytes; text is rendered in the reader's font.
    matplotlib.rcParams.update({"svg.hashsalt": "imvia-graph", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 10})
    rows = report["rows"]
    sizes = [row["entities"] for row in rows]
    figure, (time_axes, memory_axes, rate_axes) = pyplot.subplots(
        1, 3, figsize=(10.5, 4.2), layout="constrained"
    )
    lines: dict[str, list[float]] = {
        "epoch of training": [row["steps_an_epoch"] * row["step_median"] for row in rows],
        "load": [row["load_seconds"] for row in rows],
        "rank 1,000 queries": [row["rank_seconds"] for row in rows],
        "matrix products of ranking": [row["rank_floor_seconds"] for row in rows],
    }
    colours = ("#0072b2", "#009e73", "#d55e00", "#999999", "#cc79a7")
    for (name, values), colour in zip(lines.items(), colours, strict=False):
        time_axes.plot(sizes, values, "o-", color=colour, label=name, markersize=4)
    time_axes.set_ylabel("seconds")
    gigabytes = {
        "anonymous memory, peak": [row["anonymous_peak"] / 1e9 for row in rows],
        "resident memory with mapped features": [row["resident_peak"] / 1e9 for row in rows],
        "features on disk": [row["feature_bytes"] / 1e9 for row in rows],
    }
    for (name, values), colour in zip(gigabytes.items(), colours, strict=False):
        memory_axes.plot(sizes, values, "o-", color=colour, label=name, markersize=4)
    memory_axes.set_ylabel("GB")
    rates = [row["triples_a_second"] for row in rows]
    rate_axes.plot(sizes, rates, "o-", color=colours[0], markersize=4, label="training")
    rate_axes.set_ylim(bottom=0, top=1.25 * max(rates))
    rate_axes.set_ylabel("triples per second")
    for axes in (time_axes, memory_axes, rate_axes):
        axes.set_xscale("log")
        if axes is not rate_axes:
            axes.set_yscale("log")
        axes.set_xlabel("entities")
        axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        # Below the axes, where it covers no line.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axes.legend(frameon=False, fontsize=8, **below)
    about = report["machine"]
    figure.suptitle(
        f"{about['device']}, {about['threads']} thread{'s' * (about['threads'] != 1)}", fontsize=10
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    click.echo(f"Written to {picture}")


if __name__ == "__main__":
    main()
