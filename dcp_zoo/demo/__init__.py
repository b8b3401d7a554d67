"""The demo: a web page that classifies and trains. `dcp-zoo demo`, or the Space in `hub/space/`.

`shared` has the models, `pages` the HTML and the events; `classify_room` and `train_room` have layout and handlers;
`app` joins them.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

from dcp_zoo.deploy.limits import listen, server
from dcp_zoo.errors import import_extra
from dcp_zoo.fields import Checked, count, option
from dcp_zoo.zoo.registry import MODELS

DEFAULT_HEAD = f"dcp_mini.{MODELS['dcp_mini'].default_tag}"
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out: expect mistakes that a full-size model would not."


@dataclass(frozen=True)
class VisitorLimits(Checked):
    """What one visitor may do; ZooError for less than one photograph, two classes, or two images per class."""

    max_photos: int = count(24, "Photographs on the page, at most.")
    max_classes: int = option(6, "Classes of a head trained on the page, at most.", min=2)
    max_shots: int = option(30, "Training images per class, at most.", min=2)


def launch(
    head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860, limits: VisitorLimits | None = None
) -> None:
    """Serve the demo until it is interrupted. Port 0 picks a free one; host "0.0.0.0" is open to other machines."""
    running, listening = demo_server(head, host, port, limits)
    print(f"The demo is at http://{host}:{listening.getsockname()[1]} - stop it with Ctrl-C.", flush=True)
    running.run(sockets=[listening])


def demo_server(head: str, host: str, port: int, limits: VisitorLimits | None = None) -> tuple[Any, socket.socket]:
    """The demo's `uvicorn.Server`, and the socket for it to listen on; see `launch`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import_extra("gradio", "demo")
    from dcp_zoo.demo.app import build_page, web_application

    listening = listen(host, port)
    try:
        app = web_application(build_page(head, limits or VisitorLimits()), host)
    except BaseException:
        listening.close()
        raise
    return server(app, shutdown_seconds=1), listening
