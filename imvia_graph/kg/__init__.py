"""MultiViewKG: a multi-modal knowledge graph with any number of views per entity, over DGL."""

from imvia_graph.kg.folder import is_whole
from imvia_graph.kg.graph import MultiViewKG
from imvia_graph.kg.parts import PARTS, SPLITS, Split, Views

__all__ = ["PARTS", "SPLITS", "MultiViewKG", "Split", "Views", "is_whole"]
