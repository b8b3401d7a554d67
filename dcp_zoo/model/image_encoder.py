"""An encoder of images alone beside CLIP: a frozen model of timm, which knows what things look like and no words.

It reads the same pixels as CLIP, in its own mean and deviation: one image is decoded, resized and cropped once, and one
tensor enters the model wherever it runs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP, Reading, fingerprint
from dcp_zoo.model.inputs import Images, Pixels, as_inputs


class ImageEncoder(nn.Module):
    """Images, normalised as CLIP's `create_transform` does -> normalised features (B, E), timm's before its classifier.

    Args:
        model: of timm, without a classifier; its parameters require no gradients from now on.
        name: timm's, such as "vit_small_patch14_dinov2.lvd142m".
        size: pixels (H, W) that the model reads: CLIP's, or a little less where its patches do not fit them.
        clip: whose normalisation the images have.
    """

    scale: Tensor  # (3, 1, 1), and
    shift: Tensor  # (3, 1, 1), from CLIP's normalisation to the model's

    def __init__(self, model: Any, name: str, size: tuple[int, int], clip: FrozenCLIP) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.source, self.size, self.pretrained_cfg = name, size, dict(clip.pretrained_cfg)
        mean, std, own_mean, own_std = (
            torch.tensor(cfg[key])[:, None, None]
            for cfg in (clip.pretrained_cfg, model.pretrained_cfg)
            for key in ("mean", "std")
        )
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Set training mode; the model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.model.num_features,)

    def fingerprint(self) -> str:
        """See `FrozenCLIP.fingerprint`."""
        return fingerprint(self.model.state_dict().values())

    def read(self, images: Images) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, E). ZooError for images in any other form."""
        inputs = as_inputs(images)
        if type(inputs) is not Pixels:
            raise ZooError(f"{self.source} reads images, and not what CLIP makes of them ({type(inputs).__name__}).")
        return self(inputs.x)

    def forward(self, images: Tensor) -> Tensor:
        x = (images * self.scale + self.shift).to(next(self.model.parameters()).dtype)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return F.normalize(self.model(x), dim=-1)

    @property
    def reading(self) -> Reading:
        """What a head reads of it: one part, without text."""
        return Reading(self, self.widths, self.read)
