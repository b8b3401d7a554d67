"""The HTML of the page: images are data URIs, and names are escaped."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from PIL import Image

from dcp_zoo.data.images import jpeg_base64
from dcp_zoo.data.pixels import crop
from dcp_zoo.demo.shared import Answers, Photo
from dcp_zoo.fields import Values
from dcp_zoo.files import templates
from dcp_zoo.texts import NONE

CARD_CLASSES = 3  # classes on a card
MAP_SIDE = 224  # side of the attention images
ORANGE = (255, 120, 0)


def picture(image: Image.Image, side: int = 400) -> str:
    """An image, at most `side` pixels wide and high, as a data URI."""
    return f"data:image/jpeg;base64,{jpeg_base64(image, side, quality=85)}"


_templates = templates("dcp_zoo.demo")
_templates.filters |= {"picture": picture, "display_name": lambda name: name.replace("_", " ")}


def render(template: str, **values: object) -> str:
    """A part of the page from its template, such as "thumbnails"."""
    return _templates.get_template(f"templates/{template}.html").render(**values)


def messages(texts: Sequence[str], kind: str = "alert") -> str:
    """Messages to the visitor; `kind` is the ARIA role, "alert" or "status"."""
    return render("messages", texts=texts, kind=kind) if texts else ""


def answers(
    photos: list[Photo], head: list[Answers], clip: list[Answers] | None, rejected: list[bool] | None, title: str
) -> str:
    """One card per photograph with the top answers; how many are right, if that is known."""
    cards: list[Values] = []
    n = len(photos)
    for photo, own, plain, no in zip(photos, head, clip or [{}] * n, rejected or [False] * n, strict=True):
        tops = [*own][:CARD_CLASSES], [*plain][:1]
        card = {"photo": photo, "head": own, "clip": plain, "names": list(dict.fromkeys(chain(*tops)))}
        cards.append(card | {"top": NONE if no else tops[0][0], "clip_top": next(iter(plain), None)})
    right = None
    if all(card["photo"].truth in card["head"] for card in cards):
        right = [sum(card[top] == card["photo"].truth for card in cards) for top in ("top", "clip_top")]
    return render("answers", cards=cards, right=right, title=title, compared=clip is not None)


def overlay(photo: Photo, weights: torch.Tensor, cfg: Values) -> Image.Image:
    """What the model reads of a photograph, in grey, with patches the more orange the larger their weights (h, w)."""
    grey = Image.fromarray(crop(photo.image, cfg).transpose(1, 2, 0)).convert("L").resize((MAP_SIDE, MAP_SIDE))
    alpha = (weights / weights.max() * 200).round().byte().cpu().numpy()
    mask = Image.fromarray(alpha, "L").resize(grey.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", grey.size, ORANGE), grey.convert("RGB"), mask)


def attention(
    photo: Photo, weights: torch.Tensor, token: str, grid: tuple[int, int], m: int, cfg: Values, first: int = 0
) -> str:
    """An image per block, from `first`: a token's weights (blocks, L) over class token, registers, patches, prompts."""
    blocks: list[Values] = []
    for number, row in enumerate(weights, first):
        before, patches, prompts = row.split([len(row) - m - math.prod(grid), math.prod(grid), m])
        shares = {"patches": patches.sum(), "class token": before[0], "prompts": prompts.sum()}
        if len(before) > 1:
            shares["registers"] = before[1:].sum()
        image = overlay(photo, patches.unflatten(0, grid), cfg)
        blocks.append({"number": number, "image": image, "shares": shares, "strongest": patches.max()})
    return render("attention", photo=photo, token=token, blocks=blocks, grid=grid, uniform=1 / weights.shape[1])
