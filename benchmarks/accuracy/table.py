"""Collect the rows of run.py into one file, tables for the documentation, and a plot.

    python benchmarks/accuracy/table.py

The script writes benchmarks/results/accuracy.json, a list of rows, and docs/images/ablation.svg. It
replaces the tables between the markers ``<!-- accuracy:NAME -->`` and ``<!-- /accuracy:NAME -->``
in docs/accuracy.md and README.md. NAME is ``summary`` (test MRR), ``results`` (one table per data
set), ``countries`` or ``ablation``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import matplotlib
from features import ALL, DATASETS
from protocol import METRICS, Row
from run import BASELINE, DEFAULTS, FULL, RESULTS, settings_of, variants

from imvia_graph import _files

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
GATHERED = RESULTS.with_suffix(".json")
PICTURE = ROOT / "docs" / "images" / "ablation.svg"
PAGES = (ROOT / "docs" / "accuracy.md", ROOT / "README.md")

#: Table II of the paper, test metrics in %, from pictures, texts and structure.
PUBLISHED = {
    "DB15K": {"mrr": 38.29, "hits@1": 30.34, "hits@10": 53.55},
    "MKG-W": {"mrr": 35.62, "hits@1": 30.22, "hits@10": 46.35},
    "MKG-Y": {"mrr": 37.97, "hits@1": 35.15, "hits@10": 43.47},
}
#: Row names of the tables, by variant.
NAMES = {
    FULL: "IMVIA, structure and names",
    DEFAULTS: "IMVIA, structure and names, default settings",
    "structure-alone": "structure alone",
    "defaults-structure-alone": "structure alone, default settings",
    "text-alone": "text alone",
    "image-alone": "pictures alone",
    BASELINE: "ComplEx-N3",
}
PAPER = "IMVIA, as published: with pictures and texts"
SINGLE = ("structure-alone", "image-alone", "text-alone")
#: Groups of the ablation, and the row name of each variant.
ABLATION = {
    "Without a part of the paper": {
        "without-structure": "no structural head",
        "without-image": "no pictures",
        "without-text": "no texts",
        "without-joint": "no joint head",
        "without-information": "no L1, mutual information",
        "gate-entity": "gate without the relation",
        "uniform-views": "no gate: equal view weights",
        "mean-decision": "mean of the heads in place of the decision",
    },
    "One modality alone": {name: NAMES[name] for name in SINGLE},
    "With a part of the paper that the defaults leave out": {
        "with-alignment": "L2, contrastive alignment, as in CLIP",
        "printed-alignment": "L2 as printed, Eq. 5",
        "candidates-relation": "candidates embedded under the relation, Eq. 1",
        "trained-decision": "heads also trained by the decision's loss",
        "binary-loss": "binary loss, Eq. 7, other settings unchanged",
        "binary-settings": "binary loss, Eq. 7, with TuckER's settings",
        "published-losses": "all losses as printed, other settings unchanged",
    },
    "Without an addition to the paper": {
        "without-residual": "no free vector per entity and modality",
        "without-relation-residual": "no block-diagonal matrix per relation",
        "without-regularization": "no regularisation",
        "one-optimizer": "one optimizer for layers and tables",
    },
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def gather(results: Path) -> list[Row]:
    """Read all rows in a folder, ordered by data set, variant and seed."""
    rows = [_files.read_json(path) for path in results.glob("*.json")]
    order = {name: i for i, name in enumerate(variants())}
    return sorted(
        rows,
        key=lambda row: (
            ALL.index(row["dataset"]),
            order.get(row["variant"], len(order)),
            row["variant"],
            row["seed"],
        ),
    )


def of(rows: Sequence[Row], dataset: str, variant: str) -> list[Row]:
    """Return the rows of a data set and a variant, one per seed."""
    return [row for row in rows if (row["dataset"], row["variant"]) == (dataset, variant)]


# -- tables ---------------------------------------------------------------------------------------


def results_tables(rows: Sequence[Row]) -> str:
    """Return one table per published data set: ours, the baseline and the paper's figures."""
    parts = []
    for dataset in DATASETS:
        lines = []
        for variant in (FULL, DEFAULTS, "structure-alone", "defaults-structure-alone", BASELINE):
            if mine := of(rows, dataset, variant):
                lines.append([name_of(dataset, variant), *cells(mine)])
        if not lines:
            continue
        figures = PUBLISHED[dataset]
        published = [f"{figures[name]:.2f}" if name in figures else "" for name in METRICS]
        lines.append([PAPER, "", *published, "", ""])
        parts.append(f"**{dataset}**\n\n" + markdown(HEADER, lines))
    return "\n\n".join(parts)


