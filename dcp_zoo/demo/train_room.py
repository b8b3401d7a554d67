"""The Train room: classes with photographs; a head, its held-out accuracy and its checkpoint."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from dcp_zoo.api.estimator import FewShotClassifier
from dcp_zoo.data import Item
from dcp_zoo.data.splits import divide
from dcp_zoo.demo import VisitorLimits, pages
from dcp_zoo.demo.pages import NOTHING, REMOVE, changing, drop_zone, on, removing, small_button
from dcp_zoo.demo.session import Session, Sessions
from dcp_zoo.demo.shared import Photo, clip_answers, head_answers
from dcp_zoo.errors import ZooError
from dcp_zoo.model.classes import repeated_names
from dcp_zoo.training.accuracy import Accuracy

MEASURED_SHARE = 0.25  # of each class


class TrainRoom:
    """The room's layout, created in a `gr.Blocks`. Heads are kept in `cache`, the folder of files that Gradio serves;
    after the event `trained` there is a new one, and the button `go` leads to the Classify room."""

    def __init__(self, sessions: Sessions, limits: VisitorLimits, clip: str, cache: str) -> None:
        self.sessions, self.limits, self.clip, self.cache = sessions, limits, clip, Path(cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        gr.Markdown(
            "Give each class a name and some photographs: files, or a folder dropped onto its field. A text probe "
            "learns them in seconds; it reads CLIP's embedding and the features before it. A quarter of each class is "
            "held out to measure it."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(elem_classes="dcp-status", render=False)
                self._forms()
            with gr.Column(scale=2, min_width=320):
                self.status.render()
                self.trained = self._training()

    def draw(self, request: gr.Request, number: int) -> tuple[str, None]:
        """The photographs of class `number`, and an empty drop zone."""
        return pages.render("thumbnails", photos=self.sessions.of(request).shots.get(number, [])), None

    def example(self, request: gr.Request) -> list[object]:
        """Fill the form with an example -> names of all classes, photographs, what is visible, no messages."""
        session, numbers = self.sessions.of(request), range(self.limits.max_classes)
        names = session.use_example()
        pictures = [pages.render("thumbnails", photos=session.shots.get(number, [])) for number in numbers]
        return [*names, *[""] * (len(numbers) - len(names)), *pictures, *self._visible(len(names)), ""]

    def _visible(self, used: int) -> list[object]:
        """The number of visible classes, and an update of each class's column."""
        used = min(max(2, used), self.limits.max_classes)
        return [used, *(gr.update(visible=number < used) for number in range(self.limits.max_classes))]

    def train(self, request: gr.Request, *names: str | None) -> tuple[str, str, object, object]:
        """Train -> messages, result, download, button to the Classify room."""
        session = self.sessions.of(request)
        try:
            classes = named_classes([(name, session.shots.get(i, [])) for i, name in enumerate(names)])
            result = train_on(self.clip, classes)
        except ZooError as error:
            return pages.messages([str(error)]), "", gr.update(visible=False), gr.update(visible=False)
        files = TemporaryDirectory(dir=self.cache, prefix="head-")
        folder = result.classifier.save(Path(files.name) / "my_head")
        archive = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        session.keep(result.classifier.model_, files, result.test)
        download = gr.update(value=archive, visible=True)
        return "", pages.render("result", result=result), download, gr.update(visible=True)

    def _forms(self) -> None:
        with gr.Row(elem_classes="dcp-classes"):
            forms = [self._form(number) for number in range(self.limits.max_classes)]
        columns, self.names, self.pictures = map(list, zip(*forms, strict=True))
        with gr.Row():
            more, example = small_button("Add a class"), small_button("Try an example: handwritten digits")
        visible = [gr.State(2), *columns]
        on(more.click, lambda n: self._visible(n + 1), visible[0], visible, show_progress="hidden")
        on(example.click, self.example, None, [*self.names, *self.pictures, *visible, self.status])

    def _form(self, number: int) -> tuple[gr.Column, gr.Textbox, gr.HTML]:
        """The form of one class: its column, its name and its photographs."""
        with gr.Column(visible=number < 2, elem_classes="dcp-class") as column:
            name = gr.Textbox(label=f"Name of class {number + 1}", max_length=200)
            room = f"(up to {self.limits.max_shots})"
            drop = drop_zone(label=f"Photographs or folder of class {number + 1} {room}", height=130)
            pictures = gr.HTML(js_on_load=REMOVE)
            clear = small_button("Clear", min_width=60)
        which = gr.State(number)
        for event, handler, inputs in (
            (drop.upload, changing(self.sessions, Session.add_shots), [drop]),
            (pictures.delete, removing(self.sessions, Session.remove_shot), []),
            (clear.click, changing(self.sessions, Session.clear_shots), []),
        ):
            changed = on(event, handler, [which, *inputs], self.status, show_progress="hidden")
            on(changed.then, self.draw, which, [pictures, drop], show_progress="hidden")
        on(clear.click, None, None, name, js=NOTHING)
        on(name.input, None, None, self.status, js=NOTHING)  # what was wrong may be right now
        return column, name, pictures

    def _training(self) -> gr.events.Dependency:
        start = gr.Button("Train", variant="primary")
        result = gr.HTML()
        with gr.Row():
            self.go = gr.Button("Classify with it", variant="primary", visible=False)
            download = gr.DownloadButton("Download the head", visible=False)
        return on(start.click, self.train, self.names, [self.status, result, download, self.go])


