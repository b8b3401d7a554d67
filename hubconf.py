"""The zoo's models for PyTorch Hub: `torch.hub.load("dcp-zoo/dcp_zoo", "dcp_vitb16",
pretrained="imagenet-16shot")`."""

from dcp_zoo.models import *  # noqa: F403

dependencies = ["torch", "torchvision", "timm", "open_clip", "safetensors", "huggingface_hub"]
