"""Finished batches on disk, so that a run that was killed goes on where it stopped.

A folder holds the features of one encoder at one precision: a part file a batch, written atomically
under a name that follows from its content, with the digest of every input and its feature row. A
broken input has a digest and no row. ``log.jsonl`` tells what was encoded when.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imvia_graph import _files

logger = logging.getLogger(__name__)

#: Bytes of a digest (SHA-256).
DIGEST = 32


class Parts:
    """The part files of one encoder in a folder.

    Parameters
    ----------
    folder : Path
        Where the folders of all encoders are.
    name, identity : str
        The encoder's, and the precision.
    """

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        mark = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:60]}-{mark}"

    def read(self) -> tuple[list[bytes], Tensor | None, dict[bytes, str]]:
        """Digests, their feature rows (None where there are none), and why others are broken."""
        digests: list[bytes] = []
        feats: list[Tensor] = []
        broken: dict[bytes, str] = {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    keys = file.get_tensor("digest").numpy().tobytes()
                    feat = file.get_tensor("feat")
                    reasons = json.loads((file.metadata() or {}).get("broken", "{}"))
            except (SafetensorError, OSError, ValueError) as error:
                logger.warning("%s cannot be read (%s); it is made again.", path, error)
                continue
            digests += [keys[start : start + DIGEST] for start in range(0, len(keys), DIGEST)]
            feats.append(feat)
            broken.update((bytes.fromhex(digest), reason) for digest, reason in reasons.items())
        return digests, torch.cat(feats) if feats else None, broken

    def write(self, digests: Sequence[bytes], feat: Tensor, broken: dict[bytes, str]) -> None:
        """Keep a finished batch."""
        name = hashlib.sha256(b"".join([*digests, *sorted(broken)])).hexdigest()[:32]
        keys = torch.tensor(list(b"".join(digests)), dtype=torch.uint8).reshape(-1, DIGEST)
        _files.write_tensors(
            self.folder / f"part-{name}.safetensors",
            {"digest": keys, "feat": feat},
            {"broken": json.dumps({digest.hex(): reason for digest, reason in broken.items()})},
        )

    def log(self, **event: object) -> None:
        """Add a line to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
