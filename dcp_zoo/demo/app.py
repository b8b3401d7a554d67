"""The page, and the web application that serves it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

from dcp_zoo.demo.handlers import Handlers
from dcp_zoo.demo.heads import load, model_names
from dcp_zoo.demo.photos import MAX_FILE
from dcp_zoo.demo.session import MAX_CLASSES, MAX_PHOTOS, MAX_SHOTS

HERE = Path(__file__).parent
INTRODUCTION = """# DCP: image classifiers from a few photographs

A frozen CLIP with a few small trained *prompts*, inserted into both of its towers, where they rewrite each other. This
page shows it next to CLIP without training. Upload photographs, edit the class names, look inside, or train a head in a
minute. Nothing that you upload is kept."""
MINIATURE = "`dcp_mini` is a miniature for trying things out: expect mistakes that CLIP itself would not make."
ATTENTION = "## Attention"
BATCH = """## Effect of the batch

The plain method fuses the prompts over all images of a batch, so an image's logits depend on the images next to it.
A *calibrated* context, measured once on the training images, replaces the batch and makes the logits independent of the
other images. Everything else on this page is calibrated."""
TRAIN = f"""## Train your own

Two to {MAX_CLASSES} classes, each with a name and up to {MAX_SHOTS} photographs. Only the prompts and the module that
couples them are trained."""

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
# Gradio gives all drop zones the same accessible name; this sets each one's from its label.
NAME_DROP_ZONES = """() => {
    const name = () => document.querySelectorAll("button[aria-dropeffect]").forEach((zone) => {
        const label = zone.closest(".block")?.querySelector("[data-testid=block-label]")?.innerText.trim();
        if (label && zone.ariaLabel !== label) zone.ariaLabel = label;
    });
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""


class LocalOnly:
    """ASGI middleware that adds `POLICY` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def application(page: gr.Blocks) -> FastAPI:
    """The page as an ASGI application at the root, with no routes other than Gradio's."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[Middleware(LocalOnly)])
    return gr.mount_gradio_app(
        app,
        page,
        path="",
        footer_links=[],
        max_file_size=MAX_FILE,
        show_error=False,  # of the program; bad input is explained on the page
        ssr_mode=False,
        theme=THEME,
        js=NAME_DROP_ZONES,
        css_paths=HERE / "style.css",
    )


def build(head: str) -> gr.Blocks:
    """The page with its initial head; ZooError if that cannot be loaded."""
    trainable = list(dict.fromkeys(["dcp_mini", load(head).architecture]))  # these need no download
    handlers = Handlers(head, get_upload_folder())
    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(60, 1800)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="dcp-side"):
                changes, controls = _controls(handlers)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Answers"):
                    gr.Markdown("## Answers")
                    views: list[tuple] = [(handlers.answers, [], gr.HTML())]
                with gr.Tab("Attention"):
                    views.append(_attention(handlers, controls))
                with gr.Tab("Batch"):
                    views.append(_batch_effect(handlers, controls))
                with gr.Tab("Train"):
                    changes.append(_training(handlers, trainable))
        outputs = [controls[name] for name in ("model", "head", "about", "names", "attention", "batch", "token")]
        for event in [*changes, gr.on(page.load, lambda: None, api_visibility="private")]:
            step = event.then(handlers.controls, None, outputs, api_visibility="private", show_progress="hidden")
            for draw, inputs, output in views:
                step = step.then(draw, inputs, output, api_visibility="private", show_progress="hidden")
        page.unload(handlers.close)
    return page


def _on(event: Callable, handler: Callable, inputs: Any = None, outputs: Any = None) -> Any:
    return event(handler, inputs, outputs, api_visibility="private", show_progress="minimal")


def _controls(handlers: Handlers) -> tuple[list, dict[str, Any]]:
    """Photographs, model, head and class names -> the events that change the views, and the components."""
    status = gr.HTML(elem_classes="dcp-status", render=False)
    with gr.Column():
        photographs = _photographs(handlers, status)
    with gr.Column(elem_classes="dcp-menus"):
        menus, controls = _menus(handlers, status)
    return photographs + menus, controls


