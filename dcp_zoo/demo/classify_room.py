"""The Classify room: photographs, a head and class names; answers and attention."""

from collections.abc import Callable

import gradio as gr

from dcp_zoo.api.explain import attention_weights
from dcp_zoo.demo import MINIATURE_NOTE, VisitorLimits, pages, shared
from dcp_zoo.demo.events import NOTHING, REMOVE, changing, drop_zone, folder_button, on, removing, small_button
from dcp_zoo.demo.session import OWN_HEAD, Session, Sessions
from dcp_zoo.demo.shared import Photo, acquire, head_note
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import rejection_note
from dcp_zoo.model.head import Head
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import list_models

CLASS_TOKEN, PROMPTS = 0, -1  # values in the menu of tokens; 1 .. M are the individual prompts
ANSWERS, ATTENTION = "Answers", "Attention"


class ClassifyRoom:
    """The room's layout, created in a `gr.Blocks`. Its events change the session, which `redraw` then draws."""

    def __init__(self, sessions: Sessions, limits: VisitorLimits, head: str) -> None:
        self.sessions, self.heads = sessions, list(dict.fromkeys([head, *list_models(pretrained=True)]))
        self.changes: list[gr.events.Dependency] = []  # the events after which the room is drawn again
        with gr.Row():
            with gr.Column(scale=1, min_width=300, elem_classes="dcp-side"):
                self.status = gr.HTML(elem_classes="dcp-status")
                with gr.Column(elem_classes="dcp-photographs"):
                    self._photographs(limits.max_photos)
                with gr.Column(elem_classes="dcp-menus"):
                    self._menus()
            with gr.Column(scale=3, min_width=320, elem_classes="dcp-main"):
                self._tabs()

    def update(self, request: gr.Request) -> dict[gr.blocks.Block, object]:
        session = self.sessions.of(request)
        with acquire(session.source) as model:
            default = list(model.classnames)
            can_reject, passing = not model.cannot_reject and session.names is None, rejection_note(model.info)
            prompts = model.n_ctx if model.abilities.coupled else 0
        photos = [(photo.name, i) for i, photo in enumerate(session.photos)]
        tokens = [("class token", CLASS_TOKEN), ("mean of the prompts", PROMPTS)]
        tokens += [(f"prompt {i}", i) for i in range(1, prompts + 1)]
        return {
            self.head: gr.update(choices=[*self.heads, *([OWN_HEAD] if session.trained else [])], value=session.head),
            self.about: head_note(session.head, len(default)),
            self.names: "\n".join(session.names or default),
            self.reject: gr.update(visible=can_reject, value=session.reject, info=passing),
            self.attended: gr.update(choices=photos, value=0 if photos else None),
            self.token: gr.update(choices=tokens, value=CLASS_TOKEN),
        }

    def draw(self, request: gr.Request, shown: str, attended: int | None, token: int | None) -> dict[gr.HTML, str]:
        session = self.sessions.of(request)
        try:
            if shown == ANSWERS:
                drawn = draw_answers(session)
            else:
                drawn = draw_attention(session, attended, token or CLASS_TOKEN)
        except ZooError as error:
            drawn = pages.messages([str(error)], "status")
        return {self.views[shown]: drawn}

    def redraw(self, event: gr.events.Dependency) -> None:
        """Draw the controls and the open tab again after an event."""
        controls = [self.head, self.about, self.names, self.reject, self.attended, self.token]
        self._draw_after(on(event.then, self.update, None, controls, show_progress="hidden").then)

    def _draw_after(self, event: Callable) -> None:
        on(event, self.draw, [self.shown, self.attended, self.token], list(self.views.values()))

    def _change(
        self, event: Callable, change: Callable[..., list[str] | None], *inputs: gr.blocks.Block
    ) -> gr.events.Dependency:
        changed = on(event, changing(self.sessions, change), list(inputs), self.status)
        self.changes.append(changed)
        return changed

    def _photographs(self, limit: int) -> None:
        drop = drop_zone(label=f"Drop photographs or a folder (up to {limit})", height=150)
        with gr.Row():
            folder, clear = folder_button(), small_button("Remove all")
        with gr.Row():
            samples, others = small_button("Six photographs"), small_button("Unknown things")
        with gr.Accordion("Webcam", open=False):
            webcam = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam")
        added = self._change(drop.upload, Session.add_photos, drop)
        on(added.then, lambda: None, None, drop, show_progress="hidden")
        self._change(folder.upload, Session.add_photos, folder, gr.State(True))
        self._change(webcam.change, Session.add_photos, webcam)
        self._change(samples.click, Session.use_samples)
        self._change(others.click, Session.reject_samples)
        self._change(clear.click, Session.remove_all)

    def _menus(self) -> None:
        self.head = gr.Dropdown([], label="Model", interactive=True)
        self.about = gr.Markdown(elem_classes="dcp-note")
        self.names = gr.Textbox(label="Class names, one per line", lines=4, max_lines=8, max_length=20_000)
        with gr.Row():
            apply = small_button("Use these names", min_width=120, variant="primary")
            reset = small_button("The model's own", min_width=120)
        self.reject = gr.Checkbox(label='Answer "none of these"', visible=False)
        gr.Markdown(MINIATURE_NOTE, elem_classes="dcp-note")
        on(self.names.input, None, None, self.status, js=NOTHING)  # what was wrong may be right now
        self._change(self.head.input, Session.choose_head, self.head)
        self._change(apply.click, Session.set_names, self.names)
        self._change(reset.click, Session.reset_names)
        self._change(self.reject.input, Session.set_reject, self.reject)

    def _tabs(self) -> None:
        self.shown, self.views, tabs = gr.State(ANSWERS), dict[str, gr.HTML](), {}
        with gr.Tabs() as self.tabs:
            with gr.Tab(ANSWERS, id=ANSWERS) as tabs[ANSWERS]:
                self.views[ANSWERS] = gr.HTML(js_on_load=REMOVE)
            with gr.Tab(ATTENTION, id=ATTENTION) as tabs[ATTENTION]:
                with gr.Row():
                    self.attended = gr.Dropdown([], label="Photograph", interactive=True)
                    self.token = gr.Dropdown([], label="Query token", interactive=True)
                self.views[ATTENTION] = gr.HTML()
        removed = on(self.views[ANSWERS].delete, removing(self.sessions, Session.remove_photo), None, self.status)
        self.changes.append(removed)
        for name, tab in tabs.items():
            on(tab.select, lambda name=name: name, None, self.shown, show_progress="hidden")
        for event in (self.shown.change, self.attended.input, self.token.input):
            self._draw_after(event)


