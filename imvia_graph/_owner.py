"""Signatures of KG folders, which show whether this user wrote a folder.

A KG folder has the paths of its pictures, which may be anywhere on the disk. With a folder from
somebody else, `report` could thus show files of the user who opens it. Paths are therefore signed
with a key of the user, and paths out of the folder are followed only if this key has signed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

_BYTES = 32


def key_file() -> Path:
    """Return the path ``imvia-graph/key`` in ``$XDG_STATE_HOME``, by default ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # By the XDG specification, relative paths are ignored.
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local/state").joinpath(
        "imvia-graph", "key"
    )


def sign(roots: Mapping[str, str]) -> str | None:
    """Return the signature of the picture folders of modalities; None if no key can be stored."""
    try:
        key = _read() or _make()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        logger.debug("The folders of pictures are not signed: %s", error)
        return None
    return _signature(key, roots)


def is_own(roots: Mapping[str, str], signature: object) -> bool:
    """Return whether `sign` has signed these folders for this user. Nothing is written."""
    try:
        key = _read()
    except (OSError, RuntimeError):
        return False
    if key is None or not isinstance(signature, str) or not signature.isascii():
        return False
    return hmac.compare_digest(_signature(key, roots), signature)


def _signature(key: bytes, roots: Mapping[str, str]) -> str:
    content = json.dumps(dict(roots), sort_keys=True).encode()
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _read() -> bytes | None:
    try:
        key = key_file().read_bytes()
    except FileNotFoundError:
        return None
    return key if len(key) == _BYTES else None


def _make() -> bytes:
    """Create the key file, and return the key in it, which may be that of another process."""
    path = key_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        if path.exists():  # damaged: its signatures cannot be verified any more
            temporary.replace(path)
        else:
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    key = _read()
    if key is None:
        raise OSError(f"{path} cannot be read")
    return key
