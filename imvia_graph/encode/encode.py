"""`encode_kg` and `encode_views`: encoding of raw views into features, batch by batch.

Threads read, hash and decode files while a batch is encoded. Equal inputs are encoded once. The
position of an input among the distinct inputs determines its batch, so that an interrupted run
resumes with the same batches and computes bitwise identical features.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imvia_graph.encode.encoder import Encoder, get_encoder, named_encoder
from imvia_graph.encode.parts import Parts
from imvia_graph.encode.pictures import MOST_BYTES, BrokenPicture, open_picture
from imvia_graph.errors import DataError, EncoderError
from imvia_graph.io.features import with_views
from imvia_graph.io.views import Column, RawViews, read_images, read_texts
from imvia_graph.kg import MultiViewKG, Views

Precision = Literal["auto", "float32", "bfloat16", "float16"]
#: Progress callback: modality, views done, views in total.
Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """Counts of the encoding of one modality.

    Attributes
    ----------
    modality, encoder : str
        The modality, and the name of the encoder.
    views : int
        Views with features.
    encoded, reused : int
        Distinct inputs encoded by this call, and distinct inputs found in the cache.
    equal : int
        Views with the same input as a view of another entity, which were not encoded again.
    repeated : int
        Views left out because their entity already has a view with the same input.
    cut : int
        Distinct texts, ``encoded`` or ``reused``, that are longer than the encoder's context, so
        that their ends are ignored. 0 if the encoder does not report this.
    context_length : int or None
        Number of tokens of a text that the encoder reads; None if the encoder does not report it.
    broken : list of (str, str)
        Source of each view that was left out because it cannot be read, and the reason.
    seconds : float
        Wall time in seconds.
    """

    modality: str
    encoder: str
    views: int = 0
    encoded: int = 0
    reused: int = 0
    equal: int = 0
    repeated: int = 0
    cut: int = 0
    context_length: int | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


class Encoded(NamedTuple):
    """Views with features, and the report of their encoding."""

    views: Views
    report: Report


def encode_kg(
    kg: MultiViewKG,
    *,
    images: str | os.PathLike[str] | RawViews | None = None,
    texts: str | os.PathLike[str] | RawViews | None = None,
    image_encoder: str | Encoder | None = None,
    text_encoder: str | Encoder | None = None,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    precision: Precision = "auto",
    cache: str | os.PathLike[str] | None = None,
    images_root: str | os.PathLike[str] | None = None,
    image_columns: tuple[Column, Column] | None = None,
    text_columns: tuple[Column, Column] | None = None,
    image_separator: str | None = None,
    text_separator: str | None = None,
    skip_unknown: bool = False,
    progress: Progress | None = None,
) -> tuple[MultiViewKG, list[Report]]:
    r"""Encode pictures and texts, and return the graph with them as ``image`` and ``text`` views.

    Parameters
    ----------
    kg : MultiViewKG
        The graph. Its other modalities are kept.
    images, texts : path or RawViews, optional
        The pictures and texts; see `imvia_graph.io.read_images` and `imvia_graph.io.read_texts`.
    image_encoder, text_encoder : str or Encoder
        The encoders, required for pictures or texts; see `get_encoder` for names.
        ``efficientnet-lite0`` and ``minilm`` need no network; ``clip`` is downloaded once. Only
        encoders that are named here are downloaded.
    device : str or torch.device
        Device of encoders passed by name. Default: the CPU (on the command line, ``--device auto``
        selects a GPU if there is one).
    batch_size, precision, cache, progress
        See `encode_views`.
    images_root, image_columns, text_columns, image_separator, text_separator, skip_unknown
        See `imvia_graph.io.read_images` and `imvia_graph.io.read_texts`.

    Returns
    -------
    MultiViewKG
        The graph with the new views.
    list of Report
        One report per modality.

    Raises
    ------
    DataError
        The raw views do not fit the graph, or none of them can be read.
    EncoderError
        No encoder is named, or it cannot be used; see `get_encoder`.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> kg = ig.MultiViewKG.from_labels(train=[("Paris", "in", "France")])
    >>> table = pathlib.Path(tempfile.mkdtemp()) / "texts.tsv"
    >>> _ = table.write_text("Paris\tcapital of France\nFrance\ta country\n")
    >>> kg, reports = ig.encode.encode_kg(kg, texts=table, text_encoder="minilm")
    >>> kg.views("text")[0].shape, reports[0].encoded
    (torch.Size([2, 384]), 2)
    """
    raw: list[tuple[RawViews, str | Encoder]] = []
    if images is not None:
        image_encoder = image_encoder or named_encoder(None, "image")
        if not isinstance(images, RawViews):
            images = read_images(
                images,
                kg,
                root=images_root,
                columns=image_columns,
                separator=image_separator,
                skip_unknown=skip_unknown,
            )
        raw.append((images, image_encoder))
    if texts is not None:
        text_encoder = text_encoder or named_encoder(None, "text")
        if not isinstance(texts, RawViews):
            texts = read_texts(
                texts,
                kg,
                columns=text_columns,
                separator=text_separator,
                skip_unknown=skip_unknown,
            )
        raw.append((texts, text_encoder))
    if not raw:
        raise DataError("encode: there is nothing to encode; pass images, texts or both.")
    # All encoders are loaded before the first batch, so that a missing one is reported at once.
    encoders = [
        get_encoder(encoder, "image" if one.modality == "image" else "text", device)
        if isinstance(encoder, str)
        else encoder
        for one, encoder in raw
    ]
    views: dict[str, Views] = {}
    reports = []
    for (one, _), encoder in zip(raw, encoders, strict=True):
        views[one.modality], report = encode_views(
            one,
            encoder,
            batch_size=batch_size,
            precision=precision,
            cache=cache,
            progress=progress,
        )
        reports.append(report)
    return with_views(kg, views), reports


def encode_views(
    raw: RawViews,
    encoder: Encoder,
    *,
    batch_size: int | None = None,
    precision: Precision = "auto",
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Encode the raw views of one modality.

    Parameters
    ----------
    raw : RawViews
        Pictures or texts. Inputs with the same bytes are one view within an entity; between
        entities, they are encoded once.
    encoder : Encoder
        An encoder of this modality.
    batch_size : int, optional
        Inputs per batch. Default: 256 on a GPU, 32 on the CPU.
    precision : {"auto", "float32", "bfloat16", "float16"}
        Autocast dtype of the encoder; features are float32. ``auto`` is bfloat16 on a GPU that
        supports it, float32 elsewhere. Default: ``auto``.
    cache : path, optional
        A folder that keeps finished batches, so that an interrupted run resumes. Several encoders
        and inputs may share it. Its ``log.jsonl`` gets a line at the start and at the end of each
        batch. Default: no cache.
    workers : int, optional
        Number of threads that read and decode. Default: one per core, at most 8.
    progress : callable, optional
        Called with the modality, the views done and the views in total. Default: None.

    Returns
    -------
    Encoded
        Views in the order of ``raw``, without those left out, and the `Report`.

    Raises
    ------
    DataError
        There are no views, or none of them can be read.
    EncoderError
        The encoder returns features that are not finite rows of its width.

    Examples
    --------
    >>> import torch
    >>> import imvia_graph as ig
    >>> raw = ig.io.RawViews("text", torch.tensor([0, 0, 1]), ["a", "b", "a"])
    >>> encoded = ig.encode.encode_views(raw, ig.encode.get_encoder("minilm", "text"))
    >>> encoded.report.encoded, encoded.report.equal, encoded.views.feat.shape
    (2, 1, torch.Size([3, 384]))
    """
    if encoder.modality != raw.modality:
        raise EncoderError(
            f"The encoder {encoder.name!r} is for {encoder.modality}s; the views are"
            f" {raw.modality}s."
        )
    if not raw.source:
        raise DataError(
            f"There are no {raw.modality}s to encode; expected at least one of an entity."
        )
    if batch_size is None:
        batch_size = 32 if encoder.device.type == "cpu" else 256
    if batch_size < 1:
        raise DataError(f"batch_size: expected 1 or more, received {batch_size}.")
    start = time.perf_counter()
    dtype = _dtype(precision, encoder.device)
    report = Report(raw.modality, encoder.name, repeated=raw.repeated, broken=list(raw.broken))
    done = _Done(encoder, dtype, None if cache is None else Path(cache))
    digests = _encode_distinct(raw, encoder, done, report, batch_size, workers, progress)
    views = _assemble(raw, digests, done, report)
    report.seconds = time.perf_counter() - start
    return Encoded(views, report)


