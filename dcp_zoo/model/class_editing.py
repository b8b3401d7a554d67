"""The classes of a head: set by their names, added from images, removed and renamed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model.classes import Class, Texts, check_classnames, class_texts, matched, names_of, position
from dcp_zoo.model.clip import Reading, join
from dcp_zoo.model.inputs import Images
from dcp_zoo.model.text_probe.probe import TextProbe


class ClassEditing(nn.Module, ABC):
    """What all heads do with their classes. A kind of head defines `classify_into`."""

    classes: list[Class]
    text_probe: TextProbe | None
    _changed: str

    @property
    def classnames(self) -> list[str]:
        """The name of each class, in the order of the logits. Names may repeat."""
        return names_of(self.classes)

    @property
    @abstractmethod
    def reads(self) -> list[Reading]: ...

    @abstractmethod
    def encode_image(self, images: Images) -> Tensor: ...

    @abstractmethod
    def _batch(self, images: object) -> Tensor: ...

    @abstractmethod
    def classify_into(self, classes: list[Class], texts: Texts | None) -> None:
        """`set_classnames` for classes of which some may be among the present ones."""

    def set_classnames(self, classnames: Sequence[str], texts: Texts | None = None) -> None:
        """Classify into these classes from now on: those that the head knows by these names, of repeated ones the first
        first, and new ones, which CLIP reads. ZooError for no names or empty ones, texts that the text tower cannot
        read, and for names that the head does not know, if it reads none.

        Args:
            classnames: one per class. Classes of the same name stay classes of their own, with a warning: each has a
                share of the probability, the same one where only the name is known, and a prediction names any of them.
            texts: what CLIP reads of each class: a template for the names, or sentences. Default: as until now.
        """
        names = check_classnames(classnames)
        classes = matched(names, self.classes, [] if self.text_probe is None else self.text_probe.classes)
        if texts and isinstance(texts, Mapping):  # they are for these names
            class_texts(names, texts)
            for each in classes:
                each.read = each.name
        self.classify_into(classes, texts)

    def add_class(self, name: str | int, images: Tensor, known: int = 0) -> None:
        """Add a class from a few images, without training; the existing classes keep their scores, and the threshold to
        reject images stays as it is. ZooError without a text probe, or for `known` images of a class that has none.

        Args:
            name: of the class; that of one that the model already has, or its position, gives it new images.
            images: (n, 3, H, W), normalised as `create_transform` does.
            known: how many images the model has seen of the class, which count as much as new ones; 0 replaces them.
        """
        if (probe := self.text_probe) is None:
            problem = "This head cannot add a class by its images: it has no text probe."
            advice = "Train a head with one, or call model.set_classnames to classify by names"
            raise ZooError(f"{problem} {advice}.")
        with torch.no_grad():
            features = self.encode_image(self._batch(images))
        if exists := isinstance(name, int) or name in self.classnames:
            one = self.classes[position(name, self.classes)]
        else:
            one = matched(check_classnames([*self.classnames, name]), self.classes, probe.classes)[-1]
        mean, count, seen = features.float().mean(0), len(features), probe.seen(one)
        if known and seen is None:
            raise ZooError(f"known={known}, but the model has seen no image of {one.name}: omit it, or pass known=0.")
        if known and seen is not None:
            count += known
            mean += (seen.float() - mean) * (known / count)
        if not exists:
            self.classify_into([*self.classes, one], None)
        with torch.no_grad():
            probe.add(one, mean, count, self.classes, join(self.reads))
        self._changed = f"the class {one.name} got other images" if exists else f"the class {one.name} was added"

    def remove_class(self, name: str | int) -> None:
        """Remove the class of this name, or at this position, whose images belong to none from now on; ZooError for the
        last one, an unknown one, or a name that several have."""
        at = position(name, self.classes)
        one, left = self.classes[at], [*self.classes[:at], *self.classes[at + 1 :]]
        check_classnames(names_of(left))
        self.classify_into(left, None)
        if self.text_probe is not None:
            self.text_probe.remove(one)
        self._changed = f"the class {one.name} was removed"

    def rename_class(self, name: str | int, new: str) -> None:
        """Change the name of a class and nothing else: CLIP goes on reading the old one, so that predictions, accuracy
        and threshold stay. ZooError for an unknown class, or a new name that is another's."""
        one = self.classes[position(name, self.classes)]
        if new in self.classnames:
            raise ZooError(f"The class {new} exists already: choose another name, or remove that class first.")
        one.name = check_classnames([new])[0]
