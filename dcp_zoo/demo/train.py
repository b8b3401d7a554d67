"""The Train page: classes with photographs; a head, its held-out accuracy and its checkpoint."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from dcp_zoo.demo import Limits, pages, training
from dcp_zoo.demo.events import NOTHING, REMOVE, on
from dcp_zoo.demo.photos import example_photos, images_of_folder, read_uploads
from dcp_zoo.demo.session import OWN_HEAD, Sessions
from dcp_zoo.errors import ZooError

DCP, GDA = "dcp", "gda"
METHODS = [
    ("DCP: trains prompts, takes a minute or more", DCP),
    ("GDA: a formula on image features, takes seconds", GDA),
]
EXAMPLE_SHOTS = 16
TEXT = """Give each class a name and some photographs: files, or a folder dropped onto its field. A quarter of each
class is held out to measure the head."""


class Handlers:
    """The event handlers of the page.

    Args:
        sessions: the open pages.
        limits: what one visitor may do.
        cache: the folder of files that Gradio serves.
    """

    def __init__(self, sessions: Sessions, limits: Limits, cache: str) -> None:
        self.sessions, self.limits, self.cache = sessions, limits, cache
        Path(cache).mkdir(parents=True, exist_ok=True)

    def add(self, number: int, files: list[str] | None, request: gr.Request) -> tuple[str, str, None]:
        """Add training photographs of class `number` -> messages, its photographs, an empty drop zone."""
        shots = self.sessions.of(request).shots.setdefault(number, [])
        photos, messages = read_uploads(files or [], self.limits.shots - len(shots))
        shots += photos
        return pages.messages(messages), pages.thumbnails(shots), None

    def add_folder(self, number: int, files: list[str] | None, request: gr.Request) -> tuple[str, str, None]:
        """`add` the images in a folder."""
        try:
            return self.add(number, images_of_folder(files or []), request)
        except ZooError as error:
            return pages.messages([str(error)]), pages.thumbnails(self.sessions.of(request).shots.get(number, [])), None

    def remove(self, number: int, event: gr.EventData, request: gr.Request) -> str:
        """Remove one photograph of class `number`."""
        shots = self.sessions.of(request).shots.get(number, [])
        del shots[event.index : event.index + 1]
        return pages.thumbnails(shots)

    def clear(self, number: int, request: gr.Request) -> tuple[str, str]:
        """Remove name and photographs of class `number`."""
        self.sessions.of(request).shots.pop(number, None)
        return "", ""

    def example(self, request: gr.Request) -> list[str]:
        """Fill the form with an example -> the names of all classes, then their photographs."""
        session, classes = self.sessions.of(request), self.limits.classes
        filled = list(example_photos(min(EXAMPLE_SHOTS, self.limits.shots)).items())[:classes]
        session.shots = {number: photos for number, (_, photos) in enumerate(filled)}
        empty = [""] * (classes - len(filled))
        return [*(name for name, _ in filled), *empty, *(pages.thumbnails(photos) for _, photos in filled), *empty]

    def stop(self, request: gr.Request) -> None:
        """End the training after its current epoch."""
        if watch := self.sessions.of(request).training:
            watch.stop()

    def train(self, model: str, method: str, request: gr.Request, *names: str | None) -> Iterator[tuple]:
        """Train on the form's classes; yields repeatedly while it runs: messages, loss curve, result, stop button,
        download button, button to the Classify page."""
        session, hidden = self.sessions.of(request), gr.update(visible=False)
        try:
            classes = training.check_classes([(name, session.shots.get(i, [])) for i, name in enumerate(names)])
            watch = session.training = training.Watch()
            stop = gr.update(visible=method == DCP)
            with ThreadPoolExecutor(1) as thread:
                job = thread.submit(training.train_on, model, method, classes, watch)
                while wait([job], timeout=0.25).not_done:
                    curve = gr.update(value=watch.curve(), visible=True) if watch.epochs else hidden
                    yield pages.messages([str(watch)], "status"), curve, "", stop, hidden, hidden
                result = job.result()
            files = TemporaryDirectory(dir=self.cache, prefix="head-")
            archive = training.save(result.classifier, Path(files.name) / "my_head")
            session.close()
            session.trained, session.files = result.classifier.model_, files
            session.choose_head(OWN_HEAD)
            if result.test:
                session.photos, session.samples = result.test[: self.limits.photos], False
            curve = gr.update(value=watch.curve(), visible=bool(watch.epochs))
            shown = gr.update(visible=True)
            yield "", curve, pages.result(result), hidden, gr.update(value=str(archive), visible=True), shown
        except ZooError as error:
            yield pages.messages([str(error)]), hidden, "", hidden, hidden, hidden


# --------------------------------------------------------------------------------------------------------------- layout


class Room:
    """The layout of the page, to be created where it is wanted in a `gr.Blocks`.

    Attributes:
        trained: the event after which a new head is available.
        go: the button that leads to the Classify page.
    """

    def __init__(self, handlers: Handlers, models: list[str]) -> None:
        self.handlers = handlers
        self.names: list[gr.Textbox] = []
        self.pictures: list[gr.HTML] = []
        self.classes: list[gr.Group] = []
        gr.Markdown(TEXT)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(elem_classes="dcp-status", render=False)
                self._classes()
            with gr.Column(scale=2, min_width=320):
                self.status.render()
                self.trained = self._training(models)

    def _classes(self) -> None:
        handlers, count = self.handlers, self.handlers.limits.classes
        with gr.Row(elem_classes="dcp-classes"):
            for number in range(count):
                self._class(number)
        with gr.Row():
            more = gr.Button("Add a class", size="sm")
            example = gr.Button("Try an example: handwritten digits", size="sm")
        shown = gr.State(2)
        on(
            more.click,
            lambda n: (min(n + 1, count), *(gr.update(visible=i <= n) for i in range(count))),
            shown,
            [shown, *self.classes],
            show_progress="hidden",
        )
        filled = on(example.click, handlers.example, None, [*self.names, *self.pictures])
        on(
            filled.then,
            lambda *names: (
                used := max(2, sum(map(bool, names))),
                *(gr.update(visible=i < used) for i in range(count)),
                "",
            ),
            self.names,
            [shown, *self.classes, self.status],
            show_progress="hidden",
        )

    def _class(self, number: int) -> None:
        """The form of one class: its name and its photographs."""
        handlers, limit = self.handlers, self.handlers.limits.shots
        with gr.Column(visible=number < 2, elem_classes="dcp-class") as column:
            name = gr.Textbox(label=f"Name of class {number + 1}", max_length=200)
            drop = gr.File(
                label=f"Photographs or folder of class {number + 1} (up to {limit})",
                file_count="multiple",
                file_types=["image"],
                height=130,
            )
            pictures = gr.HTML(js_on_load=REMOVE)
            with gr.Row():
                folder = gr.UploadButton("Folder ...", file_count="directory", size="sm", min_width=60)
                clear = gr.Button("Clear", size="sm", min_width=60)
        which = gr.State(number)
        for upload, add in ((drop, handlers.add), (folder, handlers.add_folder)):
            on(upload.upload, add, [which, upload], [self.status, pictures, drop])
        on(pictures.delete, handlers.remove, which, pictures, show_progress="hidden")
        on(clear.click, handlers.clear, which, [name, pictures], show_progress="hidden")
        for event in (name.input, pictures.delete, clear.click):  # what was wrong may be right now
            on(event, None, None, self.status, js=NOTHING)
        self.classes.append(column)
        self.names.append(name)
        self.pictures.append(pictures)

    def _training(self, models: list[str]) -> Any:
        handlers = self.handlers
        method = gr.Radio(METHODS, value=DCP, label="Method")
        model = gr.Dropdown(models, label="CLIP", interactive=True, visible=len(models) > 1)
        with gr.Row():
            start = gr.Button("Train", variant="primary")
            stop = gr.Button("Stop and keep it", visible=False)
        curve = gr.LinePlot(x="epoch", y="loss", label="Training loss", height=220, visible=False)
        result = gr.HTML()
        with gr.Row():
            self.go = gr.Button("Classify with it", variant="primary", visible=False)
            download = gr.DownloadButton("Download the head", visible=False)
        on(stop.click, handlers.stop, show_progress="hidden")
        outputs = [self.status, curve, result, stop, download, self.go]
        return on(start.click, handlers.train, [model, method, *self.names], outputs, show_progress="hidden")
