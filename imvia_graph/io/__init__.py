"""Reading and writing knowledge graphs."""

from imvia_graph.io.arrays import to_arrays, to_pykeen
from imvia_graph.io.features import read_features, views_by_entity, views_from_array, with_views
from imvia_graph.io.graphs import to_dgl, to_networkx
from imvia_graph.io.load import load_kg, with_validation
from imvia_graph.io.names import read_names
from imvia_graph.io.openke import read_openke, write_openke
from imvia_graph.io.rdf import read_literals
from imvia_graph.io.views import RawViews, read_images, read_texts
from imvia_graph.io.write import write_kg

__all__ = [
    "RawViews",
    "load_kg",
    "read_features",
    "read_images",
    "read_literals",
    "read_names",
    "read_openke",
    "read_texts",
    "to_arrays",
    "to_dgl",
    "to_networkx",
    "to_pykeen",
    "views_by_entity",
    "views_from_array",
    "with_validation",
    "with_views",
    "write_kg",
    "write_openke",
]
