"""The Classify room: photographs, a head and class names; answers, attention and the effect of the batch."""

import re
from collections.abc import Callable
from typing import Any

import gradio as gr

from dcp_zoo.api.explain import attention_weights
from dcp_zoo.demo import VisitorLimits, answers, pages
from dcp_zoo.demo.events import NOTHING, REMOVE, action, on, view
from dcp_zoo.demo.heads import acquire, describe_head, load
from dcp_zoo.demo.photos import Photo, read_uploads
from dcp_zoo.demo.session import OWN_HEAD, Session, Sessions
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import list_pretrained

NO_PHOTOS = "No photographs yet: add some, or look at the samples."
CLASS_TOKEN, PROMPTS = 0, -1  # values in the menu of tokens; 1 .. M are the individual prompts
ANSWERS, EDITS, ATTENTION, BATCH = "Answers", "Edits", "Attention", "Batch"
BATCH_TEXT = """With the statistics of the **batch**, the plain method, the prompts are pooled over all images of a
batch, so an image's logits depend on the images next to it. The **stored** statistics were measured once on the
training images and take the place of the batch: logits no longer depend on other images. All other tabs use the stored
ones."""
EXPLAIN_MINI = (
    "The bundled dcp_mini is a miniature for trying things out: expect mistakes that a full CLIP would not make."
)