def named_classes(classes: Sequence[tuple[str | None, list[Photo]]]) -> dict[str, list[Photo]]:
    """(name, photographs) of each class in the form, without empty ones; ZooError names what is missing."""
    stripped = [((name or "").strip(), photos) for name, photos in classes]  # an untouched field is None
    used = [(number, name, photos) for number, (name, photos) in enumerate(stripped, 1) if name or photos]
    for number, name, photos in used:
        if not name:
            raise ZooError(f"Class {number} has photographs but no name: give it one.")
        if not photos:
            raise ZooError(f"The class {name!r} has no photographs: add at least one, or remove its name.")
    if len(used) < 2:
        raise ZooError("Training needs at least two classes: give each a name and at least one photograph.")
    if problem := repeated_names([name for _, name, _ in used]):
        raise ZooError(problem)
    return {name: photos for _, name, photos in used}


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, and how it does on the held-out photographs, if there are any."""

    classifier: FewShotClassifier  # with the head as `model_`
    images: int  # that it was trained on
    seconds: float  # that the training took
    test: list[Photo]  # held out
    before: list[str]  # the classes that CLIP without training predicts for these
    after: list[str]  # the classes that the head predicts

    def accuracy(self, predicted: list[str]) -> Accuracy:
        hits = sum(name == photo.truth for name, photo in zip(predicted, self.test, strict=True))
        return Accuracy("", hits, len(self.test))


def train_on(clip: str, classes: Mapping[str, list[Photo]]) -> TrainedHead:
    """Train a text probe on three quarters of each class's photographs, and measure it on the others."""
    names = list(classes)
    items = [Item(p.image, p.name, label) for label, photos in enumerate(classes.values()) for p in photos]
    train, _, test = divide(items, MEASURED_SHARE)
    classifier = FewShotClassifier(clip, memory=False)  # visitors' images are not kept
    started = time.perf_counter()
    classifier.fit([item.path for item in train], [names[item.label] for item in train])
    seconds = time.perf_counter() - started
    held_out = [Photo(item.key, item.path, names[item.label]) for item in test]
    if not held_out:
        return TrainedHead(classifier, len(train), seconds, [], [], [])
    head = classifier.model_
    before, after = ([next(iter(row)) for row in ask(head, held_out) or ()] for ask in (clip_answers, head_answers))
    result = TrainedHead(classifier, len(train), seconds, held_out, before, after)
    head.info |= {"metrics": {"top1_stored": round(result.accuracy(after).percent, 2)}, "test_images": len(test)}
    return result
