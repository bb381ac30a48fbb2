"""Raw pictures and texts to view features.

`encode_kg` does it for a graph, `encode_views` for the raw views of one modality, `get_encoder`
finds an encoder by its name, and `Encoder` is what a user's own has to offer.
"""

from imvia_graph.encode.encode import Encoded, Report, encode_kg, encode_views
from imvia_graph.encode.encoder import CLIP, GROUP, OFFLINE, Encoder, get_encoder

__all__ = [
    "CLIP",
    "GROUP",
    "OFFLINE",
    "Encoded",
    "Encoder",
    "Report",
    "encode_kg",
    "encode_views",
    "get_encoder",
]
