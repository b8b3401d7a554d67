"""Classes: an index with a name, and the name that CLIP reads in texts, which outlives a rename; names may repeat."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, check_choice, shorten, warn
from dcp_zoo.tables import is_reserved

NAME = "{}."  # the template after learned prompts
TEMPLATE = "a photo of a {}."  # zero-shot CLIP's
NO_CLASSES = "This head has no classes: call model.set_classnames first."
Descriptions = Mapping[str, Sequence[str]]  # sentences of each class
# a template for class names, or several, or sentences of each class; "" of a head that reads none
Texts = str | Sequence[str] | Descriptions


@dataclass(eq=False)
class Class:
    """A class of a head. It is itself alone: another one may have the same name."""

    name: str
    text_name: str = ""  # the name that CLIP reads; by default the same

    def __post_init__(self) -> None:
        self.text_name = self.text_name or self.name


def names_of(classes: Iterable[Class]) -> list[str]:
    return [each.name for each in classes]


def text_names(classes: Iterable[Class]) -> list[str]:
    return [each.text_name for each in classes]


def matched(names: Sequence[str], *known: Iterable[Class]) -> list[Class]:
    """A class for each name: of the `known` ones those of this name, the first ones first; then new ones."""
    left: dict[str, list[Class]] = defaultdict(list)
    seen: set[int] = set()
    for each in (each for classes in known for each in classes):
        if id(each) not in seen:
            left[each.name].append(each)
        seen.add(id(each))
    return [left[name].pop(0) if left[name] else Class(name) for name in names]


def rows_of(classes: Iterable[Class], known: Iterable[Class]) -> list[int | None]:
    """The position of each class among the `known` ones, None if it is not there."""
    index = {id(each): i for i, each in enumerate(known)}
    return [index.get(id(each)) for each in classes]


def position(name: str | int, classes: Sequence[Class]) -> int:
    """Of the class with this name, or at this position; ZooError unless there is exactly one."""
    names = names_of(classes)
    if isinstance(name, int):
        if 0 <= name < len(names):
            return name
        raise ZooError(f"There is no class {name}: the positions are 0 to {len(names) - 1}.")
    found = [i for i, known in enumerate(names) if known == name]
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ZooError(
            f"{len(found)} classes are named {name}: pass the position of one in place of its name: {listed}."
        )
    check_choice("class", name, names)
    return found[0]


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none, or one is empty or reserved; a warning if some are repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ZooError(f"Class names must be strings, not {wrong[0]!r}: a text tower reads them.")
    if not names or not all(map(_normalised, names)):
        raise ZooError("Class names must not be empty: pass at least one name, and no blank ones.")
    if reserved := [name for name in names if is_reserved(name)]:
        raise ZooError(f"{reserved[0]!r} is a reserved name, and cannot be a class: choose another name.")
    if problem := repeated_names(names):
        warn(problem)
    return names


def repeated_names(names: Sequence[str]) -> str:
    """A message about names that occur more than once, or "". Some datasets have such names, including ImageNet."""
    counts = Counter(map(_normalised, names))
    repeated = sorted({name for name in names if counts[_normalised(name)] > 1})
    problem = f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}"
    effect = "They stay classes of their own, which share the probability, and a prediction may name any of them"
    return f"{problem}. {effect}. Rename them." * bool(repeated)


def _normalised(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def sentences_of(names: Sequence[str], descriptions: Descriptions) -> dict[str, list[str]]:
    """The sentences of each class; ZooError if there are none for one."""
    similar = {_normalised(name): sentences for name, sentences in descriptions.items()}
    found = {name: list(descriptions.get(name) or similar.get(_normalised(name)) or []) for name in names}
    if missing := [name for name, sentences in found.items() if not sentences]:
        problem = f"The descriptions have no sentences for {shorten(list(map(repr, missing)), 5)}"
        raise ZooError(f"{problem}: pass descriptions (--descriptions FILE.json) with at least one for every class.")
    return found


def saved_texts(names: Sequence[str], texts: Texts) -> object:
    """The texts of these classes as plain JSON."""
    if isinstance(texts, Mapping):
        return sentences_of(names, texts)
    return texts if isinstance(texts, str) else list(texts)


def class_texts(names: Sequence[str], texts: Texts) -> tuple[list[str], list[int] | None]:
    """The texts of all classes in order, and how many each has; None for one each. ZooError if one is no text, or there
    are none for a class."""
    if isinstance(texts, Mapping):
        found = [sentences_of(names, texts)[name] for name in names]
    else:
        templates = [texts] if isinstance(texts, str) else texts
        if not templates:
            raise ZooError("There is no template for class names: pass one or more, such as 'a photo of a {}.'")
        found = [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in names]
    sentences = [text for own in found for text in own]
    if unreadable := [text for text in sentences if re.search("[\ud800-\udfff]", text)]:
        raise ZooError(f"CLIP cannot read {unreadable[0]!r}, which is not in UTF-8: rename the class, or its folder.")
    return sentences, None if isinstance(texts, str) else [len(own) for own in found]


def same_texts(names: Sequence[str], one: Texts, other: Texts) -> bool:
    """Whether the texts of all classes are the same; not if either has none for one."""
    try:
        return class_texts(names, one) == class_texts(names, other)
    except ZooError:
        return False


def mean_of_texts(features: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Normalised features (S, E) of `class_texts` -> the normalised mean of each class (C, E)."""
    if counts is None:
        return features
    return F.normalize(torch.stack([own.mean(0) for own in features.split(list(counts))]), dim=-1)
