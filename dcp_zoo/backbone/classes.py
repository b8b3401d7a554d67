"""Classes: their names, which may repeat, in the order of the logits, and the texts of them that CLIP
encodes."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, attempted, shorten, warn
from dcp_zoo.tables import is_reserved

NAME = "{}."  # the template after learned prompts
TEMPLATE = "a photo of a {}."  # zero-shot CLIP's
NO_CLASSES = "This head has no classes: call model.set_classnames first."
Descriptions = Mapping[str, Sequence[str]]  # sentences of each class
# a template for class names, or several, or sentences of each class; "" of a head that reads none
Texts = str | Sequence[str] | Descriptions


def rows_of(names: Iterable[str], known: Iterable[str]) -> list[int | None]:
    """The position of each name among the `known` ones, of repeated ones the first first; None if it is not
    there."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(known):
        rows[name].append(i)
    return [rows[name].pop(0) if rows[name] else None for name in names]


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list; ZooError if there are none, or one is empty or reserved; a warning if some are
    repeated."""
    if isinstance(classnames, str):
        raise ZooError(f"classnames must be a list of names, not the single string {classnames!r}.")
    names = list(classnames)
    for name in names or [""]:
        if not isinstance(name, str):
            raise ZooError(f"Class names must be strings, not {name!r}: a text tower reads them.")
        if not _normalised(name):
            raise ZooError("Class names must not be empty: pass at least one name, and no blank ones.")
        if is_reserved(name):
            raise ZooError(f"{name!r} is a reserved name, and cannot be a class: choose another name.")
    counts = Counter(map(_normalised, names))
    repeated = sorted({name for name in names if counts[_normalised(name)] > 1})
    if repeated:  # ImageNet has some
        warn(
            f"Repeated class names cannot be told apart: {', '.join(map(repr, repeated))}. They stay classes of their "
            "own, which share the probability, and a prediction may name any of them. Rename them."
        )
    return names


def _normalised(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def sentences_of(names: Sequence[str], descriptions: Descriptions) -> dict[str, list[str]]:
    """The sentences of each class; ZooError if there are none for one."""
    similar = {_normalised(name): sentences for name, sentences in descriptions.items()}
    by_class = {name: list(descriptions.get(name) or similar.get(_normalised(name)) or []) for name in names}
    missing = [repr(name) for name, sentences in by_class.items() if not sentences]
    if missing:
        raise ZooError(
            f"The descriptions have no sentences for {shorten(missing, 5)}: pass descriptions (--descriptions "
            "FILE.json) with at least one for every class."
        )
    return by_class


def class_texts(names: Sequence[str], texts: Texts) -> tuple[list[str], list[int] | None]:
    """The texts of all classes in order, and how many each has; None for one each. ZooError if one is no
    text, or there are none for a class."""
    if isinstance(texts, Mapping):
        by_class = sentences_of(names, texts)
        texts_by_name = [by_class[name] for name in names]
    else:
        templates = [texts] if isinstance(texts, str) else texts
        if not templates:
            raise ZooError("There is no template for class names: pass one or more, such as 'a photo of a {}.'")
        texts_by_name = []
        for name in names:
            words = name.replace("_", " ")
            texts_by_name.append([template.replace("{}", words) for template in templates])
    sentences = list(chain.from_iterable(texts_by_name))
    for text in sentences:
        if re.search("[\ud800-\udfff]", text):
            raise ZooError(f"CLIP cannot read {text!r}, which is not in UTF-8: rename the class, or its folder.")
    return sentences, None if isinstance(texts, str) else list(map(len, texts_by_name))


def same_texts(names: Sequence[str], one: Texts, other: Texts) -> bool:
    """Whether the texts of all classes are the same; not if either has none for one."""
    return attempted(class_texts, names, one) == attempted(class_texts, names, other)


def mean_of_texts(features: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Normalised features (S, E) of `class_texts` -> the normalised mean of each class (C, E)."""
    if counts is None:
        return features
    means = [of_class.mean(0) for of_class in features.split(list(counts))]
    return F.normalize(torch.stack(means), dim=-1)
