"""The explorer: a web page and a JSON service about a trained run.

`make_app` returns the ASGI application, `serve` runs it, by default for this machine only. It
serves no files of the run but small pictures of its views, and needs no network.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Sequence
from typing import Any

from imvia_graph.encode import Encoder, get_encoder
from imvia_graph.errors import DataError
from imvia_graph.pictures import Pictures
from imvia_graph.run import Run

logger = logging.getLogger(__name__)

#: Maximum bytes of a request line and headers: in a link, three labels of 100,000 letters are
#: 2.7 MB.
LONGEST_HEAD = 4 * 1024**2


def make_app(
    run: Run,
    *,
    pictures: Pictures | None = None,
    text_encoder: str | Encoder | None = None,
    allow_hosts: Sequence[str] = (),
    held: int | None = None,
) -> Any:
    """Return the explorer of a run as an ASGI application.

    Parameters
    ----------
    run : Run
        A trained run.
    pictures : Pictures, optional
        The pictures of the views. Default: those that the graph and the run folder name.
    text_encoder : str or Encoder, optional
        The encoder of the graph's ``text`` views, or its name as for
        `imvia_graph.encode.get_encoder`. With it, new entities can be described by texts.
    allow_hosts : sequence of str
        Host names to accept in requests, besides ``localhost`` and IP addresses.
    held : int, optional
        Maximum bytes of candidate tables kept in memory; see `Predictor`. Default: 2^30.

    Raises
    ------
    DataError
        FastAPI is not installed, or the encoder does not fit the graph.
    EncoderError
        There is no encoder of that name, or it does not encode texts.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> from imvia_graph.explore import make_app
    >>> kg = ig.load_kg("countries")
    >>> run = ig.fit(kg, epochs=0, dim=16)
    >>> app = make_app(run)
    >>> sorted(app.openapi()["paths"])[:3]
    ['/api/complete', '/api/complete-new', '/api/entities']
    """
    try:
        from imvia_graph.explore.service import Service
        from imvia_graph.explore.web import build
    except ImportError as error:
        raise _not_installed(error) from error
    if isinstance(text_encoder, str):
        text_encoder = get_encoder(text_encoder, "text", run.model.device)
    service = Service(run, pictures or Pictures(run.kg, run.folder), text_encoder, held)
    if not service.predictor.holds:
        logger.warning(
            "The candidate tables take %.1f GiB, more than the limit: they are recomputed for each"
            " query, which takes seconds. To keep them in memory, use --hold %d (held=, in bytes).",
            service.predictor.table_bytes / 2**30,
            math.ceil(service.predictor.table_bytes / 2**30),
        )
    return build(service, allow_hosts)


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an application until it is stopped.

    Parameters
    ----------
    app
        An application from `make_app`.
    host, port
        Address and port to listen on; port 0 for any free port.
    on_ready : callable, optional
        Called with the URL to open when the server listens.

    Raises
    ------
    DataError
        The host is empty, which the system would take as all addresses of this machine.
    OSError
        The port is in use, or the address is not one of this machine.
    """
    if not host.strip():
        raise DataError("host: expected an address; 0.0.0.0 means all of this machine's.")
    try:
        import uvicorn
    except ImportError as error:
        raise _not_installed(error) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        # Connections inherit TCP_NODELAY. Without it, the second part of a response waits 40 ms for
        # the acknowledgement of the first. asyncio sets it only on sockets created with
        # IPPROTO_TCP.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = f"[{host}]" if ":" in host else host
        if on_ready is not None:
            on_ready(f"http://{shown}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(
            app,
            http="h11",
            h11_max_incomplete_event_size=LONGEST_HEAD,
            log_level="warning",
            server_header=False,
            # The server is not behind a proxy, so headers about a request's origin are ignored.
            proxy_headers=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _not_installed(error: ImportError) -> DataError:
    return DataError(
        f"The explorer's packages are not installed ({error}): pip install 'imvia-graph[explore]'."
    )


__all__ = ["make_app", "serve"]
