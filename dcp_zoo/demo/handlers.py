"""Event handlers of the page: they convert Gradio's values and call the other modules.

Methods that change the session are actions, which return messages for the visitor as HTML. The others render views.
"""

import re
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from dcp_zoo.data.readers import SUFFIXES
from dcp_zoo.demo import answers, pages, training
from dcp_zoo.demo.heads import acquire, describe, head_choices, load
from dcp_zoo.demo.photos import read_uploads, sample_photos
from dcp_zoo.demo.session import MAX_PHOTOS, MAX_SHOTS, OWN_HEAD, Session, Sessions
from dcp_zoo.errors import ZooError
from dcp_zoo.insight.attention import attention_weights
from dcp_zoo.zoo.factory import create_model

CLASS_TOKEN, PROMPTS = 0, -1  # values in the menu of tokens; 1 .. M are the individual prompts


def action(method: Callable[..., Any]) -> Callable[..., str]:
    """Convert the method's messages, or the ZooError it raises, to HTML for the visitor."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> str:
        try:
            return pages.messages(method(*args, **kwargs) or [])
        except ZooError as error:
            return pages.messages([str(error)])

    return call


class Handlers:
    """The page's event handlers.

    Args:
        head: the initial head of a new page.
        cache: the folder of files that Gradio serves.
    """

    def __init__(self, head: str, cache: str) -> None:
        self.initial_head = head
        self.cache = cache
        Path(cache).mkdir(parents=True, exist_ok=True)
        self.sessions = Sessions(lambda: Session(head, load(head).architecture))

    def session(self, request: gr.Request) -> Session:
        return self.sessions.of(str(request.session_hash))

    def close(self, request: gr.Request) -> None:
        """Called when the visitor leaves the page."""
        self.sessions.close(str(request.session_hash))

    # ---------------------------------------------------------------------------------------------------------- actions

    @action
    def add_photos(self, files: list[str] | str | None, request: gr.Request) -> list[str]:
        """Add uploaded files, or the webcam's, to the photographs; the first upload replaces the samples."""
        session = self.session(request)
        paths = [files] if isinstance(files, str) else files or []
        limit = MAX_PHOTOS - (0 if session.samples else len(session.photos))
        photos, messages = read_uploads(paths, limit)
        if photos:
            session.photos = photos if session.samples else session.photos + photos
            session.samples = False
        return messages

    @action
    def add_folder(self, files: list[str] | None, request: gr.Request) -> list[str]:
        """Add the images in a folder."""
        images = sorted(path for path in files or [] if Path(path).suffix.lower() in SUFFIXES)
        for path in set(files or []).difference(images):
            Path(path).unlink(missing_ok=True)
        if not images:
            raise ZooError(f"No images in this folder: their names must end in {', '.join(SUFFIXES)}.")
        return self.add_photos.__wrapped__(self, images, request)  # type: ignore[attr-defined]

    @action
    def use_samples(self, request: gr.Request) -> None:
        session = self.session(request)
        session.photos, session.samples = sample_photos(), True

    @action
    def choose_model(self, model: str, request: gr.Request) -> list[str] | None:
        """List another model's heads in the menu, and choose its first trained one."""
        session = self.session(request)
        session.model = model
        label, name = head_choices(model)[0]
        if "planned" in label:
            return [f"No head of {model} is trained yet: the menu lists the planned ones. Still using {session.head}."]
        session.choose_head(name)
        return None

    @action
    def choose_head(self, head: str, request: gr.Request) -> None:
        session = self.session(request)
        if head != OWN_HEAD:
            load(head)
        session.choose_head(head)

    @action
    def set_names(self, text: str | None, request: gr.Request) -> None:
        """Set the class names, separated by commas or line breaks; an empty text restores the head's."""
        session = self.session(request)
        with acquire(session.source) as model:
            default = list(model.classnames)
        names = [name.strip() for name in re.split(r"[,\n]", text or "") if name.strip()] or default
        if names == (session.names or default):
            raise ZooError("The class names are the same as before: change some, then apply.")
        with acquire(session.source, names):  # raises for invalid names
            session.names_before, session.names = session.names or default, names

    @action
    def reset_names(self, request: gr.Request) -> None:
        session = self.session(request)
        session.choose_head(session.head)

    @action
    def add_shots(self, number: int, files: list[str] | None, request: gr.Request) -> list[str]:
        """Add training photographs of class `number`."""
        shots = self.session(request).shots[number]
        photos, messages = read_uploads(files or [], MAX_SHOTS - len(shots))
        shots += photos
        return messages

    @action
    def clear_shots(self, number: int, request: gr.Request) -> None:
        self.session(request).shots[number].clear()

    def train(self, model: str, epochs: int, request: gr.Request, *names: str | None) -> Iterator[tuple]:
        """Train on the form's classes; yields (messages, loss curve, download button) repeatedly while it runs."""
        session = self.session(request)
        try:
            classes = training.check_classes(list(zip(names, session.shots, strict=True)))
            files = TemporaryDirectory(dir=self.cache, prefix="head-")
            folder = Path(files.name) / "my_head"
            for log in training.fit_photos(model, classes, int(epochs), folder):
                text = f"Training: step {len(log)}, loss {log.loss.iloc[-1]:.3f}" if len(log) else "Preparing ..."
                yield pages.messages([text], "status"), gr.update(value=log, visible=True), gr.update(visible=False)
            session.close()
            session.trained, session.files = create_model(f"local-dir:{folder}", True).eval(), files
            session.choose_head(OWN_HEAD)
            correct, count = training.count_correct(session.trained, classes)
            text = (
                f"Done: the head classifies {correct} of its {count} training photographs correctly, which says little "
                "about new ones. The other tabs now use your head: try new photographs there, or download it."
            )
            archive = str(training.zip_checkpoint(folder))
            yield pages.messages([text], "status"), gr.update(value=log), gr.update(value=archive, visible=True)
        except ZooError as error:
            yield pages.messages([str(error)]), gr.update(visible=False), gr.update(visible=False)

    # -------------------------------------------------------------------------------------------------------- rendering

    def controls(self, request: gr.Request) -> tuple:
        """The session's controls: model, head, description, class names, two menus of photographs, tokens."""
        session = self.session(request)
        heads = head_choices(session.model)
        if session.trained:
            heads.append(("yours, trained here", OWN_HEAD))
        if session.head == self.initial_head and self.initial_head not in dict(heads).values():
            heads.append((self.initial_head, self.initial_head))
        with acquire(session.source) as model:
            default, m = list(model.classnames), model.config.n_ctx
        photos = [(photo.name, i) for i, photo in enumerate(session.photos)]
        tokens = [("class token", CLASS_TOKEN), ("mean of the prompts", PROMPTS)]
        return (
            gr.update(value=session.model),
            gr.update(choices=heads, value=session.head if session.head in dict(heads).values() else None),
            describe(session.head, len(default)),
            ", ".join(session.names or default),
            gr.update(choices=photos, value=0),
            gr.update(choices=photos, value=0),
            gr.update(choices=[*tokens, *((f"prompt {i}", i) for i in range(1, m + 1))], value=CLASS_TOKEN),
        )

    def shots(self, number: int, request: gr.Request) -> str:
        return pages.thumbnails(self.session(request).shots[number])

    def answers(self, request: gr.Request) -> str:
        session = self.session(request)
        photos = session.photos
        with acquire(session.source, session.names) as model:
            dcp, zero_shot = answers.classify(model, photos), answers.zero_shot(model, photos)
        changed = None
        if session.names_before:
            with acquire(session.source, session.names_before) as model:
                before = answers.classify(model, photos)
            changed = [answers.changes(*pair) for pair in zip(before, dcp, strict=True)]
        return pages.answers(photos, [answers.best(a) for a in dcp], [answers.best(a) for a in zero_shot], changed)

    def attention(self, index: int | None, token: int | None, request: gr.Request) -> str:
        session, token = self.session(request), token or CLASS_TOKEN
        photo = session.photos[min(index or 0, len(session.photos) - 1)]
        with acquire(session.source) as model:
            weights = attention_weights(model, answers.to_batch(model, [photo]))[0]  # (blocks, 1 + M, L)
            m, grid = model.config.n_ctx, model.vision_tower.grid
        row = weights[:, 1:].mean(1) if token == PROMPTS else weights[:, min(token, m)]
        name = {CLASS_TOKEN: "class token", PROMPTS: "mean prompt"}.get(token, f"prompt {token}")
        return pages.attention(photo, row, name, grid, m)

    def batch_effect(self, index: int | None, request: gr.Request) -> str:
        session = self.session(request)
        index = min(index or 0, len(session.photos) - 1)
        with acquire(session.source, session.names) as model:
            names, rows = answers.batch_effects(model, session.photos, index)
            shift = answers.calibrated_shift(model, session.photos, index)
        return pages.batch_effect(session.photos[index], names, rows, shift)
