"""The parts of the page: HTML, in which images are data URIs and names are escaped, and what events do."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import gradio as gr
from PIL import Image

from dcp_zoo.data.images import jpeg_base64
from dcp_zoo.data.paths import IMAGE_SUFFIXES
from dcp_zoo.demo.session import Sessions
from dcp_zoo.demo.shared import Answers, Photo
from dcp_zoo.errors import ZooError
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


# of an HTML component with the buttons of thumbnails.html: it triggers "delete" with the photograph's index
REMOVE = """element.addEventListener("click", (event) => {
    const button = event.target.closest(".dcp-remove");
    if (button) trigger("delete", {index: Number(button.dataset.index)});
});"""
Connected = gr.events.Dependency
Part = gr.blocks.Block | Sequence[gr.blocks.Block] | None  # of the page
NOTHING = "() => ''"  # clears the messages without the server


def changing(sessions: Sessions, change: Callable[..., list[str] | None]) -> Callable[..., str]:
    """A handler that changes the visitor's session by one of its methods; messages and errors become HTML."""

    def call(request: gr.Request, *inputs: object) -> str:
        try:
            return messages(change(sessions.of(request), *inputs) or [])
        except ZooError as error:
            return messages([str(error)])

    return call


def removing(sessions: Sessions, change: Callable[..., None]) -> Callable[..., str]:
    """`changing`, whose last input is the index in the event of `REMOVE`."""
    remove = changing(sessions, change)

    def call(request: gr.Request, event: gr.EventData, *inputs: object) -> str:
        return remove(request, *inputs, event.index)

    return call


def on(event: Callable, handler: Callable | None, inputs: Part = None, outputs: Part = None, **how: str) -> Connected:
    """Connect a handler to an event; it is not part of the page's API."""
    return event(handler, inputs, outputs, **({"api_visibility": "private", "show_progress": "minimal"} | how))


PICTURES = ["image", *IMAGE_SUFFIXES]  # not every system knows that .heic is an image
drop_zone = partial(gr.File, file_count="multiple", file_types=PICTURES)  # takes a folder with the help of `page.js`
small_button = partial(gr.Button, size="sm", min_width=100)