class ClassifyRoom:
    """The room's layout, to be created where it is wanted in a `gr.Blocks`, and its event handlers.

    A handler marked `action` changes the session and returns messages; `redraw` then draws the controls and the open
    tab from the session.

    Args:
        sessions: the open pages.
        limits: what one visitor may do.
        head: the initial head, first in the menu.
    """

    def __init__(self, sessions: Sessions, limits: VisitorLimits, head: str) -> None:
        self.sessions, self.limits = sessions, limits
        self.heads = list(dict.fromkeys([head, *list_pretrained()]))
        self.changes: list[Any] = []  # the events after which the room is drawn again
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_classes="dcp-side"):
                self.status = gr.HTML(elem_classes="dcp-status")
                with gr.Column(elem_classes="dcp-photographs"):
                    self._photographs()
                with gr.Column(elem_classes="dcp-menus"):
                    self._menus()
            with gr.Column(scale=3, min_width=320, elem_classes="dcp-main"):
                self._tabs()

    # ---------------------------------------------------------------------------------------------------------- actions

    @action
    def add_photos(self, session: Session, files: list[str] | str | None, folder: bool = False) -> list[str]:
        """Add uploaded files, or the webcam's, to the photographs; the first upload replaces the samples."""
        kept = [] if session.samples else session.photos
        paths = [files] if isinstance(files, str) else files or []
        photos, messages = read_uploads(paths, self.limits.photos - len(kept), folder)
        if photos:
            session.photos, session.samples = kept + photos, False
        return messages

    @action
    def remove_photo(self, session: Session, event: gr.EventData) -> None:
        if 0 <= event.index < len(session.photos):  # otherwise it is gone: a second click
            session.photos = [photo for i, photo in enumerate(session.photos) if i != event.index]
            session.samples = session.samples and bool(session.photos)

    @action
    def remove_all(self, session: Session) -> None:
        session.photos, session.samples = [], False

    @action
    def use_samples(self, session: Session) -> None:
        session.use_samples()

    @action
    def use_digits(self, session: Session) -> None:
        session.use_digits()

    @action
    def choose_head(self, session: Session, head: str) -> None:
        if head != OWN_HEAD:
            load(head)
        session.choose_head(head)

    @action
    def set_names(self, session: Session, text: str | None) -> None:
        """Set the class names, separated by commas or line breaks; an empty text restores the head's."""
        with acquire(session.source) as model:
            default = list(model.classnames)
        names = [name.strip() for name in re.split(r"[,\n]", text or "") if name.strip()] or default
        if names == (session.names or default):
            raise ZooError("The class names are the same as before: change some, then apply.")
        with acquire(session.source, names):  # raises for invalid names
            session.names_before, session.names = session.names or default, names if names != default else None

    @action
    def reset_names(self, session: Session) -> None:
        session.choose_head(session.head)

    @action
    def set_reject(self, session: Session, reject: bool) -> None:
        session.reject = reject

    # -------------------------------------------------------------------------------------------------------- rendering

    def update(self, request: gr.Request) -> dict[Any, Any]:
        """The controls, from the session."""
        session = self.sessions.of(request)
        with acquire(session.source) as model:
            default = list(model.classnames)
            can_reject = not model.cannot_reject and session.names is None
            prompts = model.config.n_ctx if model.method == "dcp" else 0
        photos = [(photo.name, i) for i, photo in enumerate(session.photos)]
        tokens = [("class token", CLASS_TOKEN), ("mean of the prompts", PROMPTS)]
        tokens += [(f"prompt {i}", i) for i in range(1, prompts + 1)]
        return {
            self.head: gr.update(choices=[*self.heads, *([OWN_HEAD] if session.trained else [])], value=session.head),
            self.about: describe_head(session.head, len(default)),
            self.names: ", ".join(session.names or default),
            self.reject: gr.update(visible=can_reject, value=session.reject),
            self.attended: gr.update(choices=photos, value=0 if photos else None),
            self.token: gr.update(choices=tokens, value=CLASS_TOKEN),
            self.measured: gr.update(choices=photos, value=0 if photos else None),
        }

    def draw(
        self, request: gr.Request, shown: str, attended: int | None, token: int | None, measured: int | None
    ) -> dict[gr.HTML, str]:
        """The open tab, from the session and the tabs' menus."""
        drawn = {
            ANSWERS: lambda: self.answers(request),
            EDITS: lambda: self.edits(request),
            ATTENTION: lambda: self.attention(request, attended, token),
            BATCH: lambda: self.batch_effect(request, measured),
        }
        return {self.views[shown]: drawn[shown]()}

    @view
    def answers(self, session: Session) -> str:
        photos = _photos(session)
        with acquire(session.source, session.names) as model:
            head, clip = answers.head_answers(model, photos), answers.clip_answers(model, photos)
            asked = session.reject and session.names is None and not model.cannot_reject
            rejected = answers.rejected(model, photos) if asked else None
            title = METHODS[model.method].title
        return pages.answers(photos, head, clip, rejected, title)

    @view
    def edits(self, session: Session) -> str:
        if session.names_before is None:
            raise ZooError("Edit the class names to see each logit before and after.")
        both: list[list] = []
        for names in (session.names_before, session.names):
            with acquire(session.source, names) as model:
                both.append(answers.head_answers(model, session.photos) if session.photos else [])
        return pages.edits(session.photos, [answers.changes(*pair) for pair in zip(*both, strict=True)])

    @view
    def attention(self, session: Session, index: int | None, token: int | None) -> str:
        photo, token = _photos(session, index)[0], token or CLASS_TOKEN
        with acquire(session.source) as model:
            _check_prompts(model)
            weights = attention_weights(model, answers.to_batch(model, [photo]))[0]  # (blocks, 1 + M, L)
            m, grid, cfg = model.config.n_ctx, model.vision_tower.grid, model.pretrained_cfg
        row = weights[:, 1:].mean(1) if token == PROMPTS else weights[:, min(token, m)]
        name = {CLASS_TOKEN: "class token", PROMPTS: "mean prompt"}.get(token, f"prompt {token}")
        return pages.attention(photo, row, name, grid, m, cfg)

    @view
    def batch_effect(self, session: Session, index: int | None) -> str:
        (photo, *others) = _photos(session, index)
        with acquire(session.source, session.names) as model:
            _check_prompts(model)
            names, rows = answers.batch_effects(model, photo, others)
        return pages.batch_effect(photo, names, rows)

    # ----------------------------------------------------------------------------------------------------------- layout

    def redraw(self, event: Any) -> None:
        """Draw the controls and the open tab again after an event."""
        controls = [self.head, self.about, self.names, self.reject, self.attended, self.token, self.measured]
        updated = on(event.then, self.update, None, controls, show_progress="hidden")
        self._draw_after(updated.then)

    def _draw_after(self, event: Callable) -> None:
        on(event, self.draw, [self.shown, self.attended, self.token, self.measured], list(self.views.values()))

    def _change(self, event: Callable, handler: Callable, *inputs: Any) -> Any:
        change = on(event, handler, list(inputs), self.status)
        self.changes.append(change)
        return change

    def _photographs(self) -> None:
        drop = gr.File(
            label=f"Drop photographs or a folder (up to {self.limits.photos})",
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
        added = self._change(drop.upload, self.add_photos, drop)
        on(added.then, lambda: None, None, drop, show_progress="hidden")
        self._change(folder.upload, self.add_photos, folder, gr.State(True))
        self._change(webcam.change, self.add_photos, webcam)
        self._change(samples.click, self.use_samples)
        self._change(digits.click, self.use_digits)
        self._change(clear.click, self.remove_all)

    def _menus(self) -> None:
        self.head = gr.Dropdown([], label="Model", interactive=True)
        self.about = gr.Markdown(elem_classes="dcp-note")
        self.names = gr.Textbox(label="Class names, separated by commas", lines=4, max_lines=8, max_length=20_000)
        with gr.Row():
            apply = gr.Button("Use these names", variant="primary", size="sm", min_width=120)
            reset = gr.Button("The model's own", size="sm", min_width=120)
        self.reject = gr.Checkbox(label='Answer "none of these"', visible=False)
        gr.Markdown(EXPLAIN_MINI, elem_classes="dcp-note")
        on(self.names.input, None, None, self.status, js=NOTHING)  # what was wrong may be right now
        self._change(self.head.input, self.choose_head, self.head)
        self._change(apply.click, self.set_names, self.names)
        self._change(reset.click, self.reset_names)
        self._change(self.reject.input, self.set_reject, self.reject)

    def _tabs(self) -> None:
        self.shown, self.views, tabs = gr.State(ANSWERS), dict[str, gr.HTML](), {}
        with gr.Tabs() as self.tabs:
            with gr.Tab(ANSWERS, id=ANSWERS) as tabs[ANSWERS]:
                self.views[ANSWERS] = gr.HTML(js_on_load=REMOVE)
            with gr.Tab(EDITS) as tabs[EDITS]:
                self.views[EDITS] = gr.HTML()
            with gr.Tab(ATTENTION) as tabs[ATTENTION]:
                with gr.Row():
                    self.attended = gr.Dropdown([], label="Photograph", interactive=True)
                    self.token = gr.Dropdown([], label="Query token", interactive=True)
                self.views[ATTENTION] = gr.HTML()
            with gr.Tab(BATCH) as tabs[BATCH]:
                gr.Markdown(BATCH_TEXT)
                self.measured = gr.Dropdown([], label="Photograph", interactive=True)
                self.views[BATCH] = gr.HTML()
        self._change(self.views[ANSWERS].delete, self.remove_photo)
        for name, tab in tabs.items():
            on(tab.select, lambda name=name: name, None, self.shown, show_progress="hidden")
        for event in (self.shown.change, self.attended.input, self.token.input, self.measured.input):
            self._draw_after(event)


def _photos(session: Session, first: int | None = None) -> list[Photo]:
    """The session's photographs, the chosen one first; a menu's choice may be older than they are."""
    if not session.photos:
        raise ZooError(NO_PHOTOS)
    i = min(first or 0, len(session.photos) - 1)
    return [session.photos[i], *session.photos[:i], *session.photos[i + 1 :]]


def _check_prompts(model: Any) -> None:
    if model.method != "dcp":
        raise ZooError(f"This tab looks at the prompts of DCP, which a head of {METHODS[model.method].title} lacks.")
