"""The page itself, and the web application around it."""

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

A frozen CLIP and a few small trained *prompts* that ride in both of its towers and rewrite each other. Below, the two
answer side by side. Bring photographs of your own, name other classes, look inside, or train a head in a minute.
Nothing that you bring is kept."""
MINIATURE = "`dcp_mini` is a miniature for trying things out: expect mistakes that CLIP itself would not make."
LOOKS = "## Where it looks"
COMPANY = """## Alone, or in company

The plain method fuses the prompts over all images of a batch, so an image's answer depends on the images beside it.
A *calibrated* context, measured once on the training images, takes the batch's place, and the answer is the same in any
company. Everything else on this page is calibrated."""
TRAIN = f"""## Train your own

Two to {MAX_CLASSES} classes, each with a name and up to {MAX_SHOTS} photographs. Only the prompts and the module that
couples them are trained."""

# Enforced by the browser: nothing is fetched from, or sent to, any other machine.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # dark enough to read: contrast of 4.5 or more
    body_text_color_subdued="*neutral_500", button_primary_background_fill="*primary_600", color_accent="*primary_600"
)
# Gradio calls every drop zone the same; a screen reader is told what each is for.
NAME_DROP_ZONES = """() => {
    const name = () => document.querySelectorAll("button[aria-dropeffect]").forEach((zone) => {
        const label = zone.closest(".block")?.querySelector("[data-testid=block-label]")?.innerText.trim();
        if (label && zone.ariaLabel !== label) zone.ariaLabel = label;
    });
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""


class LocalOnly:
    """ASGI middleware that sends `POLICY` along."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def application(page: gr.Blocks) -> FastAPI:
    """The page as an ASGI application at its root, with no other routes than Gradio's own."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[Middleware(LocalOnly)])
    return gr.mount_gradio_app(
        app,
        page,
        path="",
        footer_links=[],
        max_file_size=MAX_FILE,
        show_error=False,  # of the program; what a visitor did wrong is said on the page
        ssr_mode=False,
        theme=THEME,
        js=NAME_DROP_ZONES,
        css_paths=HERE / "style.css",
    )


def build(head: str) -> gr.Blocks:
    """The page, which starts with this head; ZooError if it cannot be loaded."""
    trainable = list(dict.fromkeys(["dcp_mini", load(head).architecture]))  # those that need no download
    do = Handlers(head, get_upload_folder())
    with gr.Blocks(title="DCP demo", analytics_enabled=False, delete_cache=(60, 1800)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="dcp-side"):
                changes, controls = _controls(do)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Answers"):
                    gr.Markdown("## Answers")
                    views: list[tuple] = [(do.answers, [], gr.HTML())]
                with gr.Tab("Attention"):
                    views.append(_attention(do, controls))
                with gr.Tab("Batch"):
                    views.append(_company(do, controls))
                with gr.Tab("Train"):
                    changes.append(_training(do, trainable))
        outputs = [controls[name] for name in ("model", "head", "about", "names", "looking", "beside", "token")]
        for event in [*changes, gr.on(page.load, lambda: None, api_visibility="private")]:
            step = event.then(do.controls, None, outputs, api_visibility="private", show_progress="hidden")
            for draw, inputs, output in views:
                step = step.then(draw, inputs, output, api_visibility="private", show_progress="hidden")
        page.unload(do.close)
    return page


def _on(event: Callable, handler: Callable, inputs: Any = None, outputs: Any = None) -> Any:
    return event(handler, inputs, outputs, api_visibility="private", show_progress="minimal")


def _controls(do: Handlers) -> tuple[list, dict[str, Any]]:
    """Photographs, model, head and class names -> the events that change what is shown, and the components."""
    said = gr.HTML(elem_classes="dcp-said", render=False)
    with gr.Column():
        photographs = _photographs(do, said)
    with gr.Column(elem_classes="dcp-menus"):
        menus, controls = _menus(do, said)
    return photographs + menus, controls


def _photographs(do: Handlers, said: gr.HTML) -> list:
    gr.Markdown("## Photographs")
    said.render()
    drop = gr.File(
        label=f"Drop photographs here (up to {MAX_PHOTOS})", file_count="multiple", file_types=["image"], height=160
    )
    with gr.Row():
        folder = gr.UploadButton("A folder ...", file_count="directory", size="sm", min_width=80)
        samples = gr.Button("The samples", size="sm", min_width=80)
    with gr.Accordion("Webcam", open=False):
        webcam = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam")
    return [
        _on(drop.upload, do.add_photos, drop, said).then(lambda: None, None, drop, api_visibility="private"),
        _on(folder.upload, do.add_folder, folder, said),
        _on(webcam.change, do.add_photos, webcam, said),
        _on(samples.click, do.use_samples, None, said),
    ]


def _menus(do: Handlers, said: gr.HTML) -> tuple[list, dict[str, Any]]:
    gr.Markdown("## Model and classes")
    controls: dict[str, Any] = {
        "model": gr.Dropdown(model_names(), label="Model", interactive=True),
        "head": gr.Dropdown([], label="Head: what was trained", interactive=True),
        "about": gr.Markdown(),
        "names": gr.Textbox(label="Class names, with commas between them", lines=3, max_lines=6, max_length=20_000),
    }
    with gr.Row():
        apply = gr.Button("Use these names", variant="primary", size="sm", min_width=80)
        reset = gr.Button("The head's own", size="sm", min_width=80)
    gr.Markdown(MINIATURE)
    events = [
        _on(controls["model"].input, do.choose_model, controls["model"], said),
        _on(controls["head"].input, do.choose_head, controls["head"], said),
        _on(apply.click, do.set_names, controls["names"], said),
        _on(reset.click, do.reset_names, None, said),
    ]
    return events, controls


def _attention(do: Handlers, controls: dict[str, Any]) -> tuple:
    gr.Markdown(LOOKS)
    with gr.Row():
        controls["looking"] = gr.Dropdown([], label="Photograph", interactive=True)
        controls["token"] = gr.Dropdown([], label="Who looks", interactive=True)
    inputs, picture = [controls["looking"], controls["token"]], gr.HTML()
    for menu in inputs:
        _on(menu.input, do.attention, inputs, picture)
    return do.attention, inputs, picture


def _company(do: Handlers, controls: dict[str, Any]) -> tuple:
    gr.Markdown(COMPANY)
    controls["beside"] = gr.Dropdown([], label="Photograph", interactive=True)
    table = gr.HTML()
    _on(controls["beside"].input, do.company, controls["beside"], table)
    return do.company, controls["beside"], table


def _training(do: Handlers, models: list[str]) -> Any:
    """The form -> the event after which a new head is there."""
    gr.Markdown(TRAIN)
    said = gr.HTML(elem_classes="dcp-said")
    rows, names = [], []
    for number in range(MAX_CLASSES):
        with gr.Row(visible=number < 2) as row:
            names.append(_class_form(do, number, said))
        rows.append(row)
    more = gr.Button("One more class", size="sm")
    shown = gr.State(2)
    _on(
        more.click,
        lambda n: (min(n + 1, MAX_CLASSES), *(gr.update(visible=i <= n) for i in range(MAX_CLASSES))),
        shown,
        [shown, *rows],
    )
    with gr.Row():
        model = gr.Dropdown(models, label="Model", interactive=True)
        epochs = gr.Slider(10, 100, 40, step=10, label="Epochs")
    start = gr.Button("Train", variant="primary")
    progress = gr.HTML(elem_classes="dcp-said")
    curve = gr.LinePlot(x="step", y="loss", label="Training loss", height=220, visible=False)
    download = gr.DownloadButton("Download the head", visible=False)
    return _on(start.click, do.train, [model, epochs, *names], [progress, curve, download])


def _class_form(do: Handlers, number: int, said: gr.HTML) -> gr.Textbox:
    """One class: its name and its photographs."""
    with gr.Column(min_width=200):
        name = gr.Textbox(label=f"Name of class {number + 1}", max_length=200)
        clear = gr.Button(f"Remove photographs of class {number + 1}", size="sm")
    with gr.Column(min_width=200):
        drop = gr.File(
            label=f"Photographs of class {number + 1}", file_count="multiple", file_types=["image"], height=150
        )
        pictures = gr.HTML()
    which = gr.State(number)
    added = _on(drop.upload, do.add_shots, [which, drop], said)
    added = added.then(lambda: None, None, drop, api_visibility="private")
    for event in (added, _on(clear.click, do.clear_shots, which, said)):
        event.then(do.shots, which, pictures, api_visibility="private", show_progress="hidden")
    return name
