"""Images and labels in the forms that people have them, as items."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dcp_zoo.data import Item, all_for_training, load_labelled, table_columns
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import FORMS, pixels_sha256, to_image
from dcp_zoo.errors import ZooError, as_zoo_error, attempted, shorten
from dcp_zoo.tables import NONE, is_none

Images = Any  # a folder with one folder per class, one image, or a sequence or batch of images, see `FORMS`
Labels = Any  # one per image, names or numbers
Groups = Any  # one per image, of any type: the same for images that were taken together
ClassNames = Mapping[Any, str] | Sequence[str] | None  # by label, or in the order of the labels


class Labelled(NamedTuple):
    classes: np.ndarray  # the C distinct labels, sorted
    names: list[str]  # of the classes, which CLIP reads
    items: list[Item]  # their labels count from 0, in the order of `classes`
    none: list[Item]  # of none of the classes: examples of what to reject


def list_labelled_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """The images of a folder with one folder per class: their paths, and the class of each, for
    functions such as scikit-learn's `cross_val_score`; without those in `none of these`. ZooError for no such folder,
    no class folders, a class without images, or folders `train` and `test`."""
    return _with_labels(folder, None)[:2]


def is_folder(images: Images) -> bool:
    return isinstance(images, (str, Path)) and Path(images).is_dir()


def labelled(images: Images, labels: Labels = None, classnames: ClassNames = None, groups: Groups = None) -> Labelled:
    """Images with their labels, of which `none of these` is no class; arguments as in `dcp_zoo.train`."""
    if is_folder(images) and labels is not None:
        raise ZooError(f"The class folders in {images} are the labels: omit labels.")
    images, labels, keys = _with_labels(images, labels, examples=True)
    if any(label is None or is_nan(label) for label in labels):
        raise ZooError("Some images have no label (None or NaN): leave them out, or label them.")
    images, has_class = as_images(images), [not (isinstance(x, str) and is_none(x)) for x in labels]
    values = np.asarray(labels if all(has_class) else [x for x, has in zip(labels, has_class, strict=True) if has])
    if values.ndim != 1:
        raise ZooError(f"Labels must be one-dimensional, not of shape {values.shape}.")
    classes = np.unique(values)
    if len(classes) < 2:
        raise ZooError(f"Training needs at least two classes, not {len(classes)}.")
    left = iter(values.tolist())
    items = _items(images, [next(left) if has else NONE for has in has_class], [*classes.tolist(), NONE], keys)
    items = with_groups(items, groups)
    none = [item for item in items if item.label == len(classes)]
    return Labelled(classes, _names(classes, classnames), [x for x in items if x.label < len(classes)], none)


def with_groups(items: Sequence[Item], groups: Groups) -> list[Item]:
    """The items with the groups that a person gives, one for each; ZooError for another number of them."""
    if groups is None:
        return list(items)
    names = np.asarray(one_column(groups)).tolist()
    if len(names) != len(items):
        raise ZooError(f"{len(items)} images need as many groups, not {len(names)}.")
    return [item._replace(group=f"given {name}") for item, name in zip(items, names, strict=True)]


def with_classes(images: Images, labels: Labels, classes: Sequence[Any], names: Sequence[str] = ()) -> list[Item]:
    """Images with their labels among known classes; those of a folder are their `names`, or the labels as text."""
    of_folder = labels is None
    images, labels, keys = _with_labels(images, labels)
    if of_folder:
        called = dict(zip(names, classes, strict=False)) | {str(label): label for label in classes}
        labels = [called.get(name, name) for name in labels]
    return _items(as_images(images), list(labels), classes, keys)


def among(items: Sequence[Item], names: Sequence[str], classes: Sequence[str]) -> list[Item]:
    """Images whose labels count these class names, with the labels of the classes of a head; ZooError for an image of a
    class that it does not have."""
    if list(names) == list(classes):  # of which some may be repeated
        return list(items)
    values = [names[item.label] for item in items]
    return _items([item.path for item in items], values, classes, [item.key for item in items])


def _items(images: Sequence[Any], values: Sequence[Any], classes: Sequence[Any], keys: list[str] | None) -> list[Item]:
    index = {label: i for i, label in enumerate(classes)}
    if len(values) != len(images):
        raise ZooError(f"{len(images)} images need as many labels, not {len(values)}.")
    if unknown := sorted({str(label) for label in values if label not in index}):
        known = f"the classes are {shorten(list(map(str, classes)))}"
        raise ZooError(f"No class {shorten(unknown)}: {known}. Pass images of these only.")
    if repeated := [str(label) for label, count in Counter(classes).items() if count > 1 and label in values]:
        raise ZooError(
            f"Several classes are named {', '.join(repeated)}, so that this label fits each: train with other names."
        )
    of_path = {image: label for image, label in zip(images, values, strict=True) if isinstance(image, str)}
    for image, label in zip(images, values, strict=True):
        if isinstance(image, str) and of_path[image] != label:
            raise ZooError(f"{image} has two labels, {label!r} and {of_path[image]!r}: keep one of them.")
    keys = keys or [image if isinstance(image, str) else f"image {i}" for i, image in enumerate(images)]
    return [Item(image, key, index[label]) for image, key, label in zip(images, keys, values, strict=True)]


def hashed(items: Iterable[Item]) -> list[Item]:
    """Images, with a hash as key of those in memory: names do not tell these apart."""
    return [item if isinstance(item.path, str) else item._replace(key=pixels_sha256(item.path)) for item in items]


def _with_labels(images: Images, labels: Labels, examples: bool = False) -> tuple[Any, Any, list[str] | None]:
    """Images and labels as they are; or without labels those of a folder and their keys, as of `dcp-zoo train`, in the
    same order, with `examples` of no class behind. ZooError for images alone."""
    if columns := table_columns(images):
        if labels is not None:
            raise ZooError("The labels of a dataset are its column `label`: omit labels.")
        images, labels = columns
    if labels is not None:
        return one_column(images), one_column(labels), None
    if not isinstance(images, (str, Path)) or Path(images).is_file():
        raise ZooError("Pass labels, one per image, or a folder with one folder per class.")
    split = load_labelled("folder", images)
    if split.has_parts:
        raise ZooError(f"{images} has images for training and for a test: pass {images}/train or {images}/test.")
    items, none = all_for_training(split).train, split.none if examples else []
    labels = [split.classnames[item.label] for item in items] + [NONE] * len(none)
    items = [*items, *none]
    return [item.path for item in items], labels, [item.key for item in items]


def unlabelled(images: Images) -> list[Item]:
    """`as_images`, or the images of a folder, see `find_images`."""
    given = as_images(find_images([str(images)]) if is_folder(images) else images)
    return [Item(image, f"image {i}", 0) for i, image in enumerate(given)]


def one_column(values: Any) -> Any:
    """The column of a table that has no other; anything else as it is, a DataFrame as an array. ZooError for one with
    several columns that are not all numbers."""
    table = np.asarray(values) if hasattr(values, "columns") else values
    if table is not values and table.ndim == 2 and table.shape[1] > 1 and table.dtype.kind not in "fiub":
        names = list(values.columns)
        raise ZooError(f"This table has the columns {shorten(list(map(str, names)))}: pass one, as df[{names[0]!r}].")
    return table[:, 0] if isinstance(table, np.ndarray) and table.ndim == 2 and table.shape[1] == 1 else table


def as_images(images: Images) -> list[Any]:
    """Paths, bytes, and images of PIL, of one image or a sequence or batch. An error takes the place of what is no
    image: all that cannot be read are named together, by `check_images`."""
    one = isinstance(images, (str, Path, bytes, Mapping, Image.Image)) or hasattr(images, "read")
    if hasattr(images, "ndim"):  # a table, an array or a tensor
        images = one_column(images)
        one = _is_array_of_one(images)
    if one:
        return [_held(images)]
    with as_zoo_error(f"{type(images).__name__} is neither an image nor a list of images: {FORMS}.", TypeError):
        several = list(images)
    if not several:
        raise ZooError("No images: pass at least one.")
    return [_held(image) for image in several]


def _held(image: Any) -> Any:
    """`to_image`, but bytes as they are: many fit into memory."""
    is_file = isinstance(image, bytes) or (isinstance(image, Mapping) and image.get("bytes"))
    return image if is_file else attempted(to_image, image)


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_array_of_one(images: Images) -> bool:
    """Whether this is an array or tensor of one image, not of several, or of paths. ZooError for what may be both."""
    if not isinstance(images, torch.Tensor) and not (isinstance(images, np.ndarray) and images.dtype.kind not in "OUS"):
        return False
    if images.ndim == 3 and images.shape[0] == 3:
        shape = f"The shape {tuple(images.shape)} may be one image (3, H, W) or three grey ones (H, W)"
        raise ZooError(f"{shape}: pass images[None] for one, list(images) for three.")
    return images.ndim == 2 or (images.ndim == 3 and (images.shape[0] == 1 or images.shape[-1] in (1, 3, 4)))


def _names(classes: np.ndarray, classnames: ClassNames) -> list[str]:
    if isinstance(classnames, Mapping):
        named = {name: name for name in classnames.values()} | dict(classnames)  # labels may be the names already
        if missing := [str(label) for label in classes.tolist() if label not in named]:
            raise ZooError(f"classnames has no name for {', '.join(missing)}.")
        return [named[label] for label in classes.tolist()]
    names = list(map(str, classes.tolist())) if classnames is None else list(classnames)
    if len(names) != len(classes):
        raise ZooError(f"{len(names)} class names for {len(classes)} classes: {', '.join(map(str, classes.tolist()))}.")
    return names
