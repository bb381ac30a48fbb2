"""Sphinx configuration: `make docs`, or `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from types import NoneType

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import imvia_graph

project = "imvia-graph"
version = release = imvia_graph.__version__
copyright = "the authors of imvia-graph"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # `name` in a docstring is a Python object

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

smartquotes_action = "qe"  # quotes and ellipses, not dashes: "--" begins an option

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # show torch.sigmoid, not its memory address
autodoc_typehints = "none"  # the docstrings state types and shapes
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"imvia-graph {version}"
copybutton_exclude = ".linenos, .gp, .go"


class SettingsTables(SphinxDirective):
    """Directive ``settings-tables``: tables of all settings, from `imvia_graph.Settings`."""

    def run(self) -> list[nodes.Node]:
        """Return a section with a table for each group of settings."""
        from imvia_graph.settings import Settings

        source = Path(inspect.getfile(Settings))
        self.env.note_dependency(str(source))
        # The groups are comments between the fields.
        group, groups = "", {}
        for line in inspect.getsource(Settings).splitlines():
            if found := re.match(r"    # -- (\w+)$", line):
                group = found[1]
            elif found := re.match(r"    (\w+): ", line):
                groups[found[1]] = group
        lines: list[str] = []
        for group in dict.fromkeys(groups.values()):
            lines += [f"## {group.capitalize()}", "", "| setting | default | values | |"]
            lines += ["| --- | --- | --- | --- |"]
            for name, field in Settings.model_fields.items():
                if groups[name] == group:
                    default = "null" if field.default is None else str(field.default).lower()
                    default = field.default if isinstance(field.default, str) else default
                    values = values_of(field.annotation) + bounds_of(field.metadata)
                    lines.append(f"| `{name}` | `{default}` | {values} | {field.description} |")
            lines.append("")
        container = nodes.section()
        container.document = self.state.document
        self.state.nested_parse(StringList(lines, str(source)), 0, container, match_titles=True)
        return container.children


def bounds_of(metadata: list[typing.Any]) -> str:
    """Return the bounds of a number as text that follows its type."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        (sign, getattr(part, name, None)) for part in metadata for name, sign in signs.items()
    ]
    # A seed's bound is a power of two.
    parts = [
        f"{sign} {bound:g}" if bound < 2**32 else f"{sign} 2^{bound.bit_length() - 1}"
        for sign, bound in bounds
        if bound is not None
    ]
    return f", {' and '.join(parts)}" if parts else ""


def values_of(annotation: typing.Any) -> str:
    """Return the type of a setting as the text of a table cell."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return "list of " + values_of(typing.get_args(annotation)[0])
    if parts := typing.get_args(annotation):
        return " or ".join(values_of(part) for part in parts)
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}
    return "`null`" if annotation is NoneType else names[annotation]


def escape_wildcards(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Escape each ``*`` in the help of an option: it is a wildcard, not emphasis."""
    lines[:] = [re.sub(r"(?<!\*)\*(?!\*)", r"\\*", line) for line in lines]


def show_examples_as_code(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    r"""Turn the indented lines below a ``\b`` in a command's help into shell code blocks."""
    shown, inside = [], False
    for line in lines:
        code = line.startswith("|   ")
        if code and not inside:
            shown += ["", ".. code-block:: sh", ""]
        if inside and not code:
            shown.append("")
        shown.append(line[1:] if code else line.removeprefix("| "))
        inside = code
    lines[:] = shown


def skip_fields(app: Sphinx, what: str, name: str, member: object, skip: bool, _: object) -> bool:
    """Skip the fields of named tuples, which the docstring of the tuple documents."""
    return skip or (getattr(member, "__doc__", None) or "").startswith("Alias for field number")


def setup(app: Sphinx) -> None:
    """Register the directive and the event handlers of this file."""
    app.add_directive("settings-tables", SettingsTables)
    app.connect("sphinx-click-process-options", escape_wildcards)
    app.connect("sphinx-click-process-description", show_examples_as_code)
    app.connect("autodoc-skip-member", skip_fields)
