"""The Classify page: photographs, a head and class names; answers, attention and the effect of the batch."""

import re
from collections.abc import Callable
from typing import Any

import gradio as gr

from dcp_zoo.api.explain import attention_weights
from dcp_zoo.demo import Limits, answers, pages
from dcp_zoo.demo.events import NOTHING, REMOVE, action, on, view
from dcp_zoo.demo.heads import acquire, describe, load
from dcp_zoo.demo.photos import images_of_folder, read_uploads
from dcp_zoo.demo.session import OWN_HEAD, Session, Sessions
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import list_pretrained

DCP = "dcp"  # the method whose prompts are shown
NO_PHOTOS = "No photographs yet: add some, or look at the samples."
CLASS_TOKEN, PROMPTS = 0, -1  # values in the menu of tokens; 1 .. M are the individual prompts
ANSWERS, ATTENTION, BATCH, EDITS = "Answers", "Attention", "Batch", "Edits"
BATCH_TEXT = """Context **batch**, the plain method, fuses the prompts over all images of a batch, so an image's logits
depend on the images next to it. Context **calibrated** was measured once on the training images and replaces the batch:
logits no longer depend on other images. All other tabs are calibrated."""
EXPLAIN_MINI = (
    "The bundled dcp_mini is a miniature for trying things out: expect mistakes that a full CLIP would not make."
)


class Handlers:
    """The event handlers of the page. Those that change the session return messages, the others render views.

    Args:
        sessions: the open pages.
        limits: what one visitor may do.
        heads: the names in the menu.
    """

    def __init__(self, sessions: Sessions, limits: Limits, heads: list[str]) -> None:
        self.sessions, self.limits, self.heads = sessions, limits, heads

    # ---------------------------------------------------------------------------------------------------------- actions

    @action
    def add_photos(self, files: list[str] | str | None, request: gr.Request) -> list[str]:
        """Add uploaded files, or the webcam's, to the photographs; the first upload replaces the samples."""
        return self._add([files] if isinstance(files, str) else files or [], request)

    def _add(self, paths: list[str], request: gr.Request) -> list[str]:
        session = self.sessions.of(request)
        photos, messages = read_uploads(paths, self.limits.photos - (0 if session.samples else len(session.photos)))
        if photos:
            session.photos = photos if session.samples else session.photos + photos
            session.samples = False
        return messages

    @action
    def add_folder(self, files: list[str] | None, request: gr.Request) -> list[str]:
        """Add the images in a folder."""
        return self._add(images_of_folder(files or []), request)

    @action
    def remove_photo(self, event: gr.EventData, request: gr.Request) -> None:
        session = self.sessions.of(request)
        if 0 <= event.index < len(session.photos):  # otherwise it is gone: a second click
            session.photos = [photo for i, photo in enumerate(session.photos) if i != event.index]
            session.samples = session.samples and bool(session.photos)

    @action
    def remove_all(self, request: gr.Request) -> None:
        session = self.sessions.of(request)
        session.photos, session.samples = [], False

    @action
    def use_samples(self, request: gr.Request) -> None:
        self.sessions.of(request).use_samples()

    @action
    def use_digits(self, request: gr.Request) -> None:
        self.sessions.of(request).use_digits()

    @action
    def choose_head(self, head: str, request: gr.Request) -> None:
        session = self.sessions.of(request)
        if head != OWN_HEAD:
            load(head)
        session.choose_head(head)

    @action
    def set_names(self, text: str | None, request: gr.Request) -> None:
        """Set the class names, separated by commas or line breaks; an empty text restores the head's."""
        session = self.sessions.of(request)
        with acquire(session.source) as model:
            default = list(model.classnames)
        names = [name.strip() for name in re.split(r"[,\n]", text or "") if name.strip()] or default
        if names == (session.names or default):
            raise ZooError("The class names are the same as before: change some, then apply.")
        with acquire(session.source, names):  # raises for invalid names
            session.names_before, session.names = session.names or default, names if names != default else None

    @action
    def reset_names(self, request: gr.Request) -> None:
        session = self.sessions.of(request)
        session.choose_head(session.head)

    @action
    def set_reject(self, reject: bool, request: gr.Request) -> None:
        self.sessions.of(request).reject = reject

    # -------------------------------------------------------------------------------------------------------- rendering

    def controls(self, request: gr.Request) -> dict[str, Any]:
        """Updates of the components in `layout`, by name, from the session."""
        session = self.sessions.of(request)
        heads = [*self.heads, OWN_HEAD] if session.trained else self.heads
        with acquire(session.source) as model:
            default = list(model.classnames)
            can_reject = answers.can_reject(model) and session.names is None
            tokens = model.config.n_ctx if model.method == DCP else 0
        photos = [(photo.name, i) for i, photo in enumerate(session.photos)]
        choices = [("class token", CLASS_TOKEN), ("mean of the prompts", PROMPTS)]
        choices += [(f"prompt {i}", i) for i in range(1, tokens + 1)]
        return {
            "head": gr.update(choices=heads, value=session.head),
            "about": describe(session.head, len(default)),
            "names": ", ".join(session.names or default),
            "reject": gr.update(visible=can_reject, value=session.reject),
            "attention": gr.update(choices=photos, value=0 if photos else None),
            "batch": gr.update(choices=photos, value=0 if photos else None),
            "token": gr.update(choices=choices, value=CLASS_TOKEN),
        }

    @view
    def answers(self, request: gr.Request) -> str:
        session = self.sessions.of(request)
        photos = session.photos
        if not photos:
            raise ZooError(NO_PHOTOS)
        with acquire(session.source, session.names) as model:
            head = answers.classify(model, photos)
            images = [photo.image for photo in photos]
            zero_shot = answers.zero_shot(model, images) if answers.can_compare(model) else None
            asked = session.reject and session.names is None and answers.can_reject(model)
            rejected = answers.rejected(model, photos) if asked else None
            title = METHODS[model.method].title
        return pages.answers(photos, head, zero_shot, rejected, title)

    @view
    def edits(self, request: gr.Request) -> str:
        session = self.sessions.of(request)
        if session.names_before is None:
            raise ZooError("Edit the class names to see each logit before and after.")
        both: list[list] = []
        for names in (session.names_before, session.names):
            with acquire(session.source, names) as model:
                both.append(answers.classify(model, session.photos) if session.photos else [])
        return pages.edits(session.photos, [answers.changes(*pair) for pair in zip(*both, strict=True)])

    @view
    def attention(self, index: int | None, token: int | None, request: gr.Request) -> str:
        session, token = self.sessions.of(request), token or CLASS_TOKEN
        photo = session.photos[_chosen(session, index)]
        with acquire(session.source) as model:
            _check_prompts(model)
            weights = attention_weights(model, answers.of_photos(model, [photo]))[0]  # (blocks, 1 + M, L)
            m, grid, cfg = model.config.n_ctx, model.vision_tower.grid, model.pretrained_cfg
        row = weights[:, 1:].mean(1) if token == PROMPTS else weights[:, min(token, m)]
        name = {CLASS_TOKEN: "class token", PROMPTS: "mean prompt"}.get(token, f"prompt {token}")
        return pages.attention(photo, row, name, grid, m, cfg)

    @view
    def batch_effect(self, index: int | None, request: gr.Request) -> str:
        session = self.sessions.of(request)
        index = _chosen(session, index)
        with acquire(session.source, session.names) as model:
            _check_prompts(model)
            names, rows = answers.batch_effects(model, session.photos, index)
        return pages.batch_effect(session.photos[index], names, rows)


