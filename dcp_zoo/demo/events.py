"""How event handlers answer, and the parts that both rooms have."""

from collections.abc import Callable, Sequence
from functools import partial

import gradio as gr

from dcp_zoo.data.paths import IMAGE_SUFFIXES
from dcp_zoo.demo import pages
from dcp_zoo.demo.session import Sessions
from dcp_zoo.errors import ZooError

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
            return pages.messages(change(sessions.of(request), *inputs) or [])
        except ZooError as error:
            return pages.messages([str(error)])

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
