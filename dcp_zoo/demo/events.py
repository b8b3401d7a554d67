"""What event handlers share: how they answer, and how they are connected."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from dcp_zoo.demo import pages
from dcp_zoo.errors import ZooError

# of an HTML component with the buttons of thumbnails.html: it triggers "delete" with the photograph's index
REMOVE = """element.addEventListener("click", (event) => {
    const button = event.target.closest(".dcp-remove");
    if (button) trigger("delete", {index: Number(button.dataset.index)});
});"""
NOTHING = "() => ''"  # clears the messages without the server


def handler(role: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method with the argument `session` as an event handler, which Gradio calls with the visitor's request.

    Messages that it returns (a list, or None) become HTML, and so does a ZooError; `role` is the ARIA role of that:
    "alert" for an action, "status" in the place of a view.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, request: gr.Request, *inputs: Any) -> Any:
            try:
                answer = method(self, self.sessions.of(request), *inputs)
            except ZooError as error:
                return pages.messages([str(error)], role)
            return pages.messages(answer or [], role) if answer is None or isinstance(answer, list) else answer

        call.__annotations__ = method.__annotations__ | {"session": gr.Request}  # by which Gradio passes the request
        return call

    return decorate


action, view = handler("alert"), handler("status")


def on(event: Callable, handler: Callable | None, inputs: Any = None, outputs: Any = None, **options: Any) -> Any:
    """Connect a handler to an event; it is not part of the page's API."""
    return event(handler, inputs, outputs, **({"api_visibility": "private", "show_progress": "minimal"} | options))