def summary_table(rows: Sequence[Row]) -> str:
    """Return a table of test MRR on the published data sets: ours, the baseline, the paper."""
    names = {
        DEFAULTS: f"{NAMES[FULL]}, default settings",
        FULL: "the same, settings chosen for the data set",
        "defaults-structure-alone": NAMES["defaults-structure-alone"],
        BASELINE: f"{NAMES[BASELINE]}, structure alone, tuned",
    }
    lines = []
    for variant, name in names.items():
        found = [spread([row["test"]["mrr"] for row in of(rows, d, variant)]) for d in DATASETS]
        if any(found):
            lines.append([name, *found])
    lines.append([PAPER, *[f"{PUBLISHED[dataset]['mrr']:.2f}" for dataset in DATASETS]])
    return markdown(["", *DATASETS], lines) if len(lines) > 1 else ""


def name_of(dataset: str, variant: str) -> str:
    """Return the name of a row; that of the full model says which settings it has."""
    if variant != FULL:
        return NAMES[variant]
    whose = "its own" if settings_of(dataset, FULL) else "default"
    return f"{NAMES[FULL]}, {whose} settings"


def countries_table(rows: Sequence[Row]) -> str:
    """Return the table of `countries`: the full model and each modality alone."""
    lines = [
        [name, *cells(mine)]
        for variant in (FULL, *SINGLE)
        if (mine := of(rows, "countries", variant))
        for name in [NAMES[variant] if variant != FULL else "all: structure, pictures, texts"]
    ]
    return markdown(HEADER, lines) if lines else ""


HEADER = [
    "",
    "validation MRR",
    "test MRR",
    "Hits@1",
    "Hits@3",
    "Hits@10",
    "seeds",
    "minutes per seed",
]


def cells(rows: Sequence[Row]) -> list[str]:
    """Return the cells of a variant: validation MRR, test metrics, seeds, minutes."""
    # A row that took its number of epochs from another row repeats that row's validation.
    validated = [row["valid"]["mrr"] for row in rows if row["epochs_of"] == row["seed"]]
    test = [spread([row["test"][name] for row in rows]) for name in METRICS]
    minutes = f"{mean(row['seconds'] for row in rows) / 60:.1f}"
    # One CPU core, unless the cell names a GPU.
    devices = sorted({row.get("device", "cpu") for row in rows} - {"cpu"})
    minutes = ", ".join([minutes, *devices])
    return [spread(validated), *test, str(len(rows)), minutes]


def spread(values: Sequence[float], pattern: str = "{:.2f}") -> str:
    """Format fractions in % as mean ± standard deviation, or one value alone."""
    if not values:
        return ""
    text = pattern.format(100 * mean(values))
    return text if len(values) == 1 else f"{text} ± {100 * stdev(values):.2f}"


def differences(rows: Sequence[Row], dataset: str, variant: str) -> list[float]:
    """Return the test MRR of a variant minus that of the full model, seed by seed."""
    full = {row["seed"]: row["test"]["mrr"] for row in of(rows, dataset, FULL)}
    mine = of(rows, dataset, variant)
    return [row["test"]["mrr"] - full[row["seed"]] for row in mine if row["seed"] in full]


