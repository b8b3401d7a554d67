"""What event handlers share: how they answer, and how they are connected."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from dcp_zoo.demo import pages
from dcp_zoo.errors import ZooError

# of an HTML component with the buttons of thumbnails.html: it triggers "delete" with the photograph's index
REMOVE = """element.addEventListener("click", (event) => {
    const button = event.target.closest(".dcp-remove");
    if (button) trigger("delete", {index: Number(button.dataset.index)});
});"""
NOTHING = "() => ''"  # clears the messages without the server


def action(method: Callable[..., Any]) -> Callable[..., str]:
    """Convert the messages that a handler returns, or the ZooError it raises, to HTML for the visitor."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> str:
        try:
            return pages.messages(method(*args, **kwargs) or [])
        except ZooError as error:
            return pages.messages([str(error)])

    return call


def view(method: Callable[..., str]) -> Callable[..., str]:
    """Show a ZooError in the place of the HTML that a handler returns."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> str:
        try:
            return method(*args, **kwargs)
        except ZooError as error:
            return pages.messages([str(error)], "status")

    return call


def on(event: Callable, handler: Callable | None, inputs: Any = None, outputs: Any = None, **options: Any) -> Any:
    """Connect a handler to an event; it is not part of the page's API."""
    return event(handler, inputs, outputs, **({"api_visibility": "private", "show_progress": "minimal"} | options))
