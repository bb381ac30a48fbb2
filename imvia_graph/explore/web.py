"""The explorer over HTTP: routes, response schemas and protection against other sites.

- Host names are checked, so that a page of another site cannot reach the service through its own
  host name that resolves to this machine (DNS rebinding). IP addresses need no check.
- A strict content security policy allows only the page's own script and style, none inline.
- Requests contain no paths: a picture is requested by modality and number, and drawn again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from imvia_graph._version import __version__
from imvia_graph.errors import DataError, UnknownLabelError
from imvia_graph.explore.service import Service
from imvia_graph.inference import Side

#: Maximum letters of a text, answers, views of a new entity, and bytes of a body in a request.
LONGEST, MOST_ANSWERS, MOST_VIEWS, MOST_BYTES = 10_000, 1000, 256, 8 * 1024**2
#: Maximum letters of a label in a request.
LONGEST_LABEL = 100_000

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
STATIC = FilePath(__file__).parent / "static"
#: Path: file in STATIC, media type.
PAGES = {
    "/": ("explore.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/explore.js": ("explore.js", "text/javascript; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/explore.css": ("explore.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def _bounded(label: str) -> str:
    if len(label) > LONGEST_LABEL:
        raise ValueError(f"expected a label of at most {LONGEST_LABEL:,} letters")
    return label


# -- schemas --------------------------------------------------------------------------------------


class Relation(BaseModel):
    """A relation of the graph."""

    label: str
    name: str


class CountedRelation(Relation):
    """A relation with its number of training triples."""

    train: int


class About(BaseModel):
    """The explored run."""

    run: str
    graph: str
    entities: int
    triples: int
    epochs: int
    heads: list[str]
    modalities: list[str]
    encodes_texts: bool = Field(description="Whether texts can describe new entities.")
    relations: list[CountedRelation]


class Entity(BaseModel):
    """An entity of the graph."""

    label: str
    name: str


class View(BaseModel):
    """A view and its weights; the weights of an entity's views of a modality sum to 1."""

    view: int = Field(description="The view's number in its modality.")
    source: str = Field(description="The text itself, or the picture's path.")
    weight: float = Field(description="Weight under the relation.")
    plain_weight: float = Field(description="Weight without a relation.")
    picture: bool = Field(description="Whether /views/{modality}/{view} is a picture of it.")


class ViewedEntity(Entity):
    """An entity with its views by modality."""

    views: dict[str, list[View]]


class Answer(BaseModel):
    """An answer to a query."""

    rank: int
    label: str
    name: str
    score: float = Field(description="Score by the decision; comparable within a query only.")
    heads: dict[str, float] = Field(description="Score by each head.")
    known: bool = Field(description="Whether the triple is in the graph.")


class Completion(BaseModel):
    """Answers to a query, best first."""

    relation: Relation
    asked: Side
    given: ViewedEntity
    weights: dict[str, float] = Field(description="Weight of each head in the decision.")
    answers: list[Answer]


class Judgement(BaseModel):
    """A head's filtered rank and score of a triple, and its weight in the decision."""

    rank: float
    score: float
    weight: float


class Explained(BaseModel):
    """An explained triple."""

    head: ViewedEntity
    relation: Relation
    tail: ViewedEntity
    known: str | None = Field(description="The part of the graph that holds the triple, if any.")
    judgements: dict[Side, dict[str, Judgement]]


class NewEntity(BaseModel):
    """A query about an entity that is not in the graph, described by its views."""

    model_config = ConfigDict(extra="forbid")

    relation: Annotated[str, AfterValidator(_bounded)]
    ask: Side = Field("tail", description="The end to predict; the new entity is the other end.")
    views: dict[str, Annotated[list[list[float]], Field(max_length=MOST_VIEWS)]] = Field(
        default_factory=dict,
        max_length=32,
        description="Features by modality, one row per view, from the graph's encoder.",
    )
    texts: list[Annotated[str, Field(max_length=LONGEST)]] = Field(
        default_factory=list,
        max_length=32,
        description="Texts, if the service encodes texts; blank ones are ignored.",
    )
    top: int = Field(20, ge=1, le=MOST_ANSWERS)


class NewCompletion(BaseModel):
    """Answers for an entity unknown to the model, scored by the heads of its views only."""

    relation: Relation
    asked: Side
    heads: list[str]
    note: str
    answers: list[Answer]


class Problem(BaseModel):
    """The reason why there is no answer."""

    detail: str


# -- routes ---------------------------------------------------------------------------------------

Label = Annotated[
    str,
    AfterValidator(_bounded),
    Query(description="Label or display name, up to 100,000 letters."),
]
REFUSED: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "No such entity or relation."},
    422: {"model": Problem, "description": "The request is invalid."},
}


