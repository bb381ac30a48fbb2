"""Stand in for ``dgl.graphbolt`` where it does not load, so that ``import dgl`` does.

DGL 1.1.3, and any build that was made for the installed torch, import as they are, and nothing is
touched. DGL 2.1.0, the last one on PyPI, does not import beside a torch newer than 2.2:
``import dgl`` imports ``dgl.distributed``, that imports GraphBolt, which is DGL's pipeline for
loading data, and GraphBolt

1. loads a compiled library made for one version of torch; DGL 2.1.0 has it for 2.0.0 to 2.2.1, and
2. is built on ``torchdata.datapipes``, which torchdata no longer has since its version 0.10.

Nothing uses GraphBolt but GraphBolt itself and, if told to, distributed training: graphs, message
passing, ``dgl.nn`` and the samplers of ``dgl.dataloading`` do without it and work beside today's
torch. So where one of the two is missing, an empty module stands in for ``dgl.graphbolt``; whoever
asks it for anything is told why GraphBolt is not there.
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


class _Finder(MetaPathFinder):
    """Finds the stand-in for ``dgl.graphbolt`` if it needs one, and nothing else."""

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
        """It is empty."""


def stand_in_where_needed() -> None:
    """See to it that ``import dgl``, here or in the user's own code, finds what it needs."""
    # Other packages have finders of that name; a copy of this module's counts as one of its own.
    names = [(type(finder).__module__, type(finder).__qualname__) for finder in sys.meta_path]
    if (_Finder.__module__, _Finder.__qualname__) not in names:
        sys.meta_path.insert(0, _Finder())


def _why_graphbolt_cannot_load(folder: Path) -> str | None:
    """Tell what the GraphBolt of the DGL in `folder` lacks; None if it lacks nothing."""
    import torch  # only now: `import imvia_graph` does not wait for it

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


def _has_module(name: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent is missing, or does not import
        return False
