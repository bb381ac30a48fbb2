"""The losses of IMVIA: mutual information (L1), alignment (L2), completion (L3), and their sum."""

from imvia_graph.losses._shared import at_least_float32
from imvia_graph.losses.alignment import (
    ALIGNMENTS,
    Alignment,
    contrastive_alignment,
    printed_alignment,
)
from imvia_graph.losses.factored import factored_completion
from imvia_graph.losses.information import GaussianEstimator, MutualInformation
from imvia_graph.losses.regularization import dura, n3
from imvia_graph.losses.relations import relation_prediction
from imvia_graph.losses.sampled import Sampled, sampled_completion
from imvia_graph.losses.scored import (
    COMPLETIONS,
    Positives,
    binary_completion,
    completion,
    softmax_completion,
)
from imvia_graph.losses.total import total_loss

__all__ = [
    "ALIGNMENTS",
    "COMPLETIONS",
    "Alignment",
    "GaussianEstimator",
    "MutualInformation",
    "Positives",
    "Sampled",
    "at_least_float32",
    "binary_completion",
    "completion",
    "contrastive_alignment",
    "dura",
    "factored_completion",
    "n3",
    "printed_alignment",
    "relation_prediction",
    "sampled_completion",
    "softmax_completion",
    "total_loss",
]
