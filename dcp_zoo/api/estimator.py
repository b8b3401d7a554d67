"""A few-shot image classifier with scikit-learn's conventions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.progress import track
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from dcp_zoo.api.functions import ClassWeights, RecipeLike, as_model, as_recipe, logits_of, own_run, train
from dcp_zoo.api.inputs import Labelled, is_folder, labelled, list_labelled_images, read_images
from dcp_zoo.data import Item, load_image
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model.classifier import in_distribution_score
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.training.callbacks import Callback, History
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.heads import method_task, train_method
from dcp_zoo.training.run import Run
from dcp_zoo.training.sources import ImageSource, Progress, no_progress
from dcp_zoo.zoo.factory import create_transform

LABELS = "labels"  # in a checkpoint's info: those of `classes_`, where they are not the class names


class CacheModel:
    """The classifier of a method that keeps its training images, and so cannot be a head."""

    def __init__(self, method: str, run: Run, changes: Mapping[str, Any], progress: Progress) -> None:
        task = method_task(method, run, run.split, changes, progress)
        self.clip, self.classifier = task.clip, METHODS[method].fit(task)

    def logits(self, items: Sequence[Item]) -> torch.Tensor:
        """Logits (n, C) of the items' images, on the CPU."""
        return self.classifier.logits(ImageSource(self.clip, items, create_transform(self.clip)))


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A classifier for images, trained on a few per class, that works wherever scikit-learn's classifiers do.

    Images are a folder with one folder per class, or a sequence of paths, PIL images, arrays or tensors.

    Args:
        model: a model of the zoo, such as "dcp_mini" or "dcp_vitb16".
        method: "dcp", or another name in `dcp_zoo.training.methods.METHODS`, such as "gda", which trains in a second.
        recipe: changes to the method's recipe, such as {"lr": 1e-3}; for DCP also what `dcp_zoo.train` takes.
        classnames: names of the classes, which CLIP reads: by label, or in the order of the sorted labels. Default: the
            labels.
        class_weight: as in `dcp_zoo.train`, "balanced" or weights by label; only with DCP.
        callbacks: see `dcp_zoo.train`; only with DCP.
        batch_size: images per batch when it classifies; it does not affect the answers.
        random_state: seed of all random draws.
        device: "auto", "cpu", "cuda" or "mps".
        precision: of training: "float32", "bfloat16" or "float16".
        verbose: show progress bars.

    Attributes:
        classes_: the labels, sorted (C,).
        model_: the trained model.
        history_: every epoch of DCP's training, see `dcp_zoo.training.callbacks.Epoch`.
    """

    def __init__(
        self,
        model: str = "dcp_mini",
        method: str = "dcp",
        *,
        recipe: RecipeLike = None,
        classnames: Any = None,
        class_weight: ClassWeights = None,
        callbacks: Sequence[Callback] | None = None,
        batch_size: int = 64,
        random_state: int = 1,
        device: str = "auto",
        precision: str = "float32",
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.method = method
        self.recipe = recipe
        self.classnames = classnames
        self.class_weight = class_weight
        self.callbacks = callbacks
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.verbose = verbose

    def fit(self, images: Any, labels: Any = None, *, validation: Any = None) -> "FewShotClassifier":
        """Train on labelled images.

        Args:
            images: a folder with one folder per class, or a sequence of images.
            labels: one per image, names or numbers; omitted for a folder.
            validation: (images, labels), or a folder, for DCP's callbacks, curve and classifier stage; other methods
                choose their hyperparameters on them. Not the images of a test.

        Raises:
            ZooError: bad input, an unknown model or method, or images that cannot be read.
        """
        check_choice("method", self.method, tuple(METHODS))
        data = labelled(images, labels, self.classnames)
        if self.method == "dcp":
            self._fit_dcp(data, validation)
        else:
            self._fit_other(data, validation)
        self.classes_ = data.classes
        return self

    def _fit_dcp(self, data: Labelled, validation: Any) -> None:
        history = History()
        self.model_: Any = train(
            self.model,
            [item.path for item in data.items],
            data.classes[[item.label for item in data.items]],
            classnames=data.names,
            recipe=self.recipe,
            validation=validation,
            callbacks=[history, *(self.callbacks or ())],
            class_weight=self.class_weight,
            seed=self.random_state,
            device=self.device,
            precision=self.precision,
            progress=self._progress(),
        )
        self.history_ = history.epochs

    def _fit_other(self, data: Labelled, validation: Any) -> None:
        if self.class_weight is not None or self.callbacks:
            raise ZooError(f"{self.method} has neither class_weight nor callbacks: only dcp does.")
        if not (self.recipe is None or isinstance(self.recipe, Mapping)):
            raise ZooError(f"The recipe of {self.method} takes changes, such as {{'augment': 'none'}}.")
        recipe = as_recipe(None, self.model)  # of DCP, which others do not use
        run = own_run(self.model, data, validation, self.random_state, self.device, self.precision, recipe)
        if METHODS[self.method].linear:
            self.model_ = train_method(self.method, run, self.recipe or {}, None, progress=self._progress())
        else:
            self.model_ = CacheModel(self.method, run, self.recipe or {}, self._progress())

    def predict_proba(self, images: Any) -> np.ndarray:
        """Probabilities (n, C) in the order of `classes_`."""
        return self._logits(images).softmax(-1).numpy()

    def _logits(self, images: Any) -> torch.Tensor:
        check_is_fitted(self)
        items = [Item(image, str(i), 0) for i, image in enumerate(read_images(images))]
        if isinstance(self.model_, CacheModel):
            return self.model_.logits(items)
        return logits_of(self.model_, items, self.batch_size, self._progress())

    def predict(self, images: Any, *, reject: bool = False) -> np.ndarray:
        """The most probable label of each image (n,); with `reject`, None for images that belong to none of the
        classes.

        Raises:
            ZooError: `reject`, and a head without a threshold for its classes, as after `add_class`.
        """
        threshold = self._head("reject images").rejection_threshold() if reject else None
        logits = self._logits(images)  # says if nothing is fitted
        labels = self.classes_[logits.softmax(-1).numpy().argmax(-1)]
        if threshold is not None:
            labels = labels.astype(object)
            labels[(in_distribution_score(logits) < threshold).numpy()] = None
        return labels

    def score(self, images: Any, labels: Any = None, sample_weight: Any = None) -> float:
        """Accuracy from 0 to 1 on labelled images, which may be a folder with one folder per class."""
        if is_folder(images) and labels is None:
            images, labels = list_labelled_images(images)
        return super().score(images, labels, sample_weight)

    def add_class(self, label: Any, images: Any, name: str | None = None) -> "FewShotClassifier":
        """Add a class from a few images, without training.

        Args:
            label: of the new class.
            images: see `fit`.
            name: what CLIP reads. Default: the label.

        Raises:
            ZooError: a label that is known already, or a head without a classifier stage, which dcp and gda have.
        """
        model = self._head("add a class")
        name = str(label) if name is None else name
        if np.asarray(label).dtype.kind != self.classes_.dtype.kind:
            raise ZooError(
                f"The label {label!r} is of another type than {self.classes_.tolist()[0]!r}: labels are alike."
            )
        if label in self.classes_ or name in model.classnames:
            raise ZooError(f"The class {label} exists already, by its label or its name: fit again to change it.")
        transform = create_transform(model)
        batch = torch.stack([transform(load_image(image)) for image in read_images(images)])
        model.add_class(name, batch)
        self.classes_ = np.append(self.classes_, label)
        return self

    def remove_class(self, label: Any) -> "FewShotClassifier":
        """Remove a class and its scores; ZooError for an unknown label, or the only one."""
        model, labels = self._head("remove a class"), self.classes_.tolist()
        check_choice("class", label, labels)
        index = labels.index(label)
        model.remove_class(model.classnames[index])
        self.classes_ = np.delete(self.classes_, index)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint, which `load`, `dcp_zoo.create_model` and the command line read.

        Raises:
            ZooError: a method that cannot be a head, or a folder that is not writable.
        """
        model = self._head("be saved")
        labels = zip(model.classnames, self.classes_.tolist(), strict=True)
        info = model.info | {LABELS: [list(pair) for pair in labels]}
        return model.save_pretrained(folder, **info)

    @classmethod
    def load(cls, folder: str | Path, **params: Any) -> "FewShotClassifier":
        """A fitted classifier from a checkpoint; `params` are those of the class, such as device="cuda".

        Raises:
            ZooError: no checkpoint, a damaged one, or one with a class whose label is not known.
        """
        model = as_model(f"local-dir:{folder}", params.get("device", "auto"))
        self = cls(model.architecture, **({"method": model.info.get("method", "dcp")} | params))
        self.model_, self.history_ = model, []
        self.classes_ = np.asarray(_labels(model))
        return self

    def _head(self, purpose: str) -> DCP | LinearHead:
        check_is_fitted(self)
        if isinstance(self.model_, CacheModel):
            raise ZooError(f"A classifier with method={self.method!r} cannot {purpose}: use dcp or gda, for example.")
        return self.model_

    def _progress(self) -> Progress:
        return track if self.verbose else no_progress

    # ------------------------------------------------------------------------------------------------- for scikit-learn

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        tags.no_validation = True
        return tags

    def _more_tags(self) -> dict[str, Any]:
        """The same for scikit-learn before 1.6."""
        return {"X_types": ["string"], "no_validation": True}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a head as the files of its checkpoint, without CLIP's weights."""
        state = super().__getstate__()
        if isinstance(state.get("model_"), (DCP, LinearHead)):
            with TemporaryDirectory() as folder:
                self.save(folder)
                state = state | {"model_": {path.name: path.read_bytes() for path in Path(folder).iterdir()}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(files := state.get("model_"), dict):
            with TemporaryDirectory() as folder:
                for name, content in files.items():
                    (Path(folder) / name).write_bytes(content)
                state = state | {"model_": as_model(f"local-dir:{folder}", state["device"])}
        super().__setstate__(state)


def _labels(model: Any) -> list[Any]:
    """The labels of a head's classes: those that `save` stored, or the names."""
    pairs: list[Any] = model.info.get(LABELS, [])
    if pairs and not isinstance(pairs[0], list):  # before they were stored with the names
        pairs = list(zip(model.classnames, pairs, strict=True))
    if [name for name, _ in pairs] == model.classnames:
        return [label for _, label in pairs]
    known = dict(pairs)
    if all(isinstance(label, str) for label in known.values()):
        return [known.get(name, name) for name in model.classnames]
    if unknown := [name for name in model.classnames if name not in known]:
        raise ZooError(
            f"No label is stored for {', '.join(unknown[:5])}: add classes with FewShotClassifier.add_class."
        )
    return [known[name] for name in model.classnames]
