"""Shared tools of the speed benchmarks: processes for rows, clocks, memory, floors.

A row is a JSON object that describes one measurement. `in_process` passes it to a new process of
the same script, so that the peak memory is that of the row alone; the script measures the row and
prints the result as its last line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


# -- rows in processes ----------------------------------------------------------------------------


def in_process(script: str, row: Row, threads: int) -> Row:
    """Return a row with its results, measured by the script in a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--row", json.dumps({**row, "threads": threads})]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        raise click.ClickException(f"The row {row} ended with status {result.returncode}.")
    return {**row, **json.loads(result.stdout.splitlines()[-1])}


def start(row: Row, keep: bool = True) -> Any:
    """Set threads and seed for a row, keep freed memory as `fit` does, and return the device."""
    import torch

    from imvia_graph.training import keep_freed_memory

    torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    if keep:
        keep_freed_memory()
    return torch.device(row["device"])


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that all benchmarks share; ``--row`` is for `in_process`."""
    for option in (
        click.option(
            "--row", callback=lambda *given: given[2] and json.loads(given[2]), hidden=True
        ),
        click.option("--out", type=click.Path(path_type=Path), help="Result file."),
        click.option("--threads", default=2, help="Threads on the CPU."),
        click.option("--device", default="cpu", help="cpu or cuda."),
    ):
        command = option(command)
    return click.command(context_settings={"show_default": True})(command)


def has(package: str) -> bool:
    """Return whether a package is installed; rows that need a missing one are left out."""
    return importlib.util.find_spec(package) is not None


# -- clocks ---------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], repeats: int, device: Any, warm_up: int = 1) -> list[float]:
    """Return the seconds of each call, by the wall clock or, on a GPU, by CUDA events."""
    import torch

    for _ in range(warm_up):
        call()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last) / 1000)
        else:
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return found


def summary(times: Sequence[float]) -> Row:
    """Return the best and the median of repeated timings."""
    return {"best": min(times), "median": median(times), "repeats": len(times)}


# -- memory ---------------------------------------------------------------------------------------


def resident(peak: bool) -> int:
    """Return the resident bytes of this process, now or at the peak since `forget_peak`.

    They are read from /proc. Without it ``ru_maxrss`` is used, which starts at the parent's size.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s*(\d+)" if peak else r"VmRSS:\s*(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Reset the peak of resident memory, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Peak:
    """Peak memory of the device since construction, minus the memory in use at construction."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            forget_peak()
            self.before = resident(peak=False)

    def bytes(self) -> int:
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated()) - self.before
        return resident(peak=True) - self.before


# -- the floor ------------------------------------------------------------------------------------


def rates(row: Row) -> Row:
    """Return operations per second of products (B, d) x (d, N) by dtype, and the copy rate.

    A multiplication counts as two operations. The copy rate, in bytes per second, counts bytes read
    and bytes written.
    """
    import torch

    device = start(row)
    queries, dim, candidates = row["shape"]
    found: Row = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        a = torch.randn(queries, dim, device=device).to(dtype)
        b = torch.randn(candidates, dim, device=device).to(dtype)
        out = torch.empty(queries, candidates, device=device, dtype=dtype)
        best = min(seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), 20, device, 5))
        found[name] = 2 * queries * dim * candidates / best
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.zeros_like(source)
    best = min(seconds(lambda: target.copy_(source), 10, device, 3))
    found["copy"] = 2 * source.numel() * source.element_size() / best
    return found


def floor(operations: float, num_bytes: float, dtype: str, measured: Row) -> Row:
    """Return the seconds of the products alone and of the memory traffic alone."""
    return {
        "operations": operations,
        "bytes": num_bytes,
        "floor_operations": operations / measured[dtype],
        "floor_bytes": num_bytes / measured["copy"],
    }


def times_floor(row: Row, time: float) -> float | None:
    """Return a time relative to the floor of a row, products and traffic in sequence."""
    if "floor_operations" not in row:
        return None
    return float(time / (row["floor_operations"] + row["floor_bytes"]))


# -- reports --------------------------------------------------------------------------------------


def machine(device: str, threads: int) -> Row:
    """Describe machine, load and versions; call this before the measurements, for the load."""
    import torch

    versions = {"python": platform.python_version()}
    for package in ("imvia-graph", "torch", "numba", "triton", "torch-scatter", "pykeen"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = _processor()
    if device != "cpu":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "threads": threads,
        "cpus": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "versions": versions,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def result_file(name: str, device: str) -> Path:
    """Return results/NAME-cpu.json, results/NAME-h100.json, …"""
    label = "cpu"
    if device != "cpu":
        import torch

        words = torch.cuda.get_device_name().lower().split()
        label = next((word for word in words if any(map(str.isdigit, word))), words[-1])
    return RESULTS / f"{name}-{label}.json"


def goal(name: str, value: float, bound: float, at_least: bool = True) -> Row:
    """Return a goal with its value, its bound and whether it is met."""
    met = value >= bound if at_least else value <= bound
    return {"goal": name, "value": value, "at_least" if at_least else "at_most": bound, "met": met}


def finish(report: Row, out: Path, tables: Sequence[Table]) -> None:
    """Write the report to a file, and show its tables and goals."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = table_of("Goals", "goal", "bound", "measured", "met")
    for one in report["goals"]:
        bound = f"≥ {one['at_least']:g}" if "at_least" in one else f"≤ {one['at_most']:g}"
        table.add_row(one["goal"], bound, f"{one['value']:.3g}", "yes" if one["met"] else "no")
    about = report["machine"]
    shown(
        *tables,
        table,
        f"{about['device']}, {about['threads']} threads, load before {about['load_before'][0]},"
        f" torch {about['versions']['torch']}; written to {out}",
    )


def shown(*parts: Table | str) -> None:
    """Print tables and lines, at least 140 columns wide."""
    console = Console()
    console.width = max(console.width, 140)
    for part in parts:
        console.print(part, markup=False)


def table_of(title: str, *columns: str, texts: int = 1) -> Table:
    """Return a table whose first ``texts`` columns are text and whose other columns are numbers."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= texts else "left")
    return table


def text(value: float | None, pattern: str = "{:.3g}") -> str:
    """Format a number, or return a dash for None."""
    return "–" if value is None else pattern.format(value)


def told(row: Row, name: str) -> None:
    """Print the median of a finished row to standard error."""
    print(f"{name}: {row['median']:.4g} s", file=sys.stderr, flush=True)


# -- made-up graphs -------------------------------------------------------------------------------


def with_made_up_views(kg: Any, views: dict[str, tuple[int, int]]) -> Any:
    """Replace the views of a graph by random ones: (views per entity, width) by modality."""
    import torch

    import imvia_graph as ig

    generator = torch.Generator().manual_seed(0)
    made = {
        modality: ig.io.views_from_array(
            torch.randn(kg.num_entities, count, width, generator=generator), kg
        )
        for modality, (count, width) in views.items()
    }
    return kg.replace(views=made)