def _chosen(session: Session, index: int | None) -> int:
    """The index of the photograph in a menu, whose choice may be older than the photographs."""
    if not session.photos:
        raise ZooError(NO_PHOTOS)
    return min(index or 0, len(session.photos) - 1)


def _check_prompts(model: Any) -> None:
    if model.method != DCP:
        raise ZooError(f"This tab looks at the prompts of DCP, which a head of {METHODS[model.method].title} lacks.")


# --------------------------------------------------------------------------------------------------------------- layout


class Room:
    """The layout of the page; `redraw` connects an event to everything that depends on the session.

    To be created where the page is wanted in a `gr.Blocks`.
    """

    def __init__(self, handlers: Handlers) -> None:
        self.handlers, self.controls = handlers, dict[str, Any]()
        self.changes: list[Any] = []
        self.views: dict[str, tuple[Callable[..., str], list, gr.HTML]] = {}  # what draws a tab, its inputs and output
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_classes="dcp-side"):
                self.status = gr.HTML(elem_classes="dcp-status")
                with gr.Column(elem_classes="dcp-photographs"):
                    self._photographs()
                with gr.Column(elem_classes="dcp-menus"):
                    self._menus()
            with gr.Column(scale=3, min_width=320, elem_classes="dcp-main"):
                self._tabs()

    def _change(self, event: Callable, handler: Callable, inputs: Any = None) -> Any:
        change = on(event, handler, inputs, self.status)
        self.changes.append(change)
        return change

    def redraw(self, event: Any) -> None:
        """Draw the controls and the open tab again after an event."""
        names = list(self.controls)
        controls = self.handlers.controls

        def update(request: gr.Request) -> list[Any]:
            values = controls(request)
            return [values[name] for name in names]

        def draw_shown(shown: str, request: gr.Request, *values: Any) -> list[Any]:
            left = iter(values)
            drawn = []
            for name, (draw, menus, _) in self.views.items():
                own = [next(left) for _ in menus]
                drawn.append(draw(*own, request) if name == shown else gr.skip())
            return drawn

        step = on(event.then, update, None, list(self.controls.values()), show_progress="hidden")
        menus = [menu for _, menus, _ in self.views.values() for menu in menus]
        on(step.then, draw_shown, [self.shown, *menus], [output for *_, output in self.views.values()])

    def show_answers(self, event: Any) -> None:
        """Open the tab of answers after an event."""
        shown = on(event.then, lambda: (gr.update(selected=ANSWERS), ANSWERS), None, [self.tabs, self.shown])
        draw, inputs, output = self.views[ANSWERS]
        on(shown.then, draw, inputs, output)

    def _photographs(self) -> None:
        handlers, limit = self.handlers, self.handlers.limits.photos
        drop = gr.File(
            label=f"Drop photographs or a folder (up to {limit})",
            file_count="multiple",
            file_types=["image"],
            height=150,
        )
        with gr.Row():
            folder = gr.UploadButton("Folder ...", file_count="directory", size="sm", min_width=100)
            clear = gr.Button("Remove all", size="sm", min_width=100)
        with gr.Row():
            samples = gr.Button("Six samples", size="sm", min_width=100)
            digits = gr.Button("Ten digits", size="sm", min_width=100)
        with gr.Accordion("Webcam", open=False):
            webcam = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam")
        added = self._change(drop.upload, handlers.add_photos, drop)
        on(added.then, lambda: None, None, drop, show_progress="hidden")
        self._change(folder.upload, handlers.add_folder, folder)
        self._change(webcam.change, handlers.add_photos, webcam)
        self._change(samples.click, handlers.use_samples)
        self._change(digits.click, handlers.use_digits)
        self._change(clear.click, handlers.remove_all)

    def _menus(self) -> None:
        handlers, controls = self.handlers, self.controls
        controls["head"] = gr.Dropdown([], label="Model", interactive=True)
        controls["about"] = gr.Markdown(elem_classes="dcp-note")
        controls["names"] = gr.Textbox(
            label="Class names, separated by commas", lines=4, max_lines=8, max_length=20_000
        )
        with gr.Row():
            apply = gr.Button("Use these names", variant="primary", size="sm", min_width=120)
            reset = gr.Button("The model's own", size="sm", min_width=120)
        controls["reject"] = gr.Checkbox(label='Answer "none of these"', visible=False)
        gr.Markdown(EXPLAIN_MINI, elem_classes="dcp-note")
        on(controls["names"].input, None, None, self.status, js=NOTHING)  # what was wrong may be right now
        self._change(controls["head"].input, handlers.choose_head, controls["head"])
        self._change(apply.click, handlers.set_names, controls["names"])
        self._change(reset.click, handlers.reset_names)
        self._change(controls["reject"].input, handlers.set_reject, controls["reject"])

    def _tabs(self) -> None:
        handlers, controls = self.handlers, self.controls
        self.shown, tabs = gr.State(ANSWERS), {}
        with gr.Tabs() as self.tabs:
            with gr.Tab(ANSWERS, id=ANSWERS) as tabs[ANSWERS]:
                cards = gr.HTML(js_on_load=REMOVE)
            with gr.Tab(EDITS) as tabs[EDITS]:
                self.views |= {ANSWERS: (handlers.answers, [], cards), EDITS: (handlers.edits, [], gr.HTML())}
            with gr.Tab(ATTENTION) as tabs[ATTENTION]:
                with gr.Row():
                    controls["attention"] = gr.Dropdown([], label="Photograph", interactive=True)
                    controls["token"] = gr.Dropdown([], label="Query token", interactive=True)
                menus = [controls["attention"], controls["token"]]
                self.views[ATTENTION] = (handlers.attention, menus, gr.HTML())
            with gr.Tab(BATCH) as tabs[BATCH]:
                gr.Markdown(BATCH_TEXT)
                controls["batch"] = gr.Dropdown([], label="Photograph", interactive=True)
                self.views[BATCH] = (handlers.batch_effect, [controls["batch"]], gr.HTML())
        self._change(cards.delete, handlers.remove_photo)
        for name, (draw, inputs, output) in self.views.items():
            on(tabs[name].select, if_new(name, draw), [self.shown, *inputs], [self.shown, output])
            for menu in inputs:
                on(menu.input, draw, inputs, output)


def if_new(name: str, draw: Callable[..., str]) -> Callable[..., Any]:
    """A handler that draws the tab `name` unless it is shown: Gradio also selects the first one at the start."""

    def selected(shown: str, request: gr.Request, *inputs: Any) -> Any:
        return (gr.skip(), gr.skip()) if shown == name else (name, draw(*inputs, request))

    return selected


def menu_of_heads(initial: str) -> list[str]:
    """The heads that can be loaded, and the initial one."""
    return list(dict.fromkeys([initial, *list_pretrained()]))
