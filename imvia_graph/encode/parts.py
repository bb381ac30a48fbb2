"""Cache of finished batches on disk, with which an interrupted encoding resumes.

A folder holds the features of one encoder at one precision: one part file per batch, written
atomically under a name derived from its digests, with the digest and the feature row of each input.
A broken input has a digest but no row. ``log.jsonl`` records the start and the end of each batch.
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
#: Metadata key of the checksum of a part.
CHECKSUM = "sha256"


class Parts:
    """The part files of one encoder in a folder.

    Parameters
    ----------
    folder : Path
        The folder that contains one folder per encoder.
    name : str
        Modality and name of the encoder.
    identity : str
        Fingerprint of the encoder, and the precision.
    """

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        mark = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:60]}-{mark}"

    def read(self) -> tuple[list[bytes], Tensor | None, dict[bytes, str]]:
        """Read all parts: digests, their feature rows (None without any), and broken digests."""
        digests: list[bytes] = []
        feats: list[Tensor] = []
        broken: dict[bytes, str] = {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                keys, feat, reasons = _read(path)
                if feats and feat.shape[1:] != feats[0].shape[1:]:
                    raise ValueError(f"features of shape {tuple(feat.shape)}")
            except (SafetensorError, OSError, ValueError, RecursionError) as error:
                logger.warning("%s cannot be read (%s); its inputs are encoded again.", path, error)
                continue
            digests += keys
            feats.append(feat)
            broken.update(reasons)
        return digests, torch.cat(feats) if feats else None, broken

    def write(self, digests: Sequence[bytes], feat: Tensor, broken: dict[bytes, str]) -> None:
        """Write the part file of a finished batch."""
        name = hashlib.sha256(b"".join([*digests, *sorted(broken)])).hexdigest()[:32]
        keys = torch.tensor(list(b"".join(digests)), dtype=torch.uint8).reshape(-1, DIGEST)
        tensors = {"digest": keys, "feat": feat}
        reasons = {digest.hex(): reason for digest, reason in broken.items()}
        metadata = {"broken": json.dumps(reasons)}
        metadata[CHECKSUM] = _files.digest(tensors, metadata)
        _files.write_tensors(self.folder / f"part-{name}.safetensors", tensors, metadata)

    def log(self, **event: object) -> None:
        """Append a line to the log."""
        path = self.folder / "log.jsonl"
        with _files.storing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


def _read(path: Path) -> tuple[list[bytes], Tensor, dict[bytes, str]]:
    """Read digests, features and broken inputs of a part; raise a ValueError if it is not one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if not {"digest", "feat"} <= set(file.keys()):
            raise ValueError(f"expected digest and feat, found {sorted(file.keys())[:5]}")
        keys, feat = file.get_tensor("digest"), file.get_tensor("feat")
    expected = metadata.pop(CHECKSUM, None)  # parts of older versions have none
    if expected not in (None, _files.digest({"digest": keys, "feat": feat}, metadata)):
        raise ValueError("its checksum does not match its content")
    digests = keys.numpy().tobytes()
    reasons = json.loads(metadata.get("broken", "{}"))
    if (
        keys.shape != (len(feat), DIGEST)
        or keys.dtype != torch.uint8
        or feat.dim() != 2
        or feat.dtype != torch.float32
        or not isinstance(reasons, dict)
    ):
        raise ValueError("it does not hold digests and float32 features")
    return (
        [digests[start : start + DIGEST] for start in range(0, len(digests), DIGEST)],
        feat,
        {bytes.fromhex(digest): str(reason) for digest, reason in reasons.items()},
    )
