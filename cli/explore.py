"""``imvia-graph explore``."""

from __future__ import annotations

import math
from pathlib import Path

import click

from imvia_graph.cli.display import console
from imvia_graph.cli.options import device_option, run_argument

#: GiB of which the bytes are still a number that a machine counts with.
MOST_HELD = 2**30


def _finite(ctx: click.Context, option: click.Parameter, value: float) -> float:
    # Of "nan" no range tells that it is beyond its ends.
    if not math.isfinite(value):
        raise click.BadParameter(f"expected a number of GiB, received {value}.")
    return value


def _address(ctx: click.Context, option: click.Parameter, value: str) -> str:
    # The system takes nothing for all addresses that this machine has.
    if not value.strip():
        raise click.BadParameter("expected an address; 0.0.0.0 stands for all of this machine's.")
    return value


@click.command()
@run_argument
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--host",
    callback=_address,
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; another one than this lets other machines in.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Name by which browsers may ask, beside localhost and addresses; repeat for more.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder that the pictures' paths start from.  [default: what the graph says]",
)
@click.option(
    "--text-encoder",
    help="Encoder that made the graph's texts, to ask about new entities by texts.",
)
@click.option(
    "--hold",
    type=click.FloatRange(min=0, max=MOST_HELD),
    callback=_finite,
    default=4,
    show_default=True,
    metavar="GIB",
    help="Memory that candidate tables may take; larger ones are made anew for each question, which"
    " takes seconds.",
)
@device_option
def explore(
    run: Path,
    port: int,
    host: str,
    allow_hosts: tuple[str, ...],
    images: Path | None,
    text_encoder: str | None,
    hold: float,
    device: str,
) -> None:
    """Look around in the trained run in the folder RUN with the browser.

    Find an entity, choose a relation, see the ranked answers with what each modality and each
    picture or text counts for. The same is there as a JSON service, described at /docs. It listens
    on this machine only unless --host says otherwise, and shows no file but the run's own views.
    It needs the extra `explore`. Ctrl-C ends it.

    \b
    Examples:
      imvia-graph explore runs/countries-1
      imvia-graph explore runs/countries-1 --text-encoder minilm --port 8080
      imvia-graph explore runs/mine --images ~/pictures
    """
    from imvia_graph.explore import make_app, serve
    from imvia_graph.pictures import Pictures
    from imvia_graph.run import load

    trained = load(run, device)
    app = make_app(
        trained,
        pictures=Pictures(trained.kg, run, images),
        text_encoder=text_encoder,
        allow_hosts=allow_hosts,
        held=int(hold * 2**30),
    )
    serve(app, host, port, lambda address: console.print(f"Open {address}", markup=False))
