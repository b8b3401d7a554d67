"""The demo, a web page that trains and classifies: `dcp-zoo demo`, or the Space in `hub/space/`. The page, in plain
Gradio, and its door: what Gradio itself would let in."""

import json
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dcp_zoo.api.estimator import FewShotClassifier
from dcp_zoo.api.functions import as_model, predict
from dcp_zoo.backbone.classes import repeated_names
from dcp_zoo.data import Item, load_image, load_split
from dcp_zoo.data.images import decode_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.splits import divide
from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.files import IMAGE_SUFFIXES
from dcp_zoo.heads.config import Accuracy
from dcp_zoo.heads.head import Head
from dcp_zoo.serve import LOCAL_HOSTS, listen
from dcp_zoo.zoo.registry import DEFAULT_HEAD, MINIATURE_NOTE

MAX_FILE, MAX_PIXELS = 20_000_000, 50_000_000  # bytes and pixels of one photograph
MAX_PHOTOS, MAX_CLASSES, MAX_SHOTS = 24, 6, 30  # photographs to classify; classes, and photographs of each
KEPT_SIDE = 448  # pixels to which a larger short side is resized: more than the input of the largest model
HELD_OUT = 0.25  # of each class
UPLOAD_SECONDS = 3600  # until an upload is removed
KEPT_FREE = 2_000_000_000  # bytes of the disk that uploads may not fill
CALL_BYTES = 1_000_000  # of one call of a handler

API = "/gradio_api"
UPLOAD, CALL = f"{API}/upload", f"{API}/queue/join"
# all that the page asks for; Gradio has many more routes, such as those that fetch from other machines
ROUTES = (
    *(f"{API}/file=", UPLOAD, CALL, f"{API}/queue/data", f"{API}/heartbeat/", f"{API}/cancel"),
    *(f"{API}/startup-events", "/assets/", "/static/", "/theme.css", "/manifest.json", "/favicon.ico"),
)
# enforced by the browser: nothing is fetched from or sent to any other machine
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none of Google's
THEME = gr.themes.Default(primary_hue="indigo", **FONTS).set(button_primary_background_fill="*primary_600")
INTRODUCTION = """# Image classifiers from a few photographs

Give each class a name and some photographs, and train a classifier on a frozen CLIP in seconds. Uploads are removed
after an hour."""
Photos = Sequence[tuple[str, str | None]] | None  # of a gallery: paths and captions


class Trained(NamedTuple):
    """A visitor's own head, and the folder of its download, which goes with it."""

    head: Head
    files: TemporaryDirectory


