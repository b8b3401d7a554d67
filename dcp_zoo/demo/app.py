"""The page, and the web application that serves it."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from gradio.utils import get_upload_folder
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dcp_zoo.demo import VisitorLimits
from dcp_zoo.demo.answers import MAX_FILE, load
from dcp_zoo.demo.classify import ANSWERS, ClassifyRoom
from dcp_zoo.demo.events import on
from dcp_zoo.demo.session import Session, Sessions
from dcp_zoo.demo.train import TrainRoom
from dcp_zoo.deploy.limits import LOCAL_HOSTS

HERE = Path(__file__).parent
CLASSIFY = "classify"  # the id of the tab
UPLOADS = 2_000_000_000  # bytes on the disk
INTRODUCTION = """# Image classifiers from a few photographs

DCP puts a few trained *prompts* into a frozen CLIP. Try it next to CLIP without training, on your own photographs and
class names, or train your own head. Nothing that you upload is kept."""

# Enforced by the browser: nothing is fetched from or sent to any other machine.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # for a contrast of at least 4.5
    body_text_color_subdued="*neutral_500", button_primary_background_fill="*primary_600", color_accent="*primary_600"
)


async def local_only(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Middleware that adds `POLICY` to every response, and bounds the uploads that wait on the disk."""
    if request.url.path.endswith("/upload"):
        length = int(request.headers.get("content-length", UPLOADS))
        if length + kept_uploads() >= UPLOADS:
            return PlainTextResponse("Too many uploads: try again.", 503, {"Retry-After": "60"})
    response = await call_next(request)
    response.headers["content-security-policy"] = POLICY
    return response


def kept_uploads() -> int:
    """The bytes of the uploads on the disk, at least 100 kB for each; of heads there is one for each session."""
    size = 0
    for path in Path(get_upload_folder()).rglob("*"):
        with suppress(OSError):  # it was read and removed
            size += 0 if "head-" in str(path) or path.is_dir() else max(path.stat().st_size, 100_000)
    return size


def web_application(page: gr.Blocks, host: str = "") -> FastAPI:
    """The page as an ASGI application. On this machine's own addresses only requests for these are answered, so that no
    page elsewhere can reach it by a name of its own."""
    hosts = list(LOCAL_HOSTS) if host in LOCAL_HOSTS else ["*"]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(local_only)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return gr.mount_gradio_app(
        app,
        page,
        path="",
        footer_links=[],
        max_file_size=MAX_FILE,
        show_error=False,  # of the program; bad input is explained on the page
        ssr_mode=False,
        theme=THEME,
        js=(HERE / "page.js").read_text(),
        css_paths=HERE / "style.css",
    )


def build_page(head: str, limits: VisitorLimits) -> gr.Blocks:
    """The page with its initial head; ZooError if that cannot be loaded."""
    models = list(dict.fromkeys(["dcp_mini", load(head).architecture]))  # these need no download
    sessions = Sessions(lambda: Session(head, limits))
    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(60, 1800)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs() as tabs:
            with gr.Tab("Classify", id=CLASSIFY):
                room = ClassifyRoom(sessions, limits, head)
            with gr.Tab("Train"):
                training = TrainRoom(sessions, limits, models, get_upload_folder())
            with gr.Tab("Inspect") as inspect:
                gr.Markdown("Wrong labels, duplicates and bad images among the photographs in *Train*.")
                on(inspect.select, training.inspect, training.names, gr.HTML())
        for event in (*room.changes, training.trained, on(page.load, lambda: None)):
            room.redraw(event)
        opened = (gr.update(selected=CLASSIFY), gr.update(selected=ANSWERS), ANSWERS)
        on(training.go.click, lambda: opened, None, [tabs, room.tabs, room.shown])

        def close(request: gr.Request) -> None:
            sessions.close(request)

        page.unload(close)
    return page
