"""Reading pictures of any format, and detecting broken ones."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from imvia_graph._display import first_line

#: A larger picture may be a decompression bomb. This is Pillow's own limit, 89 million pixels.
MOST_PIXELS = 1024 * 1024 * 1024 // 4 // 3
#: The largest file that is read, in bytes.
MOST_BYTES = 512 * 1024**2


class BrokenPicture(Exception):  # noqa: N818 - caught by the encoder, never raised to the user
    """A file that is not a picture or cannot be decoded; the message says why."""


def open_picture(content: bytes) -> Any:
    """Decode the bytes of a file to an upright ``PIL.Image`` in RGB.

    Of an animation, the first frame is returned. Transparent pixels become white; 16-bit samples
    become 8-bit samples.

    Raises
    ------
    BrokenPicture
        The bytes are not a picture or cannot be decoded; the message is the reason.
    """
    from PIL import Image, ImageOps

    if not content:
        raise BrokenPicture("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise BrokenPicture(
                    f"it has {picture.width} x {picture.height} pixels, more than {MOST_PIXELS:,};"
                    " it may be a decompression bomb"
                )
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture), Image)
    except BrokenPicture:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenPicture("it is not a picture in a known format") from None
    except Exception as error:  # on a bad file, Pillow's decoders may raise any exception
        raise BrokenPicture(first_line(error)) from error


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
