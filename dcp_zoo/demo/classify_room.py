"""The Classify room: photographs, a head and class names; answers."""

from collections.abc import Callable

import gradio as gr

from dcp_zoo.demo import MINIATURE_NOTE, VisitorLimits, pages, shared
from dcp_zoo.demo.pages import NOTHING, REMOVE, changing, drop_zone, on, removing, small_button
from dcp_zoo.demo.session import OWN_HEAD, Session, Sessions
from dcp_zoo.demo.shared import acquire, head_note
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import rejection_note
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import list_models


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
                self.answers = gr.HTML(js_on_load=REMOVE)
        removed = on(self.answers.delete, removing(self.sessions, Session.remove_photo), None, self.status)
        self.changes.append(removed)

    def update(self, request: gr.Request) -> dict[gr.blocks.Block, object]:
        session = self.sessions.of(request)
        with acquire(session.source) as model:
            default = list(model.classnames)
            can_reject, passing = not model.cannot_reject and session.names is None, rejection_note(model.info)
        return {
            self.head: gr.update(choices=[*self.heads, *([OWN_HEAD] if session.trained else [])], value=session.head),
            self.about: head_note(session.head, len(default)),
            self.names: "\n".join(session.names or default),
            self.reject: gr.update(visible=can_reject, value=session.reject, info=passing),
        }

    def draw(self, request: gr.Request) -> str:
        try:
            return draw_answers(self.sessions.of(request))
        except ZooError as error:
            return pages.messages([str(error)], "status")

    def redraw(self, event: gr.events.Dependency) -> None:
        """Draw the controls and the answers again after an event."""
        controls = [self.head, self.about, self.names, self.reject]
        updated = on(event.then, self.update, None, controls, show_progress="hidden")
        on(updated.then, self.draw, None, self.answers)

    def _change(
        self, event: Callable, change: Callable[..., list[str] | None], *inputs: gr.blocks.Block
    ) -> gr.events.Dependency:
        changed = on(event, changing(self.sessions, change), list(inputs), self.status)
        self.changes.append(changed)
        return changed

    def _photographs(self, limit: int) -> None:
        drop = drop_zone(label=f"Drop photographs or a folder (up to {limit})", height=150)
        with gr.Row():
            samples, others = small_button("Six photographs"), small_button("Unknown things")
            clear = small_button("Remove all")
        with gr.Accordion("Webcam", open=False):
            webcam = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam")
        added = self._change(drop.upload, Session.add_photos, drop)
        on(added.then, lambda: None, None, drop, show_progress="hidden")
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


def draw_answers(session: Session) -> str:
    if not session.photos:
        raise ZooError("No photographs yet: add some, or look at the samples.")
    with acquire(session.source, session.names) as model:
        head, clip = shared.head_answers(model, session.photos), shared.clip_answers(model, session.photos)
        asked = session.reject and session.names is None and not model.cannot_reject
        rejected = shared.rejected(model, session.photos) if asked else None
        title = METHODS[model.method].title
    return pages.answers(session.photos, head, clip, rejected, title)
