"""The demo: a web page that trains and classifies. `dcp-zoo demo`, or the Space in `hub/space/`."""

from dcp_zoo.errors import import_extra
from dcp_zoo.serve import listen
from dcp_zoo.zoo.registry import MODELS

DEFAULT_HEAD = f"dcp_mini.{MODELS['dcp_mini'].default_tag}"
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out: expect mistakes that a full-size model would not."


def launch(head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the demo until it is interrupted. Port 0 picks a free one; host "0.0.0.0" is open to other machines.
    ZooError for an unknown head or a port that is taken."""
    import_extra("gradio", "demo")
    from dcp_zoo.demo.app import start

    with listen(host, port) as listening:  # Gradio takes no socket, and looks for another port than 0 by itself
        port = listening.getsockname()[1]
    page = start(head, host, port)
    print(f"The demo is at http://{host}:{port} - stop it with Ctrl-C.", flush=True)
    page.block_thread()
