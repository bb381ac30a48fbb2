"""A self-contained HTML report about one or more runs.

The file has no scripts and loads nothing: plots are inline SVG, pictures are small data URLs. The
page's content security policy forbids anything else.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from imvia_graph import _files
from imvia_graph._display import shown
from imvia_graph.errors import DataError
from imvia_graph.export import check_free
from imvia_graph.pictures import Pictures
from imvia_graph.report.gather import Numbers, environment, gather, sizes
from imvia_graph.run import Run

#: Maximum number of relations in a plot; the tables have all.
PLOTTED = 20
METRICS = {
    "mrr": "MRR %",
    "hits@1": "Hits@1 %",
    "hits@3": "Hits@3 %",
    "hits@10": "Hits@10 %",
    "hits@100": "Hits@100 %",
    "mr": "mean rank",
}


def write_report(
    runs: Sequence[Run] | Run,
    path: str | os.PathLike[str],
    *,
    pictures: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write an HTML file that shows runs side by side.

    The page has sizes of the graphs, loss and validation curves, metrics with their differences to
    the first run, their mean and standard deviation over runs that differ only in the seed, metrics
    by relation, side and degree, the decision's weights by relation, the best and the worst
    answers, entities whose view weights depend on the relation, the settings, the environment and
    the commands. It ranks the test triples, or the validation triples if there are none.

    Parameters
    ----------
    runs : Run or sequence of Run
        Trained runs, possibly of different graphs.
    path : path
        The file to write.
    pictures : path, optional
        The folder that the paths of the image views are relative to. Default: the folder that the
        graph records, and ``pictures/`` in the run folder.
    force : bool
        Whether to overwrite an existing file.
    progress : callable, optional
        Called with a run's name, the number of its queries ranked so far, and their total number.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    DataError
        There are no runs, the file exists or belongs to a run, a run has no triples to rank, or
        matplotlib or Jinja is not installed.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> run = ig.fit("countries", epochs=1, dim=16)
    >>> path = ig.write_report(run, pathlib.Path(tempfile.mkdtemp()) / "report.html")
    >>> path.read_text(encoding="utf-8")[:15]
    '<!DOCTYPE html>'
    """
    path = Path(path)
    runs = [runs] if isinstance(runs, Run) else list(runs)
    for run in runs:
        if not isinstance(run, Run):
            raise DataError(
                f"report: expected a Run, or several; received {run!r}. `imvia_graph.load` reads"
                " one from a run folder."
            )
    if not runs:
        raise DataError("report: expected at least one run.")
    check_free(path, force)
    try:
        template = _template()
    except ImportError as error:
        raise DataError(
            f"The report's packages are not installed ({error}): pip install 'imvia-graph[report]'."
        ) from error
    names = _names(runs)
    found = [
        gather(
            run,
            name,
            Pictures(run.kg, run.folder, pictures),
            None if progress is None else partial(progress, name),
        )
        for run, name in zip(runs, names, strict=True)
    ]
    _files.write_text(path, template.render(**_page(found, path)), follow=True)
    return path


def _template() -> Any:
    import jinja2
    import matplotlib  # noqa: F401 - fail before the work begins if it is missing

    here = Path(__file__).parent
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = shown
    made.filters["percent"] = lambda value: "" if value is None else f"{100 * value:.2f}"
    made.filters["share"] = lambda value: f"{100 * value:.1f}"
    made.globals["css"] = (here / "page.css").read_text(encoding="utf-8")
    return made.get_template("page.html")


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs' folders, numbered if two are equal."""
    names = [run.folder.name if run.folder else run.kg.name or "run" for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _page(found: Sequence[Numbers], path: Path) -> dict[str, Any]:
    """Return the variables of the template."""
    return {
        "runs": found,
        "title": "imvia-graph: " + ", ".join(shown(numbers.name, 40) for numbers in found),
        "graphs": [{"name": n.name, "sizes": sizes(n.run.kg), "kg": n.run.kg} for n in found],
        "metrics": METRICS,
        "rows": _metric_rows(found),
        "seeds": _over_seeds(found),
        "cell": _cell,
        "difference": _difference,
        "direction": _direction,
        "plots": _plots(found),
        "by_relation": _by_relation(found),
        "by_degree": _by_degree(found),
        "settings": _settings(found),
        "versions": _versions(found),
        "environment": environment(),
        "commands": _commands(found, path),
        "numbers": {n.name: {"split": n.split, "metrics": n.metrics} for n in found},
    }


def _metric_rows(found: Sequence[Numbers]) -> list[tuple[str, list[Mapping[str, float] | None]]]:
    """Return labels of scorer and side with the metrics per run; None if a run lacks the head."""
    rows: list[tuple[str, list[Mapping[str, float] | None]]] = [
        ("decision, both sides", [n.metrics["both"] for n in found]),
        ("decision, head prediction", [n.metrics["head"] for n in found]),
        ("decision, tail prediction", [n.metrics["tail"] for n in found]),
    ]
    heads = dict.fromkeys(head for n in found for head in n.metrics["heads"])
    if len(heads) > 1:
        rows += [(f"{head} head", [n.metrics["heads"].get(head) for n in found]) for head in heads]
    return rows


def _over_seeds(found: Sequence[Numbers]) -> list[tuple[list[str], list[tuple[str, list[str]]]]]:
    """Return names and rows (label, mean ± standard deviation) of runs that differ in the seed."""
    groups: dict[str, list[Numbers]] = defaultdict(list)
    for n in found:
        settings = n.run.settings.model_dump(mode="json", exclude={"seed"})
        ranked = n.run.kg.triples(n.split).numpy().tobytes()
        key = n.run.kg.name, sizes(n.run.kg), n.split, hash(ranked), settings
        groups[repr(key)].append(n)
    return [
        (
            [n.name for n in group],
            [
                (label, [_spread(metric, values) for metric in METRICS])
                for label, values in _metric_rows(group)
            ],
        )
        for group in groups.values()
        if len({n.run.settings.seed for n in group}) == len(group) > 1
    ]


def _spread(metric: str, runs: Sequence[Mapping[str, float] | None]) -> str:
    """Return the mean and the sample standard deviation of a metric over runs with equal heads."""
    values = [metrics[metric] for metrics in runs if metrics is not None]
    if metric == "mr":
        return f"{mean(values):.1f} ± {stdev(values):.1f}"
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}"


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if metric == "mr" else f"{100 * value:.2f}"