def ablation(rows: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Return the data sets, and the groups of variants, that have rows in the ablation."""
    grouped = {variant for group in ABLATION.values() for variant in group}
    rest = [name for name in variants() if name not in {FULL, DEFAULTS, BASELINE, *grouped}]
    every = {**ABLATION, "Others": {name: name.replace("-", " ") for name in rest}}
    groups = {
        title: {v: name for v, name in group.items() if any(differences(rows, d, v) for d in ALL)}
        for title, group in every.items()
    }
    groups = {title: group for title, group in groups.items() if group}
    there = [variant for group in groups.values() for variant in group]
    return [d for d in ALL if any(differences(rows, d, v) for v in there)], groups


def ablation_table(rows: Sequence[Row]) -> str:
    """Return the ablation table, differences of test MRR to the full model."""
    datasets, groups = ablation(rows)
    if not groups:
        return ""
    full = [spread([row["test"]["mrr"] for row in of(rows, d, FULL)]) for d in datasets]
    lines = [["all parts: test MRR", f"`{FULL}`", *full]]
    for title, group in groups.items():
        lines.append([f"**{title}**", *[""] * (1 + len(datasets))])
        for variant, name in group.items():
            found = [spread(differences(rows, d, variant), "{:+.2f}") for d in datasets]
            lines.append([name, f"`{variant}`", *found])
    return markdown(["", "variant", *datasets], lines)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "summary": summary_table,
    "results": results_tables,
    "countries": countries_table,
    "ablation": ablation_table,
}


def fill(page: Path, rows: Sequence[Row], picture: Path) -> None:
    """Put the tables between a page's markers, or a note if there are no rows."""
    text = page.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        table = make(rows) or "Not measured."
        if name == "ablation" and picture.exists():
            place = Path(os.path.relpath(picture, page.parent)).as_posix()
            table += f"\n\n![Test MRR of each variant less that of the full model]({place})"
        marks = re.compile(rf"(<!-- accuracy:{name} -->\n).*?(<!-- /accuracy:{name} -->)", re.S)
        text = marks.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")


# -- the picture ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], out: Path) -> None:
    """Draw the ablation as bars: one group per variant, one bar per data set."""
    datasets, groups = ablation(rows)
    names = [variant for group in groups.values() for variant in group]
    # Equal figures give an identical file; text is drawn in the reader's own font.
    matplotlib.rcParams.update({"svg.hashsalt": "imvia-graph", "svg.fonttype": "none"})
    matplotlib.rcParams.update({"font.family": "sans-serif", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(6.4, 1.2 + 0.45 * len(names)), layout="constrained")
    height = 0.8 / len(datasets)
    for i, dataset in enumerate(datasets):
        drawn: list[tuple[float, float, float]] = []
        for place, name in enumerate(names):
            if found := [100 * value for value in differences(rows, dataset, name)]:
                error = stdev(found) if len(found) > 1 else 0.0
                drawn.append((place + (i - (len(datasets) - 1) / 2) * height, mean(found), error))
        places, means, errors = zip(*drawn, strict=True)
        style: dict[str, Any] = {"color": COLOURS[i], "label": dataset, "ecolor": "#777777"}
        axes.barh(places, means, height, xerr=errors, error_kw={"linewidth": 1}, **style)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("-", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("test MRR, points more or less than the full model")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


@click.command(context_settings={"show_default": True})
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--out", type=click.Path(path_type=Path), default=GATHERED)
@click.option("--picture", type=click.Path(path_type=Path), default=PICTURE)
@click.option("--page", "pages", multiple=True, type=click.Path(path_type=Path), default=PAGES)
def main(results: Path, out: Path, picture: Path, pages: tuple[Path, ...]) -> None:
    """Collect the rows of run.py, fill the tables of the pages, and draw the ablation."""
    rows = gather(results)
    if not rows:
        raise click.ClickException(
            f"{results} has no rows; make some: python benchmarks/accuracy/run.py"
        )
    out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if ablation(rows)[1]:
        draw(rows, picture)
    for page in pages:
        fill(page, rows, picture)
    for make in TABLES.values():
        click.echo(f"{make(rows)}\n")


if __name__ == "__main__":
    main()