class _Done:
    """Finished inputs by digest: the row of their features, or the reason why they are broken."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype, cache: Path | None) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.row: dict[bytes, int] = {}
        self.broken: dict[bytes, str] = {}
        self.chunks: list[Tensor] = []
        self.parts = None
        if cache is not None:
            identity = f"{encoder.identity} {dtype}"
            self.parts = Parts(cache, f"{encoder.modality}-{encoder.name}", identity)
            digests, feat, self.broken = self.parts.read()
            if feat is not None:
                self._keep(digests, feat)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.row or digest in self.broken

    def _keep(self, digests: list[bytes], feat: Tensor) -> None:
        # Rows are counted, not digests: a cache that several runs wrote may repeat digests.
        first = sum(map(len, self.chunks))
        self.row.update({digest: first + i for i, digest in enumerate(digests)})
        self.chunks.append(feat)

    def encode(self, batch: dict[bytes, tuple[str, Any]], broken: dict[bytes, str]) -> None:
        """Encode a batch, digest -> (source, prepared input), and keep the features."""
        if self.parts is not None:
            self.parts.log(event="start", inputs=len(batch))
        feat = torch.empty(0, self.encoder.width)
        if batch:
            autocast = self.dtype != torch.float32
            with (
                torch.inference_mode(),
                torch.autocast(self.encoder.device.type, self.dtype, enabled=autocast),
            ):
                feat = self.encoder.encode([item for _, item in batch.values()])
            feat = self._checked(feat, [source for source, _ in batch.values()])
        self._keep(list(batch), feat)
        self.broken.update(broken)
        if self.parts is not None:
            self.parts.write(list(batch), feat, broken)
            self.parts.log(event="done", inputs=len(batch), broken=len(broken))

    def _checked(self, feat: Tensor, sources: list[str]) -> Tensor:
        if feat.shape != (len(sources), self.encoder.width):
            raise EncoderError(
                f"The encoder {self.encoder.name!r} returned features of shape"
                f" {tuple(feat.shape)}; expected ({len(sources)}, {self.encoder.width})."
            )
        feat = feat.detach().to("cpu", torch.float32)
        bad = ~feat.isfinite().all(dim=1)
        if bad.any():
            raise EncoderError(
                f"The encoder {self.encoder.name!r} returned NaN or infinite features for"
                f" {sources[int(bad.nonzero()[0])][:80]!r} ({int(bad.sum())} of {len(sources)})."
                " Try --precision float32."
            )
        return feat


def _encode_distinct(
    raw: RawViews,
    encoder: Encoder,
    done: _Done,
    report: Report,
    batch_size: int,
    workers: int | None,
    progress: Progress | None,
) -> list[bytes | None]:
    """Encode the inputs that are not done; return the digest of each view, None if unreadable."""
    digests: list[bytes | None] = []
    seen: set[bytes] = set()
    batch: dict[bytes, tuple[str, Any]] = {}
    broken: dict[bytes, str] = {}

    within = Path(raw.within or raw.root or "").resolve()
    exceeds_context = getattr(encoder, "exceeds_context", None) if raw.modality == "text" else None
    if exceeds_context is not None:
        report.context_length = getattr(encoder, "context_length", None)
    texts: list[str] = []  # distinct texts whose length is not yet checked, done ones included

    def finish() -> None:
        if exceeds_context is not None and texts:
            report.cut += sum(map(bool, exceeds_context(texts)))
            texts.clear()
        if batch or broken:
            report.encoded += len(batch)
            done.encode(batch, broken)
            batch.clear()
            broken.clear()

    def load(source: str) -> tuple[bytes | None, Any, str]:
        if raw.modality == "image":
            return _load_picture(Path(raw.root or "", source), within, encoder, done, seen)
        digest = hashlib.sha256(source.encode()).digest()
        return digest, None if digest in done or digest in seen else encoder.prepare(source), ""

    threads = workers or min(8, os.cpu_count() or 1)
    with _ignoring_bomb_warnings(raw.modality):
        for source, (digest, item, reason) in _ahead(load, raw.source, threads, 2 * batch_size):
            digests.append(digest)
            if digest is None:
                report.broken.append((source, reason))
            elif digest not in seen:
                seen.add(digest)
                if raw.modality == "text":
                    texts.append(source)
                if digest in done:
                    report.reused += digest in done.row
                elif reason:
                    broken[digest] = reason
                else:
                    batch[digest] = (source, item)
                # A batch ends at a multiple of its size among all distinct inputs, done or not.
                if len(seen) % batch_size == 0:
                    finish()
            if progress is not None:
                progress(raw.modality, len(digests), len(raw.source))
        finish()
    return digests


def _load_picture(
    path: Path, within: Path, encoder: Encoder, done: _Done, seen: set[bytes]
) -> tuple[bytes | None, Any, str]:
    """Return the digest of a file, the prepared picture (None if done), and why it is broken."""
    try:
        if not path.resolve().is_relative_to(within):
            return None, None, f"it is a link that leads out of {within}"
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return None, None, "it is not a regular file"
        if found.st_size > MOST_BYTES:
            return None, None, f"the file is larger than {MOST_BYTES // 1024**2} MiB"
        content = path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links
        return None, None, getattr(error, "strerror", None) or type(error).__name__
    digest = hashlib.sha256(content).digest()
    if digest in done or digest in seen:
        return digest, None, ""
    try:
        picture = open_picture(content)
    except BrokenPicture as error:
        return digest, None, str(error)
    return digest, encoder.prepare(picture), ""


def _ahead(
    load: Callable[[str], Any], sources: list[str], threads: int, window: int
) -> Iterator[tuple[str, Any]]:
    """Yield each source with the result of ``load``, in order, loaded ahead by threads."""
    executor = ThreadPoolExecutor(threads)
    try:
        pending: deque[tuple[str, Future[Any]]] = deque()
        for source in sources:
            pending.append((source, executor.submit(load, source)))
            if len(pending) > window:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _assemble(raw: RawViews, digests: list[bytes | None], done: _Done, report: Report) -> Views:
    entity: list[int] = []
    source: list[str] = []
    rows: list[int] = []
    had: set[tuple[int, int]] = set()
    used: set[int] = set()
    for owner, name, digest in zip(raw.entity.tolist(), raw.source, digests, strict=True):
        if digest is None:
            continue
        if digest in done.broken:
            report.broken.append((name, done.broken[digest]))
            continue
        row = done.row[digest]
        if (owner, row) in had:
            report.repeated += 1
            continue
        report.equal += row in used
        had.add((owner, row))
        used.add(row)
        entity.append(owner)
        source.append(name)
        rows.append(row)
    report.views = len(rows)
    if not rows:
        first, reason = report.broken[0]
        raise DataError(
            f"None of the {len(digests)} {raw.modality}s can be read. The first is"
            f" {str(Path(raw.root or '', first))!r}: {reason}."
        )
    feat = torch.cat(done.chunks)[torch.tensor(rows)]
    return Views(feat, torch.tensor(entity, dtype=torch.int64), source, raw.root)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision not in get_args(Precision):
        raise DataError(
            f"precision: expected one of {', '.join(get_args(Precision))}; received {precision!r}."
        )
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if gains else torch.float32


@contextmanager
def _ignoring_bomb_warnings(modality: str) -> Iterator[None]:
    """Suppress Pillow's warnings of large pictures, which `open_picture` refuses."""
    if modality != "image":
        yield
        return
    try:
        from PIL import Image
    except ImportError as error:
        raise EncoderError(
            f"Reading pictures needs Pillow ({error}): pip install 'imvia-graph[encoders]'."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
