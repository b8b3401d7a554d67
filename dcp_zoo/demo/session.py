"""The state of one visitor's page, in memory and discarded when the page is closed."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import gradio as gr

from dcp_zoo.data.packaged import SAMPLE_CLASSES
from dcp_zoo.demo import DEFAULT_HEAD, VisitorLimits
from dcp_zoo.demo.shared import Photo, Uploads, acquire, digit_photos, load, read_uploads, sample_photos
from dcp_zoo.errors import ZooError
from dcp_zoo.model.head import Head

OWN_HEAD = "yours, trained on this page"  # in the menu of heads
OTHER_HEAD = "dcp_mini.pacs_photo-16shot"  # of whose classes the six photographs show none
EXAMPLE_SHOTS = 16  # images of each digit
VISITOR_BYTES, ALL_BYTES = 250_000_000, 2_000_000_000  # of the photographs of one visitor; of what all keep


@dataclass
class Session:
    """One visitor's page. Methods that read uploads return messages to the visitor."""

    head: str = DEFAULT_HEAD  # the name of the chosen head, or `OWN_HEAD`
    limits: VisitorLimits = field(default_factory=VisitorLimits)
    photos: list[Photo] = field(default_factory=list)  # shown on the page
    samples: bool = False  # whether these are samples
    names: list[str] | None = None  # edited class names; None for the head's
    reject: bool = False  # whether "none of these" is an answer
    shots: dict[int, list[Photo]] = field(default_factory=dict)  # training photographs of each class in the form
    trained: Head | None = None  # the visitor's own
    files: TemporaryDirectory | None = None  # the folder of its checkpoint and zip

    def __post_init__(self) -> None:
        if self.head == DEFAULT_HEAD:
            self.use_samples()

    @property
    def source(self) -> Head | str:
        return self.trained if self.head == OWN_HEAD and self.trained else self.head

    @property
    def photo_bytes(self) -> int:
        return sum(photo.bytes for photos in (self.photos, *self.shots.values()) for photo in photos)

    @property
    def bytes(self) -> int:
        """The memory that its photographs and its own head take."""
        tensors = self.trained.state_dict().values() if self.trained else ()
        return self.photo_bytes + sum(tensor.nbytes for tensor in tensors)

    def _read(self, files: Uploads, limit: int) -> tuple[list[Photo], list[str]]:
        return read_uploads(files, limit, VISITOR_BYTES - self.photo_bytes)

    def add_photos(self, files: Uploads) -> list[str]:
        """Add uploaded files to the photographs; the first upload replaces the samples."""
        kept = [] if self.samples else self.photos
        photos, messages = self._read(files, self.limits.max_photos - len(kept))
        if photos:
            self.photos, self.samples = kept + photos, False
        return messages

    def remove_photo(self, index: int) -> None:
        self.photos = [photo for i, photo in enumerate(self.photos) if i != index]  # all, if it is gone already
        self.samples = self.samples and bool(self.photos)

    def remove_all(self) -> None:
        self.photos, self.samples = [], False

    def use_samples(self) -> None:
        """Show six photographs, with class names for them, which the head's own are not."""
        self.reset_names(DEFAULT_HEAD)
        self.photos, self.samples, self.names = sample_photos(), True, list(SAMPLE_CLASSES)

    def reject_samples(self) -> None:
        """Show the six photographs, and a head for other things, which rejects them."""
        self.use_samples()
        self.reset_names(OTHER_HEAD)
        self.reject = True

    def choose_head(self, head: str) -> None:
        if head != OWN_HEAD:
            load(head)
        self.reset_names(head)

    def reset_names(self, head: str | None = None) -> None:
        """Use the class names of the head, or of another one, and reject nothing."""
        self.head, self.names, self.reject = head or self.head, None, False

    def set_names(self, text: str | None) -> None:
        """Set the class names, one per line; an empty text restores the head's."""
        with acquire(self.source) as model:
            default = list(model.classnames)
        names = [name.strip() for name in (text or "").split("\n") if name.strip()] or default
        if len(names) == 1 and "," in names[0]:
            raise ZooError("These names are in one line: write one name per line.")
        if names == (self.names or default):
            raise ZooError("The class names are the same as before: change some, then apply.")
        with acquire(self.source, names):  # raises for invalid names
            self.names = names if names != default else None

    def set_reject(self, reject: bool) -> None:
        self.reject = reject

    def add_shots(self, number: int, files: Uploads) -> list[str]:
        shots = self.shots.setdefault(number, [])
        photos, messages = self._read(files, self.limits.max_shots - len(shots))
        shots += photos
        return messages

    def remove_shot(self, number: int, index: int) -> None:
        del self.shots.get(number, [])[index : index + 1]

    def clear_shots(self, number: int) -> None:
        self.shots.pop(number, None)

    def use_example(self) -> list[str]:
        """Train on handwritten digits, where CLIP without training fails -> the names of the classes."""
        examples = digit_photos(min(10, self.limits.max_classes), min(EXAMPLE_SHOTS, self.limits.max_shots))
        self.shots = dict(enumerate(examples))
        return [f"handwritten {digit}" for digit in range(len(examples))]

    def keep(self, model: Head, files: TemporaryDirectory, test: list[Photo]) -> None:
        """Choose the head trained on this page, in place of an earlier one, and show the held-out photographs."""
        self.close()
        self.trained, self.files = model, files
        self.choose_head(OWN_HEAD)
        if test:
            self.photos, self.samples = test[: self.limits.max_photos], False

    def close(self) -> None:
        """Remove the files."""
        if self.files:
            self.files.cleanup()


class Sessions:
    """All open pages by Gradio's session hash; beyond limits the least recently used, or the largest, is closed."""

    def __init__(self, new: Callable[[], Session], capacity: int = 200) -> None:
        self._new, self._capacity = new, capacity
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Session:
        """The session of the page that sent a request, created if needed."""
        key = str(request.session_hash)
        with self._lock:
            session = self._open.setdefault(key, self._open.get(key) or self._new())
            self._open.move_to_end(key)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)[1].close()
            while len(self._open) > 1 and sum(kept.bytes for kept in self._open.values()) > ALL_BYTES:
                others = [other for other in self._open if other != key]
                self._open.pop(max(others, key=lambda other: self._open[other].bytes)).close()
            return session

    def close(self, request: gr.Request) -> None:
        """Discard a page's session and remove its files; called when the visitor leaves."""
        with self._lock:
            session = self._open.pop(str(request.session_hash), None)
        if session:
            session.close()
