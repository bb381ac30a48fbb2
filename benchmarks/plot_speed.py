"""Draw benchmarks/results/cost-cpu.json, time against size, as docs/images/speed.svg.

python benchmarks/plot_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cost-cpu.json"
PICTURE = ROOT / "docs" / "images" / "speed.svg"
COLOURS = {
    "entities": "#0072b2",
    "triples": "#d55e00",
    "relations": "#009e73",
    "views": "#cc79a7",
}


@click.command(context_settings={"show_default": True})
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
@click.option("--out", type=click.Path(path_type=Path), default=PICTURE)
def main(result: Path, out: Path) -> None:
    report = json.loads(result.read_text(encoding="utf-8"))
    # Equal figures give an identical file; text is drawn in the reader's own font.
    matplotlib.rcParams.update({"svg.hashsalt": "imvia-graph", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    sizes = sorted({row["times_size"] for row in report["rows"]})
    base = min(row["best"] for row in report["rows"] if row["times_size"] == 1)
    axes.plot(sizes, [base * size for size in sizes], "--", color="#999999", linewidth=1)
    axes.annotate("in proportion", (sizes[-1], base * sizes[-1]), (4, 8), color="#777777",
                  textcoords="offset points", ha="right", va="bottom")  # fmt: skip
    for name, colour in COLOURS.items():
        rows = [row for row in report["rows"] if row["varied"] == name]
        times = [row["best"] for row in rows]
        of_base = report["base"][name]
        axes.plot([row["times_size"] for row in rows], times, "o-", color=colour,
                  label=f"{name} (from {of_base:,})")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [f"{size} ×" for size in sizes])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("size, one thing grown at a time")
    axes.set_ylabel("seconds an epoch")
    about = report["machine"]
    axes.set_title(f"Training, {about['device']}, {about['threads']} threads", fontsize=10)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    click.echo(f"Written to {out}")


if __name__ == "__main__":
    main()
