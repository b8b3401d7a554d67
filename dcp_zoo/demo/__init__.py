"""The demo: a web page that classifies, explains and trains. `dcp-zoo demo`, or the Space in `hub/space/`.

Computation (`photos`, `heads`, `answers`, `training`) and rendering (`pages`) do not depend on Gradio; `handlers` and
`app` connect them to it.
"""

import os
import socket
from typing import Any

from dcp_zoo.deploy.listen import listen
from dcp_zoo.errors import import_extra
from dcp_zoo.zoo.registry import MODELS

DEFAULT_HEAD = f"dcp_mini.{MODELS['dcp_mini'].default_tag}"


def launch(head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the demo until it is interrupted.

    Args:
        head: the initial head, a name that `create_model` accepts.
        host: address to listen on; "0.0.0.0" accepts connections from other machines.
        port: 0 picks a free one.

    Raises:
        ZooError: Gradio is not installed, the head cannot be loaded, or the port is taken.
    """
    server, listening = prepare(head, host, port)
    print(f"The demo is at http://{host}:{listening.getsockname()[1]} - stop it with Ctrl-C.", flush=True)
    server.run(sockets=[listening])


def prepare(head: str, host: str, port: int) -> tuple[Any, socket.socket]:
    """The demo's `uvicorn.Server`, and the socket for it to listen on; see `launch`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import_extra("gradio", "demo")
    import uvicorn

    from dcp_zoo.demo.app import application, build

    listening = listen(host, port)
    try:
        app = application(build(head))
    except BaseException:
        listening.close()
        raise
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)), listening
