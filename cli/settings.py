"""``imvia-graph settings``."""

from __future__ import annotations

import click

from imvia_graph.settings import PRESETS, Settings, presets


@click.command()
@click.argument("preset", required=False, type=click.Choice(presets()))
def settings(preset: str | None) -> None:
    """Print every setting with its default and description, as a YAML file.

    With the name of a preset, print the preset's file: only the settings that differ from the
    defaults. `fit --settings` and `tune --settings` accept the name, too. The preset "paper" sets
    the model and its training as in the paper.

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
