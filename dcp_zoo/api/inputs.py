"""Images and labels in the forms that people have them, as items."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcp_zoo.data import Item, Split, all_for_training, load_labelled, table_columns
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import FORMS, pixels_sha256, to_image
from dcp_zoo.data.splits import NO_CLASS
from dcp_zoo.errors import ZooError, as_zoo_error, attempted, shorten
from dcp_zoo.tables import NONE, is_none

Images = Any  # a folder with one folder per class, one image, or a sequence or batch of images, see `FORMS`
Labels = Any  # one per image, names or numbers
Groups = Any  # one per image, of any type: the same for images that were taken together
OWN_IMAGES = "folder"  # the dataset of heads trained here: images of the user's own
ClassNames = Mapping[Any, str] | Sequence[str] | None  # by label, or in the order of the labels


def list_labelled_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """The images of a folder with one folder per class: their paths, and the class of each, for
    functions such as scikit-learn's `cross_val_score`; without those in `none of these`. ZooError for no
    such folder, no class folders, a class without images, or folders `train` and `test`."""
    items, labels = with_labels(folder, None)
    return [item.path for item in items], labels


def is_folder(images: Images) -> bool:
    return isinstance(images, (str, Path)) and Path(images).is_dir()


def labelled(
    images: Images, labels: Labels = None, classnames: ClassNames = None, groups: Groups = None
) -> tuple[np.ndarray, Split]:
    """The distinct labels (C,), sorted, and the images with their labels in this order, of which `none of
    these` is no class; arguments as in `dcp_zoo.train`."""
    items, labels = with_labels(images, labels, examples=True)
    if groups is not None:
        names = np.asarray(one_column(groups)).tolist()
        if len(names) != len(items):
            raise ZooError(f"{len(items)} images need as many groups, not {len(names)}.")
        items = [item._replace(group=f"given {name}") for item, name in zip(items, names, strict=True)]
    is_example = np.array([isinstance(label, str) and is_none(label) for label in labels])
    classes, indices = np.unique(list(compress(labels, ~is_example)), return_inverse=True)
    if len(classes) < 2:
        raise ZooError(f"Training needs at least two classes, not {len(classes)}.")
    of_classes = compress(items, ~is_example)
    train = [item._replace(label=i) for item, i in zip(of_classes, indices.tolist(), strict=True)]
    no_class = list(compress(items, is_example))
    return classes, Split(OWN_IMAGES, _names(classes, classnames), train, no_class=no_class)


def with_classes(images: Images, labels: Labels, classes: Sequence[Any], names: Sequence[str] = ()) -> list[Item]:
    """Images with their labels among known classes: these, as text, too, or their `names`."""
    return _in_classes(*with_labels(images, labels), classes, names)


def among(items: Sequence[Item], names: Sequence[str], classes: Sequence[str]) -> list[Item]:
    """Images whose labels count these class names, with the labels of the classes of a head; ZooError for an
    image of a class that it does not have."""
    if list(names) == list(classes):  # of which some may be repeated
        return list(items)
    return _in_classes(items, [names[item.label] for item in items], classes)


def _in_classes(
    items: Sequence[Item], labels: Sequence[Any], classes: Sequence[Any], names: Sequence[str] = ()
) -> list[Item]:
    """Images in the classes of their labels; ZooError for a label of no class, or of several."""
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    for i, label in enumerate(classes):
        index |= {str(label): i, label: i}
    unknown = sorted({str(label) for label in labels if label not in index})
    if unknown:
        known = shorten([str(label) for label in classes])
        raise ZooError(f"No class {shorten(unknown)}: the classes are {known}. Pass images of these only.")
    repeated = [str(label) for label, count in Counter(classes).items() if count > 1 and label in labels]
    if repeated:
        raise ZooError(
            f"Several classes are named {', '.join(repeated)}, so that this label fits each: train with other names."
        )
    return [item._replace(label=index[label]) for item, label in zip(items, labels, strict=True)]


def hashed(items: Iterable[Item]) -> list[Item]:
    """Images, with a hash as key of those in memory: names do not tell these apart."""
    return [item if item.is_file else item._replace(key=pixels_sha256(item.path)) for item in items]


def with_labels(images: Images, labels: Labels, examples: bool = False) -> tuple[list[Item], Any]:
    """Images, and the label of each as it is given; or those of a dataset, or of a folder, in the order of
    `dcp-zoo train`, with `examples` of no class behind. ZooError for images without labels, for labels that
    are no names of classes, and for a path with two labels."""
    columns = table_columns(images)
    if labels is not None and (columns or is_folder(images)):
        raise ZooError("These images have labels, as class folders or in the column `label`: omit labels.")
    if columns:
        images, labels = columns
    if labels is None:
        if not isinstance(images, (str, Path)) or Path(images).is_file():
            raise ZooError("Pass labels, one per image, or a folder with one folder per class.")
        split = load_labelled("folder", images)
        if split.has_parts:
            raise ZooError(f"{images} has images for training and for a test: pass {images}/train or {images}/test.")
        found = [*all_for_training(split).train, *(split.no_class if examples else ())]
        names = [*split.classnames, NONE]  # the last one for NO_CLASS, -1
        return [Item(item.path, item.key, NO_CLASS) for item in found], [names[item.label] for item in found]
    labels = one_column(labels)
    items = unlabelled(images)
    if len(labels) != len(items):
        problem = f"{len(items)} images need as many labels, not {len(labels)}"
        raise ZooError(f"{problem}: an array (H, W) is one grey image, and features need another classifier.")
    if any(label is None or is_nan(label) for label in labels):
        raise ZooError("Some images have no label (None or NaN): leave them out, or label them.")
    values = np.asarray(labels)
    if values.ndim != 1:
        raise ZooError(f"Labels must be one-dimensional, not of shape {values.shape}.")
    if values.dtype.kind == "f" and (values % 1).any():
        raise ZooError("Labels name classes, by text or whole numbers: these are measurements.")
    last_label: dict[str, Any] = {}
    for item, label in zip(items, labels, strict=True):
        if item.is_file and last_label.setdefault(item.path, label) != label:
            raise ZooError(f"{item.path} has two labels, {last_label[item.path]!r} and {label!r}: keep one of them.")
    return items, labels


def unlabelled(images: Images) -> list[Item]:
    """Images of paths, bytes, and PIL, of one image, of a sequence or batch, or in a folder, see `find_images`; with
    keys by their paths or positions. An error takes the place of what is no image: all that cannot be read are
    named together, by `refuse`."""
    if is_folder(images):
        images = find_images([str(images)])
    is_one = isinstance(images, (str, Path, bytes, Mapping, Image.Image)) or hasattr(images, "read")
    if hasattr(images, "ndim"):  # a table, an array or a tensor
        images = one_column(images)
        is_one = _is_array_of_one(images)
    if is_one:
        images = [images]
    with as_zoo_error(f"{type(images).__name__} is neither an image nor a list of images: {FORMS}.", TypeError):
        opened: list[Any] = [attempted(to_image, image) for image in images]
    if not opened:
        raise ZooError("No images: pass at least one.")
    return [Item(image, image if isinstance(image, str) else f"image {i}", NO_CLASS) for i, image in enumerate(opened)]


def one_column(values: Any) -> Any:
    """The column of a table; anything else as it is. ZooError for a DataFrame with several columns."""
    if hasattr(values, "columns"):
        names = list(values.columns)
        if len(names) > 1:
            raise ZooError(f"This table has the columns {shorten([*map(str, names)])}: pass one, as df[{names[0]!r}].")
        values = np.asarray(values)
    is_column = isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1
    return values[:, 0] if is_column else values


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_array_of_one(images: Images) -> bool:
    """Whether this is an array or tensor of one image, not of several, or of paths. ZooError for what may be
    both."""
    kind = getattr(images.dtype, "kind", "f")  # torch's types have none
    if kind in "OUS" or images.ndim not in (2, 3):
        return False
    if images.ndim == 2:
        return True
    if images.shape[0] == 3:
        raise ZooError(
            f"The shape {tuple(images.shape)} may be one image (3, H, W) or three grey ones (H, W): pass images[None] "
            "for one, list(images) for three."
        )
    return images.shape[0] == 1 or images.shape[-1] in (1, 3, 4)


def _names(classes: np.ndarray, classnames: ClassNames) -> list[str]:
    """The name of each class that CLIP reads, by default its label."""
    labels = classes.tolist()
    if classnames is None:
        return [str(label) for label in labels]
    if isinstance(classnames, Mapping):
        missing = [str(label) for label in labels if label not in classnames]
        if missing:
            raise ZooError(f"classnames has no name for {', '.join(missing)}.")
        return [classnames[label] for label in labels]
    names = list(classnames)
    if len(names) != len(labels):
        raise ZooError(f"{len(names)} class names for {len(labels)} classes: {', '.join(map(str, labels))}.")
    return names
