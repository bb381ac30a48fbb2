"""``imvia-graph explore``."""

from __future__ import annotations

import math
from pathlib import Path

import click

from imvia_graph.cli.display import console
from imvia_graph.cli.options import device_option, run_argument

#: Largest --hold in GiB; its number of bytes still fits a 64-bit integer.
MAX_HOLD = 2**30


def _finite(ctx: click.Context, option: click.Parameter, value: float) -> float:
    # click's range check lets "nan" pass.
    if not math.isfinite(value):
        raise click.BadParameter(f"expected a number of GiB, received {value}.")
    return value


def _address(ctx: click.Context, option: click.Parameter, value: str) -> str:
    # The system would take an empty host as all addresses of this machine.
    if not value.strip():
        raise click.BadParameter("expected an address; 0.0.0.0 means all of this machine's.")
    return value


@click.command()
@run_argument
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any free port.",
)
@click.option(
    "--host",
    callback=_address,
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; by default only this machine can connect.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Host name to accept in requests, besides localhost and IP addresses; repeatable.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder that the pictures' paths are relative to.  [default: as the graph records]",
)
@click.option(
    "--text-encoder",
    help="Encoder of the graph's text features, to describe new entities by texts.",
)
@click.option(
    "--hold",
    type=click.FloatRange(min=0, max=MAX_HOLD),
    callback=_finite,
    default=4,
    show_default=True,
    metavar="GIB",
    help="Memory for candidate tables; larger ones are recomputed for each query, which takes"
    " seconds.",
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
    """Explore the trained run in the folder RUN in the browser.

    Choose an entity and a relation to see the ranked answers, the score by each head, and the
    weight of each picture and text. The same data is available as a JSON service, documented at
    /docs. The server accepts connections from this machine only, unless --host is given, and shows
    no files but the run's own views. It needs the extra `explore`; stop it with Ctrl-C.

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
