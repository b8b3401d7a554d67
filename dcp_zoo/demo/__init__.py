"""The demo: a page in the browser that classifies, explains and trains. `dcp-zoo demo`, or the Space in `hub/space/`.

Computing (`photos`, `heads`, `answers`, `training`) and drawing (`pages`) know nothing of Gradio; `app` wires them up.
"""

import os
from typing import Any

from ..errors import ZooError, import_extra
from ..registry import MODELS

DEFAULT_HEAD = f"dcp_mini.{MODELS['dcp_mini'].default_tag}"


def launch(head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860, *, block: bool = True) -> Any:
    """Serve the demo until it is interrupted.

    Args:
        head: what the page starts with, a name that `create_model` takes.
        host: address to listen on; "0.0.0.0" lets other machines in.
        port: 0 to 65535; 0 takes any free one.
        block: return only when the server ends; else return the `gradio.Blocks`, which has `close()` and `local_url`.

    Raises:
        ZooError: Gradio is not installed, the head cannot be loaded, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import_extra("gradio", "demo")
    from .app import build, serve

    page = build(head)
    try:
        serve(page, host, port)
    except OSError as error:
        raise ZooError(f"Cannot listen on {host}, port {port} ({error}): choose another with --port.") from error
    print(f"The demo is at {page.local_url} - Ctrl-C ends it.")
    if block:
        page.block_thread()
    return page
