"""The preprocessing of images for testing, with PIL and NumPy alone: exactly timm's, bit for bit."""

import numpy as np
from PIL import Image

from dcp_zoo.fields import Values


def crop(image: Image.Image, cfg: Values) -> np.ndarray:
    """An RGB image -> its pixels, uint8 (3, H, W), before they are normalised, by timm's `cfg`, of which interpolation
    ("bicubic") and crop_mode ("center", or "squash" both sides) may be missing."""
    _, height, width = cfg["input_size"]
    resized, short = int(height / cfg["crop_pct"]), min(image.size)
    size = [resized if side == short else int(resized * side / short) for side in image.size]
    if cfg.get("crop_mode") == "squash":
        size = [int(width / cfg["crop_pct"]), resized]
    image = image.resize(size, Image.Resampling[cfg.get("interpolation", "bicubic").upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def normalise(pixels: np.ndarray, cfg: Values) -> np.ndarray:
    """uint8 (..., 3, H, W) -> float32 of the same shape, with timm's mean and std."""
    mean, std = (np.asarray(cfg[name], np.float32)[:, None, None] for name in ("mean", "std"))
    x = pixels.astype(np.float32, order="C")
    x /= 255
    x -= mean
    x /= std
    return x
