"""The HTML of the page: images are data URIs, and names are escaped."""

import base64
import io
from collections.abc import Sequence

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageOps

from dcp_zoo.demo.answers import Answer, BatchEffect, Change
from dcp_zoo.demo.photos import Photo

PIXELS = 224  # side of the attention images
ORANGE = (255, 120, 0)

_templates = Environment(loader=PackageLoader("dcp_zoo.demo"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def data_uri(image: Image.Image) -> str:
    """An image as a data URI of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail(photo: Photo, side: int = 320) -> str:
    """A photograph, at most `side` pixels wide and high, as a data URI."""
    image = photo.image.copy()
    image.thumbnail((side, side))
    return data_uri(image)


def display_name(name: str) -> str:
    """A class name with spaces for underscores."""
    return name.replace("_", " ")


_templates.filters |= {"thumbnail": thumbnail, "display_name": display_name}


def messages(texts: Sequence[str], kind: str = "alert") -> str:
    """Messages to the visitor; `kind` is the ARIA role, "alert" or "status"."""
    return _templates.get_template("messages.html").render(texts=texts, kind=kind) if texts else ""


def thumbnails(photos: Sequence[Photo]) -> str:
    """A row of small images."""
    return _templates.get_template("thumbnails.html").render(photos=photos)


def answers(
    photos: Sequence[Photo],
    dcp: Sequence[Sequence[Answer]],
    zero_shot: Sequence[Sequence[Answer]],
    changed: Sequence[Sequence[Change]] | None,
) -> str:
    """One card per photograph: the top answers of DCP and of zero-shot CLIP, and the effect of edited class names."""
    changed = changed or [[]] * len(photos)
    cards = list(zip(photos, dcp, zero_shot, changed, strict=True))
    return _templates.get_template("answers.html").render(cards=cards)


def overlay(photo: Photo, weights: torch.Tensor) -> Image.Image:
    """The square crop that the model reads, in grey, with patches the more orange the larger their weights (h, w)."""
    grey = ImageOps.fit(photo.image, (PIXELS, PIXELS)).convert("L")
    alpha = (weights / weights.max() * 200).round().byte().cpu().numpy()
    mask = Image.fromarray(alpha, "L").resize(grey.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", grey.size, ORANGE), grey.convert("RGB"), mask)


def attention(photo: Photo, weights: torch.Tensor, token: str, grid: tuple[int, int], m: int) -> str:
    """One image per block: weights (blocks, L) of one token over class token, patches and M prompts."""
    blocks = [
        {
            "uri": data_uri(overlay(photo, row[1:-m].unflatten(0, grid))),
            "shares": {"patches": row[1:-m].sum(), "class token": row[0], "prompts": row[-m:].sum()},
            "strongest": row[1:-m].max(),
        }
        for row in weights
    ]
    uniform = 1 / weights.shape[1]
    return _templates.get_template("attention.html").render(
        photo=photo, token=token, blocks=blocks, grid=grid, uniform=uniform
    )


def batch_effect(photo: Photo, names: Sequence[str], rows: Sequence[BatchEffect], shift: float | None) -> str:
    """A table of one photograph's logits in different batches, and a sentence on how much they change."""
    batch = [row for row in rows if row.name != "calibrated"]
    columns = zip(*(row.logits for row in batch), strict=True)
    change = max((max(column) - min(column) for column in columns), default=0.0)
    tops = {row.top for row in batch}
    return _templates.get_template("batch_effect.html").render(
        photo=photo, names=names, rows=rows, change=change, shift=shift, tops=tops, alone=len(batch) == 1
    )
