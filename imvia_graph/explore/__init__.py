"""Looking around in a trained run with the browser, and the same as a JSON service.

`make_app` gives the ASGI application, `serve` runs it. It answers on this machine only unless told
otherwise, hands out no file but small pictures of the run's own views, and needs no network.
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

#: Bytes of a request's line and headers: three labels of 100,000 letters are 2.7 MB in a link.
LONGEST_HEAD = 4 * 1024**2


def make_app(
    run: Run,
    *,
    pictures: Pictures | None = None,
    text_encoder: str | Encoder | None = None,
    allow_hosts: Sequence[str] = (),
    held: int | None = None,
) -> Any:
    """The ASGI application for a run.

    Parameters
    ----------
    run : Run
        A trained run.
    pictures : Pictures, optional
        Where the pictures of the views are. Default: what the graph and the run folder know.
    text_encoder : str or Encoder, optional
        What made the graph's ``text`` views, or its name as for `imvia_graph.encode.get_encoder`;
        with it, new entities can be asked about by texts.
    allow_hosts : sequence of str
        Names under which requests may ask for this service, beside ``localhost`` and addresses.
    held : int, optional
        Bytes of candidate tables that are held ready, at most; see `Predictor`. Default: 2^30.

    Raises
    ------
    DataError
        FastAPI is not installed, or the encoder does not fit the graph.
    EncoderError
        There is no encoder of that name, or it is none of texts.

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
            "The candidate tables take %.1f GiB, more than may be held ready: each question makes"
            " them anew, which takes seconds. With more memory say --hold %d (held=, in bytes).",
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
    """Run an application until it is stopped.

    Parameters
    ----------
    app
        What `make_app` made.
    host, port
        Where to listen; port 0 for any that is free.
    on_ready : callable, optional
        Called with the address to open, once it is listened at.

    Raises
    ------
    DataError
        The host is empty, which the system would take for all addresses of this machine.
    OSError
        The port is taken, or the address not this machine's.
    """
    if not host.strip():
        raise DataError("host: expected an address; 0.0.0.0 stands for all of this machine's.")
    try:
        import uvicorn
    except ImportError as error:
        raise _not_installed(error) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        # Taken over by its connections. Without it the second part of an answer waits 40 ms for the
        # first to be acknowledged; asyncio sets it only on sockets that were made naming TCP.
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
            # Behind no proxy, and so nobody's word is taken for where a request comes from.
            proxy_headers=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _not_installed(error: ImportError) -> DataError:
    return DataError(
        f"What the explorer runs on is not installed ({error}): pip install 'imvia-graph[explore]'."
    )


__all__ = ["make_app", "serve"]
