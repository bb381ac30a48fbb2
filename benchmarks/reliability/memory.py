"""Measure the memory growth of a process that calls `fit`, `evaluate` and `predict` in a loop.

    python benchmarks/reliability/memory.py --minutes 60

Each round trains on `countries` for two epochs with a run folder, loads the run, ranks the test
triples and answers queries; every tenth round does so through the command line, in this process.
The resident set size is recorded after each round. Goal: at the end it is at most 5 % larger than
after the first minute.
"""

import argparse
import contextlib
import gc
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from common import about, write_results

import imvia_graph as ig
from imvia_graph.cli import main as command_line

SETTINGS = {"dim": 64, "relation_dim": 32, "batch_size": 512, "epochs": 2, "device": "cpu"}


def by_python(folder: Path, kg: ig.MultiViewKG, seed: int) -> None:
    ig.fit(kg, out=folder, seed=seed, **SETTINGS)
    run = ig.load(folder, device="cpu")
    run.evaluate("test")
    for head in kg.entities[:20]:
        run.predict(head=head, relation=kg.relations[0], k=5)


def by_command(folder: Path, seed: int) -> None:
    assignments = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    query = ["--head", "France", "--relation", "borders"]
    for arguments in (
        ["fit", "countries", "--out", str(folder), "--seed", str(seed), *assignments],
        ["evaluate", str(folder), "--device", "cpu", "--json"],
        ["predict", str(folder), *query, "--device", "cpu", "--json"],
    ):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                command_line(arguments)
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(output.getvalue()) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    process = psutil.Process()
    kg = ig.load_kg("countries")
    sizes: list[tuple[float, float]] = []  # seconds, MiB
    start = shown = time.monotonic()
    rounds = 0
    with tempfile.TemporaryDirectory() as top:
        while time.monotonic() - start < 60 * options.minutes:
            folder = Path(top) / "run"
            if rounds % 10 == 9:
                by_command(folder, rounds)
            else:
                by_python(folder, kg, rounds)
            shutil.rmtree(folder)
            rounds += 1
            gc.collect()
            sizes.append((time.monotonic() - start, process.memory_info().rss / 2**20))
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{sizes[-1][0]:6.0f} s  {rounds} rounds  {sizes[-1][1]:.0f} MiB", flush=True)
    # Medians of ten rounds, since a single round may end just before or after memory is freed.
    first = [size for seconds, size in sizes if seconds >= 60][:10]
    early, late = statistics.median(first), statistics.median(size for _, size in sizes[-10:])
    growth = late / early - 1
    step = max(1, len(sizes) // 60)
    write_results(
        "memory",
        {
            **about(),
            "settings": SETTINGS,
            "minutes": sizes[-1][0] / 60,
            "rounds": rounds,
            "after_a_minute_mib": round(early, 1),
            "at_the_end_mib": round(late, 1),
            "largest_mib": round(max(size for _, size in sizes), 1),
            "growth": round(growth, 4),
            "goal": "growth at most 0.05",
            "met": growth <= 0.05,
            "sizes": [[round(seconds), round(size, 1)] for seconds, size in sizes[::step]],
        },
    )


if __name__ == "__main__":
    main()
