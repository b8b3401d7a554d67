"""The page, and the web application that serves it. What a request may name, and where, is checked here: Gradio itself
copies any file that a request names into the folder from which it serves files, unless its page was launched by itself.
"""

import json
import secrets
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import gradio as gr
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from gradio.utils import get_upload_folder
from gradio_client.utils import strip_invalid_filename_characters
from starlette.datastructures import UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dcp_zoo.demo import VisitorLimits
from dcp_zoo.demo.classify_room import ClassifyRoom
from dcp_zoo.demo.pages import on
from dcp_zoo.demo.session import Session, Sessions
from dcp_zoo.demo.shared import MAX_FILE, load
from dcp_zoo.demo.train_room import TrainRoom
from dcp_zoo.deploy.limits import LOCAL_HOSTS

HERE = Path(__file__).parent
CLASSIFY = "classify"  # the id of the tab
UPLOADS = 2_000_000_000  # bytes on the disk
API = "/gradio_api"
FILE, UPLOAD, PROGRESS, CALL = (f"{API}/{name}" for name in ("file=", "upload", "upload_progress", "queue/join"))
# all that the page asks for; Gradio has many more routes, such as those that fetch from other machines
ROUTES = (
    *(FILE, UPLOAD, CALL, f"{API}/queue/data", f"{API}/heartbeat/", f"{API}/cancel", f"{API}/startup-events"),
    *("/assets/", "/static/", "/theme.css", "/manifest.json", "/favicon.ico"),
)
CALL_BYTES = 1_000_000  # of one call of a handler: class names at most
INTRODUCTION = """# Image classifiers from a few photographs

CLIP knows everyday things, such as those in the six photographs, by their names alone. What it does not know by name it
can learn: open *Train*, try the example, and see the accuracy before and after. Nothing that you upload is kept."""

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


async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Middleware that refuses what the page never asks for, and adds `POLICY` to every response."""
    response = await refusal(request) or await call_next(request)
    response.headers["content-security-policy"] = POLICY
    return response


async def refusal(request: Request) -> Response | None:
    """The answer to a request that is refused: for another route than the page's, for more uploads than may wait on the
    disk, or with the path of a file that is no upload."""
    path, length = request.scope["path"], request.headers.get("content-length", "")
    if path != "/" and not path.startswith(ROUTES):
        return PlainTextResponse("Not found.", 404)
    if path.startswith(FILE) and not is_upload(path.removeprefix(FILE)):
        return PlainTextResponse("No such file.", 403)
    if path == UPLOAD and int(length or UPLOADS) + kept_uploads() >= UPLOADS:
        return PlainTextResponse("Too many uploads: try again.", 503, {"Retry-After": "60"})
    if path.startswith(CALL):
        if int(length or CALL_BYTES) >= CALL_BYTES:
            return PlainTextResponse("The request is too large.", 413)
        try:
            accepted = names_uploads_only(json.loads(await request.body()))
        except (ValueError, RecursionError):
            accepted = False
        if not accepted:
            return PlainTextResponse("The request names a file that was not uploaded.", 400)
    return None


def names_uploads_only(value: object) -> bool:
    """Whether every file in a request's JSON is an upload: Gradio takes an object with a path for a file."""
    if isinstance(value, dict):
        return ("path" not in value or is_upload(value["path"])) and all(map(names_uploads_only, value.values()))
    return not isinstance(value, list) or all(map(names_uploads_only, value))


def is_upload(path: str | Path) -> bool:
    """Whether this is the path of a file in Gradio's folder, where a visitor's files have unguessable names."""
    try:
        return Path(path).is_file() and Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    except (TypeError, ValueError, OSError):
        return False


async def keep_uploads(request: Request) -> list[str]:
    """The places of uploaded files, each in a folder of its own. Gradio's are named by their content: of two visitors
    with the same picture, the first one's handler would remove the second one's. 413 for a file above `MAX_FILE`."""
    kept: list[str] = []
    async with request.form() as form:
        for file in form.getlist("files"):
            if not isinstance(file, UploadFile) or (file.size or 0) > MAX_FILE:
                raise HTTPException(413, f"A file is larger than {MAX_FILE:,} bytes.")
            folder = Path(get_upload_folder()) / secrets.token_hex(16)
            folder.mkdir(parents=True)
            place = folder / (strip_invalid_filename_characters(Path(file.filename or "").name) or "upload")
            with place.open("wb") as target:
                await run_sync(shutil.copyfileobj, file.file, target)
            kept.append(str(place))
    return kept


async def upload_progress() -> Response:
    """The page asks while it uploads; it shows its own bar."""
    return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")


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
    app.middleware("http")(guard)
    app.post(UPLOAD)(keep_uploads)
    app.get(PROGRESS)(upload_progress)
    page.has_launched = page.is_running = True  # which a mounted page never is: Gradio's own checks of paths ask for it
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
    clip = load(head).encoder.architecture  # which needs no download
    sessions = Sessions(lambda: Session(head, limits))
    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(60, 1800)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs() as tabs:
            with gr.Tab("Classify", id=CLASSIFY):
                room = ClassifyRoom(sessions, limits, head)
            with gr.Tab("Train"):
                training = TrainRoom(sessions, limits, clip, get_upload_folder())
        for event in (*room.changes, training.trained, on(page.load, lambda: None)):
            room.redraw(event)
        on(training.go.click, lambda: gr.update(selected=CLASSIFY), None, tabs)
        page.unload(sessions.close)
    return page
