"""Reading pictures of any kind, and telling the broken ones."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

#: A picture of more pixels is taken for a decompression bomb: Pillow's own limit, 89 million.
MOST_PIXELS = 1024 * 1024 * 1024 // 4 // 3
#: Bytes of a file that are read at most.
MOST_BYTES = 512 * 1024**2


class BrokenPicture(Exception):  # noqa: N818 - it is left out, not raised to the user
    """A file that is no picture, or one that cannot be decoded; the message says why."""


def open_picture(content: bytes) -> Any:
    """The bytes of a file as an upright ``PIL.Image`` in RGB.

    Of an animation it is the first frame. Transparency becomes white; 16 bits a sample become 8.

    Raises
    ------
    BrokenPicture
        With the reason.
    """
    from PIL import Image, ImageOps

    if not content:
        raise BrokenPicture("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise BrokenPicture(
                    f"{picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}: it"
                    " may be a decompression bomb"
                )
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture), Image)
    except BrokenPicture:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenPicture("it is no picture of a known format") from None
    except Exception as error:  # Pillow's decoders raise whatever a bad file makes them
        detail = str(error).strip().splitlines()
        raise BrokenPicture(detail[0] if detail else type(error).__name__) from error


def _rgb(picture: Any, image: Any) -> Any:
    if picture.mode.startswith("I"):
        samples = np.asarray(picture).astype(np.int64)
        if picture.mode != "I" or samples.max(initial=0) > 255:
            samples = samples >> 8
        picture = image.fromarray(samples.clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        ground = image.new("RGBA", layered.size, (255, 255, 255, 255))
        picture = image.alpha_composite(ground, layered)
    return picture.convert("RGB")
