"""The state of one visitor's page, in memory and discarded when the page is closed."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from dcp_zoo.data.samples import SAMPLE_CLASSES
from dcp_zoo.demo import DEFAULT_HEAD
from dcp_zoo.demo.photos import Photo, sample_digits, sample_photos

DIGITS_HEAD = "dcp_mini.digits-16shot"
OWN_HEAD = "yours, trained on this page"  # in the menu of heads


@dataclass
class Session:
    """One visitor's page.

    Attributes:
        head: name of the chosen head, or `OWN_HEAD`.
        photos: shown on the page; while `samples` is set, they are samples.
        names: edited class names, None for the head's; `names_before`: the names before the last edit.
        reject: whether "none of these" is an answer.
        shots: training photographs of each class in the form.
        training: progress of the training that runs or ran last, see `training.Watch`.
        trained: the visitor's own head; `files`: the folder of its checkpoint and zip.
    """

    head: str = DEFAULT_HEAD
    photos: list[Photo] = field(default_factory=list)
    samples: bool = False
    names: list[str] | None = None
    names_before: list[str] | None = None
    reject: bool = False
    shots: dict[int, list[Photo]] = field(default_factory=dict)
    training: Any = None
    trained: Any = None
    files: TemporaryDirectory | None = None

    def __post_init__(self) -> None:
        if self.head == DEFAULT_HEAD:
            self.use_samples()

    @property
    def source(self) -> Any:
        """The argument for `heads.acquire`."""
        return self.trained if self.head == OWN_HEAD and self.trained else self.head

    def use_samples(self) -> None:
        """Show six photographs, with class names for them, which the head's own are not."""
        self.choose_head(DEFAULT_HEAD)
        self.photos, self.samples, self.names = sample_photos(), True, list(SAMPLE_CLASSES)

    def use_digits(self) -> None:
        """Show ten handwritten digits, and a head trained on others, where training pays."""
        self.choose_head(DIGITS_HEAD)
        self.photos, self.samples = sample_digits(), True

    def keep(self, model: Any, files: TemporaryDirectory) -> None:
        """Choose a head that was trained on this page, in place of an earlier one; `files` hold its checkpoint."""
        self.close()
        self.trained, self.files = model, files
        self.choose_head(OWN_HEAD)

    def choose_head(self, head: str) -> None:
        """Choose a head and reset the class names to its own."""
        self.head, self.names, self.names_before = head, None, None

    def close(self) -> None:
        """Stop what runs, and remove the files."""
        if self.training:
            self.training.stop()
        if self.files:
            self.files.cleanup()


class Sessions:
    """All open pages by Gradio's session hash. Beyond `capacity`, the least recently used one is closed."""

    def __init__(self, new: Callable[[], Session], capacity: int = 200) -> None:
        self._new, self._capacity = new, capacity
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, request: Any) -> Session:
        """The session of the page that sent a request, created if needed."""
        key = str(request.session_hash)
        with self._lock:
            session = self._open.setdefault(key, self._open.get(key) or self._new())
            self._open.move_to_end(key)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)[1].close()
            return session

    def close(self, request: Any) -> None:
        """Discard a page's session and remove its files; called when the visitor leaves."""
        with self._lock:
            session = self._open.pop(str(request.session_hash), None)
        if session:
            session.close()
