"""Whether this user wrote a KG folder: a key that only they have, and what it signs.

A KG folder says where its pictures are, and that may be anywhere on the disk. Followed blindly, a
folder from a stranger could have `report` show files of whoever opens it. So what is written here
is signed, and what is signed by another key, or not at all, is not followed out of the folder.
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
    """``imvia-graph/key`` where programs keep their state: ``$XDG_STATE_HOME``, ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # A path that is not absolute is to be ignored, as the XDG specification has it.
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local/state").joinpath(
        "imvia-graph", "key"
    )


def sign(roots: Mapping[str, str]) -> str | None:
    """A signature of folders by modality; None where no key can be kept."""
    try:
        key = _read() or _make()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.debug("The folders of pictures are not signed: %s", error)
        return None
    return _signature(key, roots)


def is_own(roots: Mapping[str, str], signature: object) -> bool:
    """Whether `sign` has signed these folders for this user. Nothing is written."""
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
    path = key_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        if path.exists():  # damaged: what it signed is lost either way
            aside.replace(path)
        else:
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    key = _read()
    if key is None:
        raise OSError(f"{path} cannot be read")
    return key
