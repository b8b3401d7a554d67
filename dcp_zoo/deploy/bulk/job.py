"""What a run on many images computes, on this machine or on a cluster, and what another run may continue."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dcp_zoo.data.find import Found
from dcp_zoo.deploy.bulk.predictor import Predictor
from dcp_zoo.deploy.bulk.rows import Rows, classify
from dcp_zoo.errors import ZooError

Shows = Callable[..., Iterator[Any]]  # shows results: (results, unit, total, done=, size=) -> results


def unshown(results: Iterator[Any], unit: str, total: int, **counts: Any) -> Iterator[Any]:
    return results


@dataclass(frozen=True)
class Job:
    """What a run computes, on this machine or on a cluster.

    Attributes:
        load: returns the predictor; called where it computes, and only if an image is left to classify.
        plan: what determines the results besides the images and these options, as plain JSON, such as the head's hash.
            A run with another plan does not continue this one.
        top_k, batch_size, workers, reject: see `classify`.
    """

    load: Callable[[], Predictor]
    plan: dict[str, Any]
    top_k: int = 5
    batch_size: int = 32
    workers: int = 0
    reject: bool = False

    def classify(self, images: Sequence[Found], predictor: Predictor) -> Iterator[Rows]:
        return classify(images, predictor, self.top_k, self.batch_size, self.workers, self.reject)

    def plan_of(self, images: Iterable[str], **more: Any) -> dict[str, Any]:
        """All that determines the results for these images."""
        digest = sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest()
        return self.plan | {"top_k": self.top_k, "reject": self.reject, **more, "images": digest}


def check_same_plan(place: Path | str, found: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ZooError if the rows at a place are of another plan than this one."""
    if differ := [name.replace("_", " ") for name in plan if found.get(name) != plan[name]]:
        raise ZooError(
            f"{place} holds the first rows of another run, which differs in {', '.join(differ)}. Repeat that run's "
            f"command, choose another --output, or delete {place}."
        )


@dataclass(frozen=True)
class Summary:
    """Counts of a finished run: all images, those that an earlier run had done, and those that cannot be read."""

    images: int
    resumed: int
    failed: int