def launch(head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the demo until it is interrupted. Port 0 picks a free one; host "0.0.0.0" is open to other machines.
    ZooError for an unknown head or a port that is taken."""
    with listen(host, port) as listening:  # Gradio takes no socket, and looks for another port than 0 by itself
        port = listening.getsockname()[1]
    page = start(head, host, port)
    print(f"The demo is at http://{host}:{port} - stop it with Ctrl-C.", flush=True)
    page.block_thread()


def start(head: str, host: str, port: int) -> gr.Blocks:
    """The page, served in a thread. On this machine's own addresses only requests for these are answered, so that no
    page elsewhere can reach it by a name of its own. ZooError for an unknown head."""
    hosts = list(LOCAL_HOSTS) if host in LOCAL_HOSTS else ["*"]
    page = build_page(as_model(head, "auto"))
    page.queue(max_size=100, api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        max_file_size=MAX_FILE,
        state_session_capacity=200,
        theme=THEME,
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
                Middleware(BaseHTTPMiddleware, dispatch=guard),
            ],
        },
    )
    return page


async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Middleware that refuses what the page never asks for, and adds `POLICY` to every response."""
    response = await refusal(request) or await call_next(request)
    response.headers["content-security-policy"] = POLICY
    return response


async def refusal(request: Request) -> Response | None:
    """The answer to a request that is refused: for another route than the page's, from another site's page, for a call
    that is large or names what Gradio would download, or for an upload for which the disk has no room."""
    path, length = request.scope["path"], request.headers.get("content-length", "")
    if "://" in path or (path != "/" and not path.startswith(ROUTES)):
        return PlainTextResponse("Not found.", 404)
    if request.method == "POST" and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return PlainTextResponse("Not from another site's page.", 403)
    if path == UPLOAD and shutil.disk_usage(Path(get_upload_folder()).parent).free < KEPT_FREE + int(length or 0):
        return PlainTextResponse("Too many uploads: try again later.", 503, {"Retry-After": "600"})
    if path == CALL:
        if int(length or CALL_BYTES) >= CALL_BYTES:
            return PlainTextResponse("The request is too large.", 413)
        try:
            json.loads(await request.body(), object_hook=check_local)
        except (ValueError, RecursionError):
            return PlainTextResponse("The request names a file that was not uploaded.", 400)
    return None


def check_local(fields: dict[str, Any]) -> None:
    """ValueError for a file at a URL, which Gradio would download."""
    if "://" in str(fields.get("path", "")):
        raise ValueError


def build_page(model: Head) -> gr.Blocks:
    """The page, with a head that all visitors may use, and CLIP for their own."""

    @explained
    def train(*fields: Any) -> list[object]:
        return train_on(model.encoder.architecture, named_classes(fields[::2], fields[1::2]))

    @explained
    def classify(photos: Photos, trained: Trained | None, reject: bool) -> list[tuple[str, str]]:
        return captions(trained.head if trained else model, photos, reject)

    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(600, UPLOAD_SECONDS)) as page:
        gr.Markdown(INTRODUCTION)
        trained = gr.State(None, delete_callback=lambda own: own and own.files.cleanup())
        with gr.Tab("Train"):
            fields = class_fields()
            with gr.Row():
                start, example = gr.Button("Train", variant="primary"), gr.Button("Fill in an example")
            told = gr.Markdown()
            download = gr.DownloadButton("Download the head", visible=False)
        with gr.Tab("Classify"):
            names = shorten([name.replace("_", " ") for name in model.classnames])
            gr.Markdown(f"Your own head, or else the page's, which knows {model.num_classes} classes: {names}.")
            photos = gallery(f"Photographs, up to {MAX_PHOTOS}", sample_images(), columns=3)
            reject = gr.Checkbox(label='Answer "none of these" for photographs of other things')
            again = gr.Button("Classify", variant="primary")
            if model.encoder.architecture == "dcp_mini":
                gr.Markdown(MINIATURE_NOTE)
        how: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}  # one at a time
        shown = [photos, trained, reject], photos
        fitted = start.click(train, fields, [told, trained, download], **how)
        fitted.success(classify, *shown, **how)
        gr.on([page.load, again.click, photos.upload, reject.input], classify, *shown, **how)
        example.click(digits, None, fields, **how)
    return page


def gallery(label: str, value: Sequence[str] | None = None, **options: Any) -> gr.Gallery:
    """A place for photographs; not every system knows that .heic is an image."""
    kinds = ["image", *IMAGE_SUFFIXES]
    return gr.Gallery(
        value,
        label=label,
        file_types=kinds,
        format="png",
        buttons=[],
        interactive=True,
        object_fit="contain",
        **options,
    )


def class_fields() -> list[gr.components.Component]:
    """Name and photographs of each class in turn."""
    fields: list[gr.components.Component] = []
    for first in range(1, MAX_CLASSES + 1, 3):
        with gr.Row():
            for number in range(first, first + 3):
                with gr.Column(min_width=260):
                    fields.append(gr.Textbox(label=f"Class {number}", max_length=100, placeholder="its name"))
                    fields.append(gallery(f"Photographs of class {number}, up to {MAX_SHOTS}", height=200, columns=4))
    return fields


def explained(handler: Callable) -> Callable:
    """A handler whose errors that a visitor can mend are shown on the page."""

    @wraps(handler)
    def call(*inputs: Any) -> Any:
        try:
            return handler(*inputs)
        except ZooError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def read(path: str) -> Image.Image:
    """A small copy of a photograph; ZooError, naming the file without its folder, if it is damaged or too large."""
    image = decode_image(Path(path).read_bytes(), Path(path).name, MAX_PIXELS)
    shrink = min(KEPT_SIDE / min(image.size), 2 * KEPT_SIDE / (image.width * image.height) ** 0.5)
    size = [max(1, round(side * shrink)) for side in image.size]
    return image if shrink >= 1 else image.resize(size, Image.Resampling.BICUBIC)


