"""Plots of a report as inline SVG, whose text takes the page's colour and font."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from imvia_graph._display import shown

#: Paul Tol's "bright" colours, safe for colour-blind readers, on white and on black.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
#: Placeholder for the page's text colour until the SVG is written.
_TEXT = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",  # keep text as text, to be searched, copied and read aloud
    "svg.hashsalt": "imvia-graph",  # make equal plots equal files
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
#: Maximum letters of a name in a plot; the tables show more.
LONGEST = 28

Series = Sequence[tuple[float, float]]


def curves(series: Mapping[str, Series], title: str, y: str) -> str:
    """Return a plot of one line per run over the epochs."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(series.items()):
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[place % len(COLOURS)],
                linestyle=STYLES[place % len(STYLES)],
                marker=MARKERS[place % len(MARKERS)] if len(points) < 30 else None,
                markersize=3,
                label=_escaped(name),
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(y)
        if len(series) > 1:
            axes.legend()
        return _svg(figure, title)


def bars(rows: Sequence[str], series: Mapping[str, Sequence[float]], title: str, x: str) -> str:
    """Return a plot of horizontal bars, one group per row and one bar per series; NaN for none."""
    with mpl.rc_context(_STYLE):
        thick = 0.8 / max(len(series), 1)
        height = 0.9 + len(rows) * max(0.22, 0.13 * len(series))
        figure = Figure(figsize=(5, height), layout="constrained")
        axes = figure.add_subplot()
        place = np.arange(len(rows))
        for i, (name, values) in enumerate(series.items()):
            axes.barh(
                place - 0.4 + thick * (i + 0.5),
                np.nan_to_num(np.array(values, dtype=float)),
                thick,
                color=COLOURS[i % len(COLOURS)],
                hatch=("", "////", "....", "xxxx")[i % 4],
                edgecolor="#888888",
                linewidth=0.3,
                label=_escaped(name),
            )
        axes.set_yticks(place, [_escaped(row) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        if len(series) > 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.75 / height), ncols=2)
        return _svg(figure, title)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], title: str
) -> str:
    """Return a heat map of shares from 0 to 1, with the numbers in per cent on the cells."""
    with mpl.rc_context(_STYLE):
        size = (1.9 + 0.52 * len(columns), 1.1 + 0.2 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        table = np.array(values, dtype=float)
        # The colours span the smallest to the largest share, since shares are close together.
        low, high = float(table.min()), float(table.max())
        axes.pcolormesh(table, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6))
        for (row, column), value in np.ndenumerate(table):
            bright = value > (low + high) / 2
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="#000000" if bright else "#ffffff",
            )
        axes.set_xticks(
            np.arange(len(columns)) + 0.5,
            [_escaped(column) for column in columns],
            rotation=40,
            ha="right",
        )
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_escaped(row) for row in rows])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        return _svg(figure, title)


def _escaped(name: str) -> str:
    """Escape a name, so that matplotlib takes it neither for mathematics nor for a hidden label."""
    text = shown(name, LONGEST).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


_numbers = iter(range(1, 2**62))


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an ``svg`` element with a title, unique ids and no style rules."""
    out = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib warns of letters that its font lacks, but the browser draws them.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    mark = f"p{next(_numbers)}-"

    def mended(tag: re.Match[str]) -> str:
        text = re.sub(r'\bid="', f'id="{mark}', tag[0])
        text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", text)
        text = text.replace(_TEXT, "currentColor")
        text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
        return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)

    # Only inside tags: the text between them may be any name, with < and > escaped.
    svg = re.sub(r"<[^>]*>", mended, svg)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
