"""Thumbnails of the pictures that the views of a graph come from."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from imvia_graph.encode.pictures import MOST_BYTES, BrokenPicture, open_picture
from imvia_graph.errors import DataError
from imvia_graph.kg import MultiViewKG

#: Pixels of a small picture's longer side.
SIDE = 160
#: Subfolder of the run folder that `imvia-graph pictures` draws into.
FOLDER = "pictures"


class Pictures:
    """The pictures that the views of a graph name as their sources.

    Only files inside the known folders are opened, after links are resolved. Files are
    never returned themselves, only small pictures drawn from them.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    run : path, optional
        The run folder, whose subfolder ``pictures/`` is searched, too.
    root : path, optional
        The folder that the sources' paths are relative to. Default: as the graph records.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> from imvia_graph.pictures import Pictures
    >>> print(Pictures(ig.load_kg("countries")).path("image", 0))  # the package has features only
    None
    """

    def __init__(
        self,
        kg: MultiViewKG,
        run: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        if root is not None and not Path(root).is_dir():
            raise DataError(
                f"{root}: expected the folder that the pictures' paths are relative to; there is"
                " no such folder."
            )
        self.kg = kg
        self.roots: dict[str, list[Path]] = {}
        for modality in kg.modalities:
            named = kg.view_root(modality) if root is None else Path(root)
            folders = [named, None if run is None else Path(run) / FOLDER]
            self.roots[modality] = [
                folder.resolve() for folder in folders if folder is not None and folder.is_dir()
            ]

    def path(self, modality: str, view: int) -> Path | None:
        """Return the file of view number ``view`` of a modality, or None if there is none."""
        if not self.roots[modality]:
            return None
        source = self.kg.view_source(modality, view)
        for root in self.roots[modality]:
            try:
                path = (root / source).resolve()
                if path.is_relative_to(root) and path.is_file():
                    return path
            except (OSError, ValueError):  # a text, too long for a path or with a NUL
                continue
        return None

    def small(self, modality: str, view: int, side: int = SIDE) -> bytes | None:
        """Return a view as a small WebP picture, or None if it is no readable picture."""
        path = self.path(modality, view)
        return None if path is None else _small(path, side)


@lru_cache(maxsize=512)
def _small(path: Path, side: int) -> bytes | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        picture: Any = open_picture(path.read_bytes())
    except (OSError, BrokenPicture):
        return None
    except ImportError as error:
        raise DataError(
            f"Reading pictures needs Pillow ({error}): pip install 'imvia-graph[report]'."
        ) from error
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return out.getvalue()