def captions(model: Head, photos: Photos, reject: bool) -> list[tuple[str, str]]:
    """The photographs with their two most probable classes; what cannot be read says why. ZooError for too many."""
    paths = [path for path, _ in photos or ()]
    check_count(paths, MAX_PHOTOS, "photographs")
    if reject and model.cannot_reject:
        gr.Warning(model.cannot_reject)
    asked, shown = (reject and not model.cannot_reject) or None, []
    for path in paths:
        try:
            row = predict(model, [read(path)], top_k=2, reject=asked)[0]
            best = row if isinstance(row, list) else []  # None where it is rejected
            said = [f"{name.replace('_', ' ')} {100 * share:.0f} %" for name, share in best]
            shown.append((path, ", ".join(said) or "none of these"))
        except ZooError as error:
            shown.append((path, str(error)))
    return shown


def check_count(photos: Sequence[object], most: int, what: str) -> None:
    if len(photos) > most:
        raise ZooError(f"{len(photos)} {what} are too many: remove some until {most} are left.")


def named_classes(names: Sequence[str | None], photos: Sequence[Photos]) -> dict[str, list[str]]:
    """The paths of each class's photographs, without empty classes; ZooError says what is missing or too much."""
    classes: dict[str, list[str]] = {}
    stripped = [(name or "").strip() for name in names]
    if problem := repeated_names([name for name in stripped if name]):
        raise ZooError(problem)
    for number, (name, shots) in enumerate(zip(stripped, photos, strict=True), 1):
        if shots and not name:
            raise ZooError(f"Class {number} has photographs but no name: give it one.")
        if name and not shots:
            raise ZooError(f"The class {name!r} has no photographs: add at least one, or remove its name.")
        if shots:
            check_count(shots, MAX_SHOTS, f"photographs of {name!r}")
            classes[name] = [path for path, _ in shots]
    if len(classes) < 2:
        raise ZooError("Training needs at least two classes: give each a name and at least one photograph.")
    return classes


def train_on(clip: str, classes: dict[str, list[str]]) -> list[object]:
    """Train on three quarters of each class's photographs, and measure on the others -> what to tell the visitor, the
    head, the button with its download."""
    names, began = list(classes), time.monotonic()
    items = [Item(read(path), path, label) for label, paths in enumerate(classes.values()) for path in paths]
    train, _, test = divide(items, HELD_OUT)
    shots = [item.path for item in train], [names[item.label] for item in train]
    own = FewShotClassifier(clip, memory=False).fit(*shots)  # visitors' images are not kept
    lines = [f"Trained on {len(train)} photographs in {time.monotonic() - began:.0f} s. *Classify* now uses your head."]
    if test:
        plain = FewShotClassifier(clip, "zero-shot", memory=False).fit(*shots)
        truth = np.array([names[item.label] for item in test])
        lines.append(f"Of {len(test)} held-out photographs, these are named right:")
        for title, classifier in (("CLIP without training", plain), ("your head", own)):
            right = int((classifier.predict([item.path for item in test]) == truth).sum())
            lines.append(f"- {title}: {Accuracy('', right, len(test))}")
    else:
        lines.append("Nothing is measured: with three photographs per class, one of them is held out.")
    files = TemporaryDirectory(prefix="dcp_zoo-")
    folder = own.save(Path(files.name, "my_head"))
    packed = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return ["\n\n".join(lines), Trained(own.model_, files), gr.update(value=packed, visible=True)]


def digits() -> list[object]:
    """An example: handwritten digits, which CLIP without training cannot read."""
    items = load_split("digits").train
    filled: list[object] = []
    for digit in range(MAX_CLASSES):
        filled += [f"handwritten {digit}", [load_image(i.path) for i in items if i.label == digit][:16]]
    return filled
