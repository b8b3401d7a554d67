"""The HTML of the page: images are data URIs, and names are escaped."""

from collections.abc import Sequence
from itertools import chain

from PIL import Image

from dcp_zoo.data.images import jpeg_base64
from dcp_zoo.demo.shared import Answers, Photo
from dcp_zoo.fields import Values
from dcp_zoo.files import templates
from dcp_zoo.texts import NONE

CARD_CLASSES = 3  # classes on a card


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
