"""``imvia-graph settings``."""

from __future__ import annotations

import click

from imvia_graph.settings import PRESETS, Settings, presets


@click.command()
@click.argument("preset", required=False, type=click.Choice(presets()))
def settings(preset: str | None) -> None:
    """Print every setting with its default and what it is for, as a YAML file.

    With PRESET, settings that come with the package, print that file: what differs from the
    defaults. `fit --settings` and `tune --settings` take its name, too. "paper" has the model and
    its training as the paper has them.

    \b
    Examples:
      imvia-graph settings > my-settings.yaml
      imvia-graph fit countries --settings my-settings.yaml
      imvia-graph settings paper
      imvia-graph fit countries --settings paper --epochs 100
    """
    if preset is None:
        text = Settings().to_yaml(comments=True)
    else:
        text = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")
    click.echo(text, nl=False)
