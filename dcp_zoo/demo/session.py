"""The state of one visitor's page, in memory and discarded when the page is closed."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from dcp_zoo.demo.photos import Photo, sample_photos
from dcp_zoo.model.dcp import DCP

OWN_HEAD = "own"  # value in the menu of heads for the one trained on this page
MAX_PHOTOS = 8
MAX_CLASSES = 6
MAX_SHOTS = 16


@dataclass
class Session:
    """One visitor's page.

    Attributes:
        head: name of the chosen head, or `OWN_HEAD`.
        model: the model whose heads are in the menu.
        photos: shown on the page; while `samples` is set, the two samples.
        names: edited class names, None for the head's; `names_before`: the names before the last edit.
        shots: training photographs of each class in the form.
        trained: the visitor's own head; `files`: the folder of its checkpoint and zip.
    """

    head: str
    model: str
    photos: list[Photo] = field(default_factory=sample_photos)
    samples: bool = True
    names: list[str] | None = None
    names_before: list[str] | None = None
    shots: list[list[Photo]] = field(default_factory=lambda: [[] for _ in range(MAX_CLASSES)])
    trained: DCP | None = None
    files: TemporaryDirectory | None = None

    @property
    def source(self) -> str | DCP:
        """The argument for `heads.acquire`."""
        return self.trained if self.head == OWN_HEAD and self.trained else self.head

    def choose_head(self, head: str) -> None:
        """Choose a head and reset the class names to its own."""
        self.head, self.names, self.names_before = head, None, None

    def close(self) -> None:
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

    def of(self, key: str) -> Session:
        """The session of a page, created if needed."""
        with self._lock:
            session = self._open.setdefault(key, self._open.get(key) or self._new())
            self._open.move_to_end(key)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)[1].close()
            return session

    def close(self, key: str) -> None:
        """Discard a page's session and remove its files."""
        with self._lock:
            session = self._open.pop(key, None)
        if session:
            session.close()
