"""Images as small uint8 tensors, random views of them, and the stem's features of all views, cached on
disk."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.mini import Stem
from dcp_zoo.release.onnx import onnx_program

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# Zooming out makes some views sharper than 64 pixels enlarged to the input size, like real photographs.
NEAR = (0.55, 1.25)  # zooms of odd views
FAR = (1.1, 2.2)  # of even ones
CHUNK = 2500  # images per cache file, the most an interrupted run can lose


def to_tensor(image: Image.Image, side: int) -> Tensor:
    """A centre crop (3, side, side), uint8."""
    square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_parquet(root: Path, split: str, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, side, side), labels (N,) and class names of `{split}-*.parquet`, next to a
    `classes.json`."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in sorted(root.glob(f"{split}-*.parquet"))]
    blobs = [blob for t in tables for blob in t["image"].to_pylist()]
    labels = torch.tensor([label for t in tables for label in t["label"].to_pylist()])
    images = torch.stack([to_tensor(Image.open(io.BytesIO(b)), side) for b in track(blobs, f"decoding {split}")])
    return images, labels, [c["name"] for c in json.loads((root / "classes.json").read_text())]


def load_folder(root: Path, split: str, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """The same from `root/split/<class name>/*`."""
    folders = sorted(p for p in (root / split).iterdir() if p.is_dir())
    paths = [(p, label) for label, f in enumerate(folders) for p in sorted(f.iterdir()) if p.suffix.lower() in SUFFIXES]
    images = torch.stack([to_tensor(Image.open(p), side) for p, _ in track(paths, f"decoding {split}")])
    return images, torch.tensor([label for _, label in paths]), [f.name.replace("_", " ") for f in folders]


def load_images(root: Path, split: str, side: int) -> tuple[Tensor, Tensor, list[str]]:
    return (load_parquet if (root / "classes.json").exists() else load_folder)(root, split, side)


def scale_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, h, w) -> input of the stem (B, 3, size, size)."""
    return (F.interpolate(images.float(), (size, size), mode="bicubic").clamp(0, 255) - 127) / 128


def random_view(images: Tensor, size: int, rng: torch.Generator, zooms: tuple[float, float]) -> Tensor:
    """Random zoom (below 1 in, above 1 out, with mirrored borders), stretch, shift, flip, contrast and
    brightness."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    zoom = uniform(*map(math.log, zooms)).exp()
    stretch = uniform(-0.15, 0.15).exp()
    flip = uniform(-1, 1).sign()
    room = (1 - zoom).abs()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = flip * zoom * stretch
    theta[:, 1, 1] = zoom / stretch
    theta[:, 0, 2] = uniform(-1, 1) * room
    theta[:, 1, 2] = uniform(-1, 1) * room
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    pixels = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    contrast = uniform(0.7, 1.3).view(-1, 1, 1, 1)
    light = uniform(-25, 25).view(-1, 1, 1, 1)
    return (((pixels - 127) * contrast + 127 + light).clamp(0, 255) - 127) / 128


def in_onnx_runtime(stem: Stem, size: int) -> Callable[[Tensor], Tensor]:
    """The stem's features, equal to within 1e-4 in less than half the time."""
    import onnxruntime

    class Features(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return stem.stages(images)[-1]

    program = onnx_program(Features().eval(), torch.zeros(2, 3, size, size), "features")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


@torch.inference_mode()
def cache_features(images: Tensor, stem: Stem, size: int, views: int, folder: Path, name: str) -> Tensor:
    """Features (N, 352, size / 32, size / 32), float16, of one view per image: the chunks take turns among
    `views`.

    View 0 is the plain image. Resumes by chunk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), CHUNK)
    paths = [folder / f"{name}-{size}-view{i % views}-{start:06d}.pt" for i, start in enumerate(starts)]
    features = None
    for start, path in track(list(zip(starts, paths, strict=True)), f"features of {name}"):
        if path.exists():
            continue
        view = start // CHUNK % views
        features = features or in_onnx_runtime(stem, size)
        rng = torch.Generator().manual_seed(1_000_003 * view + start)
        zooms = NEAR if view % 2 else FAR
        chunk = images[start : start + CHUNK].split(16)
        maps = [features(random_view(b, size, rng, zooms) if view else scale_pixels(b, size)) for b in chunk]
        torch.save(torch.cat(maps).half(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.cat([torch.load(path) for path in paths])
