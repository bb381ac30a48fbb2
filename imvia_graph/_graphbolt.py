"""Replace ``dgl.graphbolt`` by an empty module if it does not load, so that ``import dgl`` works.

DGL 1.1.3, and any build for the installed torch, import unchanged. DGL 2.1.0, the last release on
PyPI, does not import with torch newer than 2.2: ``import dgl`` imports ``dgl.distributed``, which
imports GraphBolt, DGL's data loading pipeline, and GraphBolt

1. loads a library compiled for one version of torch; DGL 2.1.0 includes it for 2.0.0 to 2.2.1, and
2. needs ``torchdata.datapipes``, which torchdata removed in version 0.10.

Only GraphBolt itself and, optionally, distributed training use GraphBolt. Graphs, message passing,
``dgl.nn`` and the samplers of ``dgl.dataloading`` work without it, and with current versions of
torch. So if one of the two is missing, an empty module replaces ``dgl.graphbolt``; accessing one of
its attributes raises an error that says why GraphBolt is not available.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_GRAPHBOLT = "dgl.graphbolt"
_LIBRARY_NAMES = {
    "darwin": "libgraphbolt_pytorch_{}.dylib",
    "win32": "graphbolt_pytorch_{}.dll",
}


class _StandIn(ModuleType):
    """An empty ``dgl.graphbolt`` whose attributes raise an error that says why it is empty."""

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


class _Finder(MetaPathFinder):
    """Import hook for the replacement of ``dgl.graphbolt``, if one is needed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _GRAPHBOLT or not path:
            return None
        reason = _why_graphbolt_cannot_load(Path(path[0]))
        return None if reason is None else ModuleSpec(name, _Loader(reason))


class _Loader(Loader):
    def __init__(self, reason: str) -> None:
        self._reason = reason

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(self._reason)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is empty."""


def stand_in_where_needed() -> None:
    """Make ``import dgl`` work, in this library and in the user's own code."""
    # By name, so that a copy of this module's finder counts; other modules have a _Finder, too.
    names = [(type(finder).__module__, type(finder).__qualname__) for finder in sys.meta_path]
    if (_Finder.__module__, _Finder.__qualname__) not in names:
        sys.meta_path.insert(0, _Finder())


def _why_graphbolt_cannot_load(folder: Path) -> str | None:
    """Return what the GraphBolt of the DGL in `folder` lacks; None if it lacks nothing."""
    import torch  # here, so that `import imvia_graph` does not wait for it

    folder = folder / "graphbolt"
    if not (folder / "__init__.py").exists():
        return None  # DGL 1 has no GraphBolt
    version = torch.__version__.split("+", maxsplit=1)[0]
    library = _LIBRARY_NAMES.get(sys.platform, "libgraphbolt_pytorch_{}.so").format(version)
    if not (folder / library).exists():
        return f"this build of DGL has no GraphBolt for torch {version} ({library} is missing)"
    if not _has_module("torchdata.datapipes"):
        return "GraphBolt needs torchdata.datapipes, which torchdata includes up to version 0.9"
    return None


def _has_module(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent package is missing or does not import
        return False
