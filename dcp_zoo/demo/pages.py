"""The HTML of the page: images are data URIs, and names are escaped."""

import base64
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from dcp_zoo.data.images import jpeg_base64
from dcp_zoo.demo.answers import Answer, BatchEffect, Change, best
from dcp_zoo.demo.photos import Photo
from dcp_zoo.demo.training import Result
from dcp_zoo.deploy.bulk.outputs import TABLES, columns
from dcp_zoo.deploy.bulk.rows import NONE, Row
from dcp_zoo.deploy.onnx_classifier import crop
from dcp_zoo.files import templates

SHOWN = 3  # classes on a card
PIXELS = 224  # side of the attention images
ORANGE = (255, 120, 0)

_templates = templates("dcp_zoo.demo")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: Image.Image, side: int) -> str:
    """An image, at most `side` pixels wide and high, as a data URI."""
    return f"data:image/jpeg;base64,{jpeg_base64(image, side, quality=85)}"


def thumbnail(photo: Photo, side: int = 400) -> str:
    return picture(photo.image, side)


def display_name(name: str) -> str:
    """A class name with spaces for underscores."""
    return name.replace("_", " ")


_templates.filters |= {"thumbnail": thumbnail, "display_name": display_name}


def _render(template: str, **values: object) -> str:
    return _templates.get_template(f"templates/{template}.html").render(**values)


def messages(texts: Sequence[str], kind: str = "alert") -> str:
    """Messages to the visitor; `kind` is the ARIA role, "alert" or "status"."""
    return _render("messages", texts=texts, kind=kind) if texts else ""


def thumbnails(photos: Sequence[Photo]) -> str:
    """A row of small images, each with a button that removes it."""
    return _render("thumbnails", photos=photos)


def answers(
    photos: Sequence[Photo],
    head: Sequence[Sequence[Answer]],
    zero_shot: Sequence[Sequence[Answer]] | None,
    rejected: Sequence[bool] | None,
    title: str,
) -> str:
    """One card per photograph: the top answers of the head and of zero-shot CLIP, how many are right, if that is known,
    and a link to a CSV file.

    Args:
        photos: the photographs.
        head, zero_shot: all classes for each photograph; None if there is no comparison.
        rejected: whether each photograph belongs to none of the classes; None if that was not asked.
        title: the head's method.
    """
    cards: list[dict[str, Any]] = []
    for photo, own, plain, no in zip(
        photos, head, zero_shot or [()] * len(photos), rejected or [False] * len(photos), strict=True
    ):
        names = list(dict.fromkeys(a.name for a in [*best(own, SHOWN), *best(plain, 1)]))
        shares = [{a.name: a.probability for a in answers} for answers in (own, plain)]
        cards.append(
            {"photo": photo, "top": NONE if no else names[0], "names": names, "head": shares[0], "zero_shot": shares[1]}
        )
    right = None
    if all(card["photo"].truth in card["head"] for card in cards):
        tops = [[card["top"] for card in cards], [best(plain, 1)[0].name for plain in zero_shot or []]]
        right = [sum(top == p.truth for top, p in zip(names, photos, strict=False)) for names in tops]
    csv = predictions_csv(photos, head, rejected)
    return _render("answers", cards=cards, right=right, title=title, compared=zero_shot is not None, csv=csv)


def predictions_csv(photos: Sequence[Photo], head: Sequence[Sequence[Answer]], rejected: Sequence[bool] | None) -> str:
    """A head's answers as a data URI of a CSV file, with the columns of `dcp-zoo predict --output`."""
    rows: list[Row] = [
        {
            "image": photo.name,
            "predictions": [{"class": a.name, "probability": round(a.probability, 4)} for a in best(own)],
        }
        for photo, own in zip(photos, head, strict=True)
    ]
    if rejected:
        rows = [row | {"rejected": no} for row, no in zip(rows, rejected, strict=True)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.csv"
        TABLES[path.suffix](str(path), rows, columns(rows))
        return data_uri(path.read_bytes(), "text/csv")


def edits(photos: Sequence[Photo], changed: Sequence[Sequence[Change]]) -> str:
    """For each photograph the effect of edited class names."""
    return _render("edits", cards=list(zip(photos, changed, strict=True)))


def overlay(photo: Photo, weights: torch.Tensor, cfg: dict[str, Any]) -> Image.Image:
    """What the model reads of a photograph, in grey, with patches the more orange the larger their weights (h, w)."""
    grey = Image.fromarray(crop(photo.image, cfg).transpose(1, 2, 0)).convert("L").resize((PIXELS, PIXELS))
    alpha = (weights / weights.max() * 200).round().byte().cpu().numpy()
    mask = Image.fromarray(alpha, "L").resize(grey.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", grey.size, ORANGE), grey.convert("RGB"), mask)


def attention(
    photo: Photo, weights: torch.Tensor, token: str, grid: tuple[int, int], m: int, cfg: dict[str, Any]
) -> str:
    """One image per block: weights (blocks, L) of one token over class token, patches and M prompts. `cfg` is the
    model's preprocessing."""
    blocks = [
        {
            "uri": picture(overlay(photo, row[1:-m].unflatten(0, grid), cfg), PIXELS),
            "shares": {"patches": row[1:-m].sum(), "class token": row[0], "prompts": row[-m:].sum()},
            "strongest": row[1:-m].max(),
        }
        for row in weights
    ]
    return _render("attention", photo=photo, token=token, blocks=blocks, grid=grid, uniform=1 / weights.shape[1])


def batch_effect(photo: Photo, names: Sequence[str], rows: Sequence[BatchEffect]) -> str:
    """A table of one photograph's logits in different batches, and a sentence on how much they change in each stats,
    which counts nothing but the rows."""
    modes = {stats: [row for row in rows if row.stats == stats] for stats in ("batch", "stored")}
    effects = [
        {
            "stats": stats,
            "change": max(max(column) - min(column) for column in zip(*(row.logits for row in own), strict=True)),
            "tops": len({row.top for row in own}),
        }
        for stats, own in modes.items()
        if len(own) > 1
    ]
    return _render("batch_effect", photo=photo, names=names, rows=rows, effects=effects)


def result(result: Result) -> str:
    """What a training gave: held-out accuracy over all and by class, next to zero-shot CLIP."""
    return _render("result", result=result)