def _difference(metric: str, value: float | None, first: float | None) -> str:
    if value is None or first is None:
        return ""
    return f"{value - first:+.1f}" if metric == "mr" else f"{100 * (value - first):+.2f}"


def _direction(metric: str, value: Mapping[str, float], first: Mapping[str, float] | None) -> str:
    """Return the CSS class that colours a difference; its sign gives the same information."""
    if first is None or value[metric] == first[metric]:
        return ""
    return "better" if (value[metric] > first[metric]) != (metric == "mr") else "worse"


def _plots(found: Sequence[Numbers]) -> dict[str, Any]:
    # Imported here because matplotlib takes a second to import.
    from imvia_graph.report import plots

    made: dict[str, Any] = {"curves": [], "relations": [], "degrees": "", "weights": []}
    trained = [n for n in found if n.epochs]
    if trained:
        losses = dict.fromkeys(
            key
            for n in trained
            for key, value in n.epochs[0].items()
            if isinstance(value, float) and key != "seconds"
        )
        for key in losses:
            title = "Loss" if key == "loss" else f"Loss: {key}"
            lines = {
                n.name: [(e["epoch"], e[key]) for e in n.epochs if key in e]
                for n in trained
                if any(key in e for e in n.epochs)
            }
            made["curves"].append((title, plots.curves(lines, title, key)))
        validated = {
            n.name: [(e["epoch"], 100 * e["valid"]["mrr"]) for e in n.epochs if "valid" in e]
            for n in trained
        }
        validated = {name: points for name, points in validated.items() if points}
        if validated:
            title = "Validation MRR"
            curve = plots.curves(validated, title, "MRR %")
            made["curves"].insert(1, (title, curve))
    names = list(dict.fromkeys(row.name for n in found for row in n.relations))[:PLOTTED]
    for side, title in (("tail", "MRR, tail prediction"), ("head", "MRR, head prediction")):
        series = {}
        for n in found:
            of = {row.name: 100 * getattr(row, side)["mrr"] for row in n.relations}
            series[n.name] = [of.get(name, math.nan) for name in names]
        made["relations"].append((title, plots.bars(names, series, title, "MRR %")))
    labels = [label for label, _ in _by_degree(found)]
    series = {}
    for n in found:
        by_label = {label: 100 * metrics["mrr"] for label, _, metrics in n.degrees}
        series[n.name] = [by_label.get(label, math.nan) for label in labels]
    made["degrees"] = plots.bars(labels, series, "MRR by degree of the correct answer", "MRR %")
    for n in found:
        heads = n.run.model.heads
        if len(heads) == 1:
            continue
        rows = n.weights[:PLOTTED]
        for side in ("tail", "head"):
            title = f"{shown(n.name)}: weights in per cent, {side} prediction"
            values = [[weights[side][head] for head in heads] for _, weights in rows]  # type: ignore[index]
            made["weights"].append(
                (title, plots.heat_map([name for name, _ in rows], heads, values, title))
            )
    return made


def _by_relation(found: Sequence[Numbers]) -> list[tuple[str, list[Any]]]:
    """Return the name of each relation with its row in each run, or None."""
    of = [{row.label: row for row in n.relations} for n in found]
    labels = dict.fromkeys(label for rows in of for label in rows)
    return [
        (next(rows[label].name for rows in of if label in rows), [rows.get(label) for rows in of])
        for label in labels
    ]


def _by_degree(found: Sequence[Numbers]) -> list[tuple[str, list[Any]]]:
    of = [{label: (count, metrics) for label, count, metrics in n.degrees} for n in found]
    labels = dict.fromkeys(label for rows in of for label in rows)
    ordered = sorted(labels, key=lambda label: int(label.split()[0]))
    return [(label, [rows.get(label) for rows in of]) for label in ordered]


def _settings(found: Sequence[Numbers]) -> list[tuple[str, list[Any], bool]]:
    """Return each setting's name, values per run, and whether they differ, which sorts first."""
    of = [n.run.settings.model_dump(mode="json") for n in found]
    rows = []
    for key in of[0]:
        values = [_plain(settings.get(key)) for settings in of]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(found: Sequence[Numbers]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for n in found for name in n.versions)
    return [(name, [n.versions.get(name, "–") for n in found]) for name in names]


def _commands(found: Sequence[Numbers], path: Path) -> list[tuple[str, str]]:
    """Return titles and commands that retrain the runs from their folders and make this page."""
    commands = []
    folders = [str(n.run.folder) for n in found if n.run.folder is not None]
    for folder in folders:
        # Published: validation triples of the folder's graph are already held out.
        parts = ["imvia-graph", "fit", f"{folder}/kg", "--settings", f"{folder}/settings.yaml"]
        parts += ["--validation", "published", "--out", f"{folder}-again"]
        commands.append((f"Train {shown(Path(folder).name)} again", shlex.join(parts)))
    if len(folders) == len(found):
        parts = ["imvia-graph", "report", *folders, "--out", str(path)]
        commands.append(("Make this page", shlex.join(parts)))
    return commands


__all__ = ["write_report"]