def draw_answers(session: Session) -> str:
    photos = _photos(session)
    with acquire(session.source, session.names) as model:
        head, clip = shared.head_answers(model, photos), shared.clip_answers(model, photos)
        asked = session.reject and session.names is None and not model.cannot_reject
        rejected = shared.rejected(model, photos) if asked else None
        title = METHODS[model.method].title
    return pages.answers(photos, head, clip, rejected, title)


def draw_attention(session: Session, index: int | None, token: int) -> str:
    photo = _photos(session, index)[0]
    with acquire(session.source) as model:
        _check_prompts(model)
        weights = attention_weights(model, shared.to_batch(model, [photo]))[0]  # (blocks, tokens, L)
        m, grid = model.config.n_ctx, model.encoder.vision_tower.grid
        cfg, first = model.pretrained_cfg, model.first_block
    weights = weights[:, [0, *range(-m, 0)]]  # class token and prompts, without the registers between them
    row = weights[:, 1:].mean(1) if token == PROMPTS else weights[:, min(token, m)]
    name = {CLASS_TOKEN: "class token", PROMPTS: "mean prompt"}.get(token, f"prompt {token}")
    return pages.attention(photo, row, name, grid, m, cfg, first)


def _photos(session: Session, first: int | None = None) -> list[Photo]:
    """The session's photographs, the chosen one first; a menu's choice may be older than they are."""
    if not session.photos:
        raise ZooError("No photographs yet: add some, or look at the samples.")
    i = min(first or 0, len(session.photos) - 1)
    return [session.photos[i], *session.photos[:i], *session.photos[i + 1 :]]


def _check_prompts(model: Head) -> None:
    if not model.abilities.coupled:
        raise ZooError(f"This tab shows the prompts of DCP, which a head of {METHODS[model.method].title} lacks.")
