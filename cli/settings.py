"""``imvia-graph settings``."""

from __future__ import annotations

import click

from imvia_graph.settings import Settings


@click.command()
def settings() -> None:
    """Print every setting with its default and what it is for, as a YAML file.

    \b
    Examples:
      imvia-graph settings > my-settings.yaml
      imvia-graph fit countries --settings my-settings.yaml
    """
    click.echo(Settings().to_yaml(comments=True), nl=False)
