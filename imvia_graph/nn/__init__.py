"""DGL-style modules: gated view convolution, fusion, decoding."""

from imvia_graph.nn.decision_fusion import DecisionFusion
from imvia_graph.nn.gated_view_conv import GatedViewConv
from imvia_graph.nn.joint_fusion import JointFusion
from imvia_graph.nn.multi_view_encoder import MultiViewEncoder
from imvia_graph.nn.tucker_decoder import TuckerDecoder

__all__ = ["DecisionFusion", "GatedViewConv", "JointFusion", "MultiViewEncoder", "TuckerDecoder"]