def build(service: Service, allow_hosts: Sequence[str] = ()) -> FastAPI:
    """Return the application: pages, JSON service, guards."""
    app = FastAPI(
        title="imvia-graph explore",
        version=__version__,
        description="Completions of a multi-modal knowledge graph, with explanations.",
        docs_url=None,  # FastAPI's own pages need a network
        redoc_url=None,
        lifespan=_few_threads,
    )
    app.add_middleware(Guard, allow_hosts=allow_hosts)
    app.add_exception_handler(UnknownLabelError, _problem(404))
    app.add_exception_handler(DataError, _problem(422))
    app.add_exception_handler(RequestValidationError, _invalid)
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, _page(name, kind), methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/api/run", response_model=About, summary="The run: graph, heads, relations")
    def about() -> Any:
        return service.about()

    @app.get(
        "/api/entities",
        response_model=list[Entity],
        responses={422: REFUSED[422]},
        summary="Entities by name",
    )
    def entities(
        q: Annotated[str, Query(max_length=LONGEST, description="Part of a name.")] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
    ) -> Any:
        return service.search(q, limit)

    @app.get(
        "/api/complete",
        response_model=Completion,
        responses=REFUSED,
        summary="Answers to (head, relation, ?) or (?, relation, tail)",
    )
    def complete(
        relation: Label,
        head: Label | None = None,
        tail: Label | None = None,
        top: Annotated[int, Query(ge=1, le=MOST_ANSWERS)] = 20,
        known: Annotated[bool, Query(description="Include known facts of the graph.")] = False,
        itself: Annotated[
            bool, Query(alias="self", description="Include the given entity itself.")
        ] = False,
    ) -> Any:
        return service.complete(relation, head, tail, top, known, itself)

    @app.get(
        "/api/explain",
        response_model=Explained,
        responses=REFUSED,
        summary="Explanation of a triple",
    )
    def explain(head: Label, relation: Label, tail: Label) -> Any:
        return service.explain(head, relation, tail)

    @app.post(
        "/api/complete-new",
        response_model=NewCompletion,
        responses={
            **REFUSED,
            400: {"model": Problem, "description": "The body cannot be read."},
            413: {"model": Problem, "description": "The body is too large, or chunked."},
        },
        summary="Answers for an entity that is not in the graph, by its views",
    )
    def complete_new(new: NewEntity) -> Any:
        return service.complete_new(new.relation, new.ask, new.views, new.texts, new.top)

    @app.get(
        "/views/{modality}/{view}",
        response_class=Response,
        responses={
            200: {"content": {"image/webp": {}}, "description": "The picture, small."},
            **REFUSED,
        },
        summary="A view that is a picture",
    )
    def view(
        modality: Annotated[str, Path(max_length=255)],
        view: Annotated[int, Path(ge=0, le=2**62)],
    ) -> Response:
        return Response(
            service.picture(modality, view),
            media_type="image/webp",
            headers={"Cache-Control": "private, max-age=3600"},
        )

    return app


@asynccontextmanager
async def _few_threads(app: FastAPI) -> AsyncIterator[None]:
    """Limit the worker threads: queries wait for the model anyway, and threads take memory."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 4
    yield


def _page(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (STATIC / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


def _problem(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        # Replace lone surrogates, which JSON can represent and UTF-8 cannot.
        detail = str(error).encode("utf-8", "replace").decode("utf-8")
        return JSONResponse({"detail": detail}, status_code=status)

    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    """Report what is wrong with a request, without the values sent, which may be of any size."""
    assert isinstance(error, RequestValidationError)
    problems = [
        f"{'.'.join(str(part) for part in found['loc'][:3])[:200]}:"
        f" {found['msg'].removeprefix('Value error, ')[:200]}"
        for found in error.errors()[:5]
    ]
    return await _problem(422)(request, DataError("; ".join(problems)))


# -- guards ---------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware that checks the host and the size of the body and adds security headers."""

    def __init__(self, app: Any, allow_hosts: Sequence[str] = ()) -> None:
        self.app = app
        self.hosts = {"localhost", *(host.casefold() for host in allow_hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if not self.allows(headers.get(b"host", b"").decode("latin-1")):
            answer = JSONResponse(
                {"detail": "This host name is not allowed; see --allow-host."}, status_code=400
            )
            await answer(scope, receive, guarded)
            return
        if _size(headers) > MOST_BYTES:
            answer = JSONResponse({"detail": "The body is too large."}, status_code=413)
            await answer(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)

    def allows(self, host: str) -> bool:
        """Return whether a Host header is an IP address or an allowed name."""
        name = host.rpartition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
        if name.casefold() in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _size(headers: dict[bytes, bytes]) -> float:
    """Return the size of the body, or infinity if it is chunked and so of unknown size."""
    if b"transfer-encoding" in headers:
        return float("inf")
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else float("inf")
