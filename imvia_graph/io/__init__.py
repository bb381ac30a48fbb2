"""Knowledge graphs in and out."""

from imvia_graph.io.load import load_kg, with_validation
from imvia_graph.io.openke import read_openke

__all__ = ["load_kg", "read_openke", "with_validation"]
