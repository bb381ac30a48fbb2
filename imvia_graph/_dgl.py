"""Import DGL: ``from imvia_graph._dgl import dgl``.

`imvia_graph._graphbolt` explains why DGL 2.1.0 does not import with newer versions of torch, and
works around it. This module turns all other import failures into errors that say what to do. If DGL
is already imported, this module uses it unchanged.

If no backend is chosen, DGL writes its default to ``~/.dgl/config.json`` and prints a message. To
avoid this, this module sets ``DGLBACKEND=pytorch`` in the environment of the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from types import ModuleType

import torch

from imvia_graph._graphbolt import stand_in_where_needed
from imvia_graph.errors import IMVIAError

__all__ = ["DGLImportError", "dgl"]


class DGLImportError(IMVIAError, ImportError):
    """DGL is not installed, does not import, or does not run on torch."""


def _import_dgl() -> ModuleType:
    """Import DGL on torch."""
    if "dgl" in sys.modules:
        return _on_torch(sys.modules["dgl"])

    backend = os.environ.setdefault("DGLBACKEND", "pytorch")
    if backend != "pytorch":
        raise DGLImportError(
            f"imvia_graph needs DGL to run on torch, but DGLBACKEND={backend} is set: "
            "unset it, or set it to pytorch."
        )
    if importlib.util.find_spec("dgl") is None:
        raise DGLImportError("DGL is not installed: pip install dgl")
    stand_in_where_needed()
    try:
        with warnings.catch_warnings():
            # These warnings are about DGL's own code, which cannot be changed here.
            for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
                warnings.simplefilter("ignore", category)
            module = importlib.import_module("dgl")
    except Exception as error:
        raise DGLImportError(_advice(error)) from error
    _bind_submodules()
    return _on_torch(module)


def _bind_submodules() -> None:
    """Make every loaded submodule of DGL an attribute of its package.

    The import system does so only for modules that it has just loaded, not for those left over from
    an ``import dgl`` that failed before this library was imported.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("dgl."):
            package, _, child = name.rpartition(".")
            vars(sys.modules[package]).setdefault(child, module)


def _on_torch(module: ModuleType) -> ModuleType:
    backend = module.backend.backend_name
    if backend != "pytorch":
        raise DGLImportError(
            f"imvia_graph needs DGL to run on torch, but DGL was imported on {backend}: "
            "set DGLBACKEND=pytorch before it is imported."
        )
    return module


def _advice(error: Exception) -> str:
    """Return the message for an error that importing DGL raised."""
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        if missing not in ("", "dgl"):
            return f"DGL does not import without {missing}: pip install {missing}"
    return (
        f"DGL does not import with torch {torch.__version__} ({type(error).__name__}: {error}): "
        "pip install --force-reinstall --no-deps dgl==2.1.0"
    )


_import_dgl()

import dgl  # noqa: E402
