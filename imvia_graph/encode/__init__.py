"""Encoding of raw pictures and texts into view features.

`encode_kg` encodes the views of a graph, `encode_views` the raw views of one modality;
`get_encoder` returns an encoder by name, and `Encoder` is the protocol for custom encoders.
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
