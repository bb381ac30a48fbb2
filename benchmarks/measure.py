"""What the benchmarks of speed measure with: processes for rows, clocks, memory, floors.

A row is a JSON object. `in_process` hands it to the same script started anew, so that a row's peak
memory is its own; the script measures it and prints what it found as the last line.
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
    """What a script prints of a row, measured in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--row", json.dumps({**row, "threads": threads})]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        raise click.ClickException(f"The row {row} ended with status {result.returncode}.")
    return {**row, **json.loads(result.stdout.splitlines()[-1])}


def start(row: Row, keep: bool = True) -> Any:
    """Ready this process for a row: threads; memory kept as `fit` keeps it; gives the device."""
    import torch

    from imvia_graph.training import keep_freed_memory

    torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    if keep:
        keep_freed_memory()
    return torch.device(row["device"])


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every benchmark has; ``row`` is for `in_process`."""
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
    """Whether a package is installed: rows of what is not are left out."""
    return importlib.util.find_spec(package) is not None


# -- clocks ---------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], repeats: int, device: Any, warm_up: int = 1) -> list[float]:
    """Time of each call, by the wall clock or, on a GPU, by its events."""
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
    """Best and median of repeats."""
    return {"best": min(times), "median": median(times), "repeats": len(times)}


# -- memory ---------------------------------------------------------------------------------------


def resident(peak: bool) -> int:
    """Bytes of this process that are in memory, or have been at most since `forget_peak`.

    From /proc: ``ru_maxrss``, which is taken elsewhere, begins with what the parent had in memory.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = re.search(r"VmHWM:\s*(\d+)" if peak else r"VmRSS:\s*(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Begin the peak anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Peak:
    """Most memory in use since this was made, less what was in use then: of the device."""

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
    """Operations a second of products (B, d) x (d, N), by dtype, and bytes a second of a copy.

    A product is two operations a multiplication; a copy both reads and writes its bytes.
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
    """Seconds that the products alone and the traffic alone would take."""
    return {
        "operations": operations,
        "bytes": num_bytes,
        "floor_operations": operations / measured[dtype],
        "floor_bytes": num_bytes / measured["copy"],
    }


def times_floor(row: Row, time: float) -> float | None:
    """How many times its floor a row takes: products and traffic one after the other."""
    if "floor_operations" not in row:
        return None
    return float(time / (row["floor_operations"] + row["floor_bytes"]))


# -- reports --------------------------------------------------------------------------------------


def machine(device: str, threads: int) -> Row:
    """Where and with what it was measured; to be asked before anything runs."""
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
    """results/NAME-cpu.json, results/NAME-h100.json, …"""
    label = "cpu"
    if device != "cpu":
        import torch

        words = torch.cuda.get_device_name().lower().split()
        label = next((word for word in words if any(map(str.isdigit, word))), words[-1])
    return RESULTS / f"{name}-{label}.json"


def goal(name: str, value: float, bound: float, at_least: bool = True) -> Row:
    """A goal, and whether it is met."""
    met = value >= bound if at_least else value <= bound
    return {"goal": name, "value": value, "at_least" if at_least else "at_most": bound, "met": met}


def finish(report: Row, out: Path, tables: Sequence[Table]) -> None:
    """Write the report, and show it with its goals."""
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
    """Show tables and lines on a terminal, wide enough for them."""
    console = Console()
    console.width = max(console.width, 140)
    for part in parts:
        console.print(part, markup=False)


def table_of(title: str, *columns: str, texts: int = 1) -> Table:
    """A table whose columns are numbers but for the first, ``texts`` of them."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= texts else "left")
    return table


def text(value: float | None, pattern: str = "{:.3g}") -> str:
    """A number, or a dash for none."""
    return "–" if value is None else pattern.format(value)


def told(row: Row, name: str) -> None:
    """Say on the terminal that a row is done."""
    print(f"{name}: {row['median']:.4g} s", file=sys.stderr, flush=True)


# -- made-up graphs -------------------------------------------------------------------------------


def with_made_up_views(kg: Any, views: dict[str, tuple[int, int]]) -> Any:
    """The graph with so many views of such a width an entity a modality, and no others."""
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