def _photographs(handlers: Handlers, status: gr.HTML) -> list:
    gr.Markdown("## Photographs")
    status.render()
    drop = gr.File(
        label=f"Drop photographs here (up to {MAX_PHOTOS})", file_count="multiple", file_types=["image"], height=160
    )
    with gr.Row():
        folder = gr.UploadButton("Folder ...", file_count="directory", size="sm", min_width=80)
        samples = gr.Button("Samples", size="sm", min_width=80)
    with gr.Accordion("Webcam", open=False):
        webcam = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam")
    return [
        _on(drop.upload, handlers.add_photos, drop, status).then(lambda: None, None, drop, api_visibility="private"),
        _on(folder.upload, handlers.add_folder, folder, status),
        _on(webcam.change, handlers.add_photos, webcam, status),
        _on(samples.click, handlers.use_samples, None, status),
    ]


def _menus(handlers: Handlers, status: gr.HTML) -> tuple[list, dict[str, Any]]:
    gr.Markdown("## Model and classes")
    controls: dict[str, Any] = {
        "model": gr.Dropdown(model_names(), label="Model", interactive=True),
        "head": gr.Dropdown([], label="Head", interactive=True),
        "about": gr.Markdown(),
        "names": gr.Textbox(label="Class names, separated by commas", lines=3, max_lines=6, max_length=20_000),
    }
    with gr.Row():
        apply = gr.Button("Use these names", variant="primary", size="sm", min_width=80)
        reset = gr.Button("Reset to the head's", size="sm", min_width=80)
    gr.Markdown(MINIATURE)
    events = [
        _on(controls["model"].input, handlers.choose_model, controls["model"], status),
        _on(controls["head"].input, handlers.choose_head, controls["head"], status),
        _on(apply.click, handlers.set_names, controls["names"], status),
        _on(reset.click, handlers.reset_names, None, status),
    ]
    return events, controls


def _attention(handlers: Handlers, controls: dict[str, Any]) -> tuple:
    gr.Markdown(ATTENTION)
    with gr.Row():
        controls["attention"] = gr.Dropdown([], label="Photograph", interactive=True)
        controls["token"] = gr.Dropdown([], label="Attending token", interactive=True)
    inputs, picture = [controls["attention"], controls["token"]], gr.HTML()
    for menu in inputs:
        _on(menu.input, handlers.attention, inputs, picture)
    return handlers.attention, inputs, picture


def _batch_effect(handlers: Handlers, controls: dict[str, Any]) -> tuple:
    gr.Markdown(BATCH)
    controls["batch"] = gr.Dropdown([], label="Photograph", interactive=True)
    table = gr.HTML()
    _on(controls["batch"].input, handlers.batch_effect, controls["batch"], table)
    return handlers.batch_effect, controls["batch"], table


def _training(handlers: Handlers, models: list[str]) -> Any:
    """The form -> the event after which a new head is available."""
    gr.Markdown(TRAIN)
    status = gr.HTML(elem_classes="dcp-status")
    rows, names = [], []
    for number in range(MAX_CLASSES):
        with gr.Row(visible=number < 2) as row:
            names.append(_class_form(handlers, number, status))
        rows.append(row)
    more = gr.Button("Add a class", size="sm")
    visible = gr.State(2)
    _on(
        more.click,
        lambda n: (min(n + 1, MAX_CLASSES), *(gr.update(visible=i <= n) for i in range(MAX_CLASSES))),
        visible,
        [visible, *rows],
    )
    with gr.Row():
        model = gr.Dropdown(models, label="Model", interactive=True)
        epochs = gr.Slider(10, 100, 40, step=10, label="Epochs")
    start = gr.Button("Train", variant="primary")
    progress = gr.HTML(elem_classes="dcp-status")
    curve = gr.LinePlot(x="step", y="loss", label="Training loss", height=220, visible=False)
    download = gr.DownloadButton("Download the head", visible=False)
    return _on(start.click, handlers.train, [model, epochs, *names], [progress, curve, download])


def _class_form(handlers: Handlers, number: int, status: gr.HTML) -> gr.Textbox:
    """The form of one class: its name and its photographs."""
    with gr.Column(min_width=200):
        name = gr.Textbox(label=f"Name of class {number + 1}", max_length=200)
        clear = gr.Button(f"Remove photographs of class {number + 1}", size="sm")
    with gr.Column(min_width=200):
        drop = gr.File(
            label=f"Photographs of class {number + 1}", file_count="multiple", file_types=["image"], height=150
        )
        pictures = gr.HTML()
    which = gr.State(number)
    added = _on(drop.upload, handlers.add_shots, [which, drop], status)
    added = added.then(lambda: None, None, drop, api_visibility="private")
    for event in (added, _on(clear.click, handlers.clear_shots, which, status)):
        event.then(handlers.shots, which, pictures, api_visibility="private", show_progress="hidden")
    return name
