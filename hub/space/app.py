"""The demo, a web page that trains and classifies, in plain Gradio; on a Hugging Face Space as it is.

python hub/space/app.py
python hub/space/app.py --head my_head --port 8000
"""

import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import gradio as gr
from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from typer import Typer

from dcp_zoo.accuracy import Accuracy
from dcp_zoo.api.estimator import FewShotClassifier
from dcp_zoo.api.functions import predict
from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.data import Item, load_image, load_split
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.splits import divide
from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.features.groups import group_own_images
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.heads import loaded
from dcp_zoo.serve import LOCAL_HOSTS, listen
from dcp_zoo.zoo.resolve import parse_name
from dcp_zoo.zoo.specs import DEFAULT_HEAD, MINIATURE_NOTE

program = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
HOST = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
MAX_FILE = 20_000_000  # bytes of one photograph
CLASSES = 6  # for which the page has fields
HELD_OUT = 0.25  # of each class
UPLOAD_SECONDS = 3600  # until an upload is removed, and a head
FONTS: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none of Google's
THEME = gr.themes.Default(primary_hue="indigo", **FONTS).set(button_primary_background_fill="*primary_600")
INTRODUCTION = """# Image classifiers from a few photographs

Give each class a name and some photographs, and train a classifier on a frozen CLIP in seconds. Uploads are removed
after an hour."""
Photos = Sequence[tuple[str, str | None]] | None  # of a gallery: paths and captions


@program.command(cls=opt.Command)
def demo(port: opt.Port = 7860, host: opt.Host = HOST, head: opt.HeadName = DEFAULT_HEAD) -> None:
    """Try heads in the browser: train on a few photographs, classify, reject. Stop with Ctrl-C."""
    launch(str(parse_name(head)), host, port)


def launch(head: str = DEFAULT_HEAD, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> gr.Blocks:
    """Serve the demo until it is interrupted, or in a thread, unless it should `block`. Host "0.0.0.0" is
    open to other machines; port 0 picks a free one. ZooError for an unknown head or a port that is taken."""
    # Gradio answers a page elsewhere that calls this machine by a name of its own, or sends without reading
    hosts = list(LOCAL_HOSTS) if host in LOCAL_HOSTS else ["*"]
    own = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    page = build_page(loaded(head, "auto")).queue(max_size=100, api_open=False)
    with listen(host, port) as free:  # Gradio takes no socket, and does not pick a free port for 0
        port = free.getsockname()[1]
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        show_error=True,
        footer_links=[],
        max_file_size=MAX_FILE,
        theme=THEME,
        app_kwargs={"middleware": [own, Middleware(BaseHTTPMiddleware, dispatch=from_own_page)]},
    )
    return page


async def from_own_page(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Middleware that refuses what another site's page sends."""
    if request.method == "POST" and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return PlainTextResponse("Not from another site's page.", 403)
    return await call_next(request)


def build_page(model: Head) -> gr.Blocks:
    """The page, with a head that all visitors may use, and CLIP for their own."""
    heads = TemporaryDirectory(prefix="dcp_zoo-")  # for downloads, which Gradio copies; removed with the process

    def train(*fields: Any) -> list[object]:
        remove_old(heads.name)
        return train_on(model.encoder.architecture, named_classes(fields[::2], fields[1::2]), mkdtemp(dir=heads.name))

    def classify(photos: Photos, trained: Head | None, reject: bool) -> list[tuple[str, str]]:
        return captions(trained or model, photos, reject)

    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(600, UPLOAD_SECONDS)) as page:
        gr.Markdown(INTRODUCTION)
        trained = gr.State(None)
        with gr.Tab("Train"):
            fields = class_fields()
            with gr.Row():
                start = gr.Button("Train", variant="primary")
                example = gr.Button("Fill in an example")
            told = gr.Markdown()
            download = gr.DownloadButton("Download the head", visible=False)
        with gr.Tab("Classify"):
            names = shorten([name.replace("_", " ") for name in model.classnames])
            gr.Markdown(f"Your own head, or else the page's, which knows {model.num_classes} classes: {names}.")
            photos = gallery("Photographs to classify", sample_images(), columns=3)
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
    """A place for photographs."""
    kinds: Any = {"file_types": ["image"], "format": "png", "buttons": [], "object_fit": "contain"}
    return gr.Gallery(value, label=label, interactive=True, **kinds, **options)


