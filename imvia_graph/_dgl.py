"""Import DGL: ``from imvia_graph._dgl import dgl``. Nothing else here knows DGL's versions.

DGL 1.1.3, and any build that was made for the installed torch, import as they are, and nothing is
touched. DGL 2.1.0, the last one on PyPI, does not import beside a torch newer than 2.2:
``import dgl`` imports ``dgl.distributed``, that imports GraphBolt, which is DGL's pipeline for
loading data, and GraphBolt

1. loads a compiled library made for one version of torch; DGL 2.1.0 has it for 2.0.0 to 2.2.1, and
2. is built on ``torchdata.datapipes``, which torchdata no longer has since its version 0.10.

Nothing uses GraphBolt but GraphBolt itself and, if told to, distributed training: graphs, message
passing, ``dgl.nn`` and the samplers of ``dgl.dataloading`` do without it and work beside today's
torch. So where one of the two is missing, an empty module stands in for ``dgl.graphbolt``; whoever
asks it for anything is told why GraphBolt is not there. A DGL that is already imported when this
module is, is used as it is.

Where no backend has been chosen, DGL writes its choice to ``~/.dgl/config.json`` and prints so.
It is spared that by ``DGLBACKEND=pytorch`` in the environment of this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from imvia_graph.errors import IMVIAError

__all__ = ["DGLImportError", "dgl"]

_GRAPHBOLT = "dgl.graphbolt"
_LIBRARY_NAMES = {
    "darwin": "libgraphbolt_pytorch_{}.dylib",
    "win32": "graphbolt_pytorch_{}.dll",
}


class DGLImportError(IMVIAError, ImportError):
    """DGL is not installed, does not import, or does not run on torch."""


class _GraphBoltStandIn(ModuleType):
    """An empty ``dgl.graphbolt`` that says, when asked for something, why it is empty."""

    def __init__(self, reason: str) -> None:
        super().__init__(_GRAPHBOLT, f"Stands in for GraphBolt: {reason}.")
        self._reason = reason
        # Python names this file when `from dgl.graphbolt import ...` fails.
        self.__file__ = __file__

    def __getattr__(self, name: str) -> Any:
        message = f"module {_GRAPHBOLT!r} has no attribute {name!r}"
        if not name.startswith("__"):
            message = f"dgl.graphbolt.{name} is not available: {self._reason}"
        raise AttributeError(message, name=name, obj=self)


def _import_dgl() -> ModuleType:
    """Import DGL, with a stand-in for GraphBolt if it needs one."""
    if "dgl" in sys.modules:
        return _on_torch(sys.modules["dgl"])

    backend = os.environ.setdefault("DGLBACKEND", "pytorch")
    if backend != "pytorch":
        raise DGLImportError(
            f"imvia_graph needs DGL to run on torch, but DGLBACKEND={backend} is set: "
            "unset it, or set it to pytorch."
        )
    spec = importlib.util.find_spec("dgl")
    if spec is None or not spec.submodule_search_locations:
        raise DGLImportError("DGL is not installed: pip install dgl")

    reason = _why_graphbolt_cannot_load(Path(spec.submodule_search_locations[0]))
    if reason is not None:
        sys.modules[_GRAPHBOLT] = _GraphBoltStandIn(reason)
    try:
        with warnings.catch_warnings():
            # About DGL's own code, in which nobody here can change anything.
            for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
                warnings.simplefilter("ignore", category)
            module = importlib.import_module("dgl")
    except Exception as error:
        sys.modules.pop(_GRAPHBOLT, None)
        raise DGLImportError(_what_to_do(error)) from error
    _bind_submodules()
    return _on_torch(module)


def _why_graphbolt_cannot_load(folder: Path) -> str | None:
    """Tell what the GraphBolt of the DGL in `folder` lacks; None if it lacks nothing."""
    folder = folder / "graphbolt"
    if not (folder / "__init__.py").exists():
        return None  # DGL 1: nothing asks for it
    version = torch.__version__.split("+", maxsplit=1)[0]
    library = _LIBRARY_NAMES.get(sys.platform, "libgraphbolt_pytorch_{}.so").format(version)
    if not (folder / library).exists():
        return f"this build of DGL has no GraphBolt for torch {version} ({library} is missing)"
    if not _has_module("torchdata.datapipes"):
        return "GraphBolt needs torchdata.datapipes, which torchdata has had up to 0.9"
    return None


def _bind_submodules() -> None:
    """Make every loaded submodule of DGL an attribute of its package.

    The import system does so for what it has just loaded. That leaves out the stand-in, and what is
    left over from an ``import dgl`` that failed before this module was there to help.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("dgl."):
            package, _, child = name.rpartition(".")
            vars(sys.modules[package]).setdefault(child, module)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent is missing, or does not import
        return False


def _on_torch(module: ModuleType) -> ModuleType:
    backend = module.backend.backend_name
    if backend != "pytorch":
        raise DGLImportError(
            f"imvia_graph needs DGL to run on torch, but DGL was imported on {backend}: "
            "set DGLBACKEND=pytorch before it is imported."
        )
    return module


def _what_to_do(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        if missing not in ("", "dgl"):
            return f"DGL does not import without {missing}: pip install {missing}"
    return (
        f"DGL does not import beside torch {torch.__version__} ({type(error).__name__}: {error}): "
        "pip install --force-reinstall --no-deps dgl==2.1.0"
    )


_import_dgl()

import dgl  # noqa: E402
