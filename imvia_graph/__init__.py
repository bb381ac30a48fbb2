"""imvia-graph: multi-modal knowledge graph completion on DGL.

The whole public interface is reachable from here. Modules are imported on first use, so that code
that needs neither torch nor DGL does not wait for them.

>>> import imvia_graph as ig
>>> kg = ig.load_kg("countries")
>>> kg.modalities
['image', 'text']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imvia_graph._graphbolt import stand_in_where_needed
from imvia_graph._version import __version__

if TYPE_CHECKING:
    from imvia_graph import answers as answers
    from imvia_graph import datasets, encode, io, losses, nn, ops
    from imvia_graph import distributed as distributed
    from imvia_graph import evaluation as evaluation
    from imvia_graph import explore as explore
    from imvia_graph import export as export
    from imvia_graph import inference as inference
    from imvia_graph import model as model
    from imvia_graph import run as run
    from imvia_graph import splits as splits
    from imvia_graph import training as training
    from imvia_graph import tuning as tuning
    from imvia_graph.comparison import compare
    from imvia_graph.errors import (
        CheckpointError,
        DataError,
        EncoderError,
        IMVIAError,
        OutOfMemoryError,
        SettingsError,
        StorageError,
        TrainingError,
        UnknownLabelError,
    )
    from imvia_graph.evaluation import evaluate, rank
    from imvia_graph.export import export_embeddings, export_predictions
    from imvia_graph.inference import Explanation, Prediction, Predictor, explain
    from imvia_graph.inspection import inspect_kg
    from imvia_graph.io import load_kg
    from imvia_graph.kg import MultiViewKG, Views
    from imvia_graph.model import IMVIA
    from imvia_graph.report import write_report
    from imvia_graph.run import Run, fit, load
    from imvia_graph.settings import Settings
    from imvia_graph.tracking import ProgressBar, TensorBoard
    from imvia_graph.training import Callback, Trainer
    from imvia_graph.tuning import Tuned, tune

#: Public name -> module that defines it.
_HOME = {
    "CheckpointError": "errors",
    "DataError": "errors",
    "EncoderError": "errors",
    "IMVIAError": "errors",
    "OutOfMemoryError": "errors",
    "SettingsError": "errors",
    "StorageError": "errors",
    "TrainingError": "errors",
    "UnknownLabelError": "errors",
    "compare": "comparison",
    "evaluate": "evaluation",
    "rank": "evaluation",
    "export_embeddings": "export",
    "export_predictions": "export",
    "Explanation": "inference",
    "Prediction": "inference",
    "Predictor": "inference",
    "explain": "inference",
    "inspect_kg": "inspection",
    "load_kg": "io",
    "MultiViewKG": "kg",
    "Views": "kg",
    "IMVIA": "model",
    "write_report": "report",
    "Run": "run",
    "fit": "run",
    "load": "run",
    "Settings": "settings",
    "ProgressBar": "tracking",
    "TensorBoard": "tracking",
    "Callback": "training",
    "Trainer": "training",
    "Tuned": "tuning",
    "tune": "tuning",
}
_MODULES = (
    *("answers", "datasets", "distributed", "encode", "evaluation", "explore", "export"),
    *("inference", "io", "losses", "model", "nn", "ops", "run", "splits", "training", "tuning"),
)

__all__ = [
    "IMVIA",
    "Callback",
    "CheckpointError",
    "DataError",
    "EncoderError",
    "Explanation",
    "IMVIAError",
    "MultiViewKG",
    "OutOfMemoryError",
    "Prediction",
    "Predictor",
    "ProgressBar",
    "Run",
    "Settings",
    "SettingsError",
    "StorageError",
    "TensorBoard",
    "Trainer",
    "TrainingError",
    "Tuned",
    "UnknownLabelError",
    "Views",
    "__version__",
    "compare",
    "datasets",
    "encode",
    "evaluate",
    "explain",
    "export_embeddings",
    "export_predictions",
    "fit",
    "inspect_kg",
    "io",
    "load",
    "load_kg",
    "losses",
    "nn",
    "ops",
    "rank",
    "tune",
    "write_report",
]


stand_in_where_needed()  # from here on, `import dgl` works with newer versions of torch


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"imvia_graph.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"imvia_graph.{_HOME[name]}"), name)
    raise AttributeError(f"module 'imvia_graph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