def class_fields() -> list[gr.components.Component]:
    """Name and photographs of each class in turn."""
    fields: list[gr.components.Component] = []
    for first in range(1, CLASSES + 1, 3):
        with gr.Row():
            for number in range(first, first + 3):
                with gr.Column(min_width=260):
                    fields.append(gr.Textbox(label=f"Class {number}", max_length=100, placeholder="its name"))
                    fields.append(gallery(f"Photographs of class {number}", height=200, columns=4))
    return fields


def captions(model: Head, photos: Photos, reject: bool) -> list[tuple[str, str]]:
    """The photographs with their two most probable classes; what cannot be read says why."""
    if reject and model.cannot_reject:
        gr.Warning(model.cannot_reject)
    paths = [path for path, _ in photos or ()]
    shown = list[tuple[str, str]]()
    asked = (reject and not model.cannot_reject) or None
    found = predict(model, paths, top_k=2, reject=asked, errors="keep") if paths else []
    for path, row in zip(paths, found, strict=True):
        if isinstance(row, ZooError):
            shown.append((path, str(row).replace(path, Path(path).name)))
        else:
            said = [f"{name.replace('_', ' ')} {100 * share:.0f} %" for name, share, _ in row or ()]
            shown.append((path, ", ".join(said) or "none of these"))
    return shown


def named_classes(names: Sequence[str | None], photos: Sequence[Photos]) -> dict[str, list[str]]:
    """The paths of each class's photographs, without empty classes; ZooError for photographs without a name,
    or fewer than two classes."""
    classes: dict[str, list[str]] = {}
    for number, (name, shots) in enumerate(zip(names, photos, strict=True), 1):
        if shots and not (name or "").strip():
            raise ZooError(f"Class {number} has photographs but no name: give it one.")
        if shots and name:
            classes.setdefault(name.strip(), []).extend(path for path, _ in shots)
    if len(classes) < 2:
        raise ZooError("Training needs at least two classes: give each a name and at least one photograph.")
    return classes


def train_on(clip: str, classes: dict[str, list[str]], folder: str) -> list[object]:
    """Train on three quarters of each class's photographs, and measure on the others; those that were taken
    together are on one side -> what to tell the visitor, the head, the button with its download, saved in a
    folder."""
    names = list(classes)
    began = time.monotonic()
    items = [Item(path, path, label) for label, paths in enumerate(classes.values()) for path in paths]
    parts = divide(group_own_images(items), HELD_OUT)  # visitors' images are not kept
    train = parts["train"]
    test = parts["test"]
    shots = [item.path for item in train], [names[item.label] for item in train]
    own = FewShotClassifier(clip, memory=False).fit(*shots)
    lines = [f"Trained on {len(train)} photographs in {time.monotonic() - began:.0f} s. *Classify* now uses your head."]
    if test:
        plain = FewShotClassifier(clip, "zero-shot", memory=False).fit(*shots)
        held_out = [item.path for item in test], [names[item.label] for item in test]
        lines.append(f"Of {len(test)} held-out photographs, these are named right:")
        independent = float(len({item.group or item.name for item in test}))
        for title, classifier in (("CLIP without training", plain), ("your head", own)):
            right = round(classifier.score(*held_out) * len(test))
            lines.append(f"- {title}: {Accuracy('', right, len(test), independent)}")
    else:
        lines.append(
            "Nothing is measured: of three photographs of a class that show different things, one is held out."
        )
    saved = own.save(Path(folder, "my_head"))
    packed = shutil.make_archive(str(saved), "zip", folder, saved.name)
    return ["\n\n".join(lines), own.model_, gr.update(value=packed, visible=True)]


def remove_old(folder: str) -> None:
    """Remove the folders in it that are older than uploads may be."""
    for head in Path(folder).iterdir():
        if time.time() - head.stat().st_mtime > UPLOAD_SECONDS:
            shutil.rmtree(head)


def digits() -> list[object]:
    """An example: handwritten digits, which CLIP without training cannot read."""
    items = load_split("digits").train
    filled: list[object] = []
    for digit in range(CLASSES):
        filled += [f"handwritten {digit}", [load_image(i.path) for i in items if i.label == digit][:16]]
    return filled


if __name__ == "__main__":
    main(program)
