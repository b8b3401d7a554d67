"""A few-shot image classifier with scikit-learn's conventions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from dcp_zoo.answers import Outputs, Promises
from dcp_zoo.api.functions import train_labelled
from dcp_zoo.api.inputs import (
    Groups,
    Images,
    Labels,
    is_nan,
    labelled,
    unlabelled,
    with_classes,
    with_labels,
)
from dcp_zoo.backbone._torch import out_of_inference_mode
from dcp_zoo.data import Split
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.features.cache import kept_features
from dcp_zoo.fields import Values
from dcp_zoo.files import packed, unpacked
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.heads import loaded, outputs_of
from dcp_zoo.prediction.together import refined
from dcp_zoo.progress import Progress, bar
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.methods.table import DEFAULT_METHOD, RecipeLike
from dcp_zoo.training.run import RunOptions
from dcp_zoo.training.task import Callback, Epoch

SEEDS = 2**31  # how many there are to draw from
Weights = ArrayLike | None  # of images
LABELS = "labels"  # in a checkpoint's info: those of `classes_`, where they are not the class names


class FewShotClassifier(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin, BaseEstimator):
    """A classifier for images, trained on a few per class, that works wherever scikit-learn's classifiers
    do.

    Images are a folder with one folder per class, or a sequence of paths, PIL images, arrays or tensors;
    paths may also be a DataFrame with one column.

    Args:
        model, classifier, recipe, classnames, callbacks, device, precision, encoder: see `dcp_zoo.train`.
        method: also see there; any name in `dcp_zoo.training.METHODS`.
        batch_size: images per forward pass when it classifies: fewer need less memory; it does not affect
            the predictions.
        random_state: seed of all randomness; or, as in scikit-learn, a RandomState or Generator, or None for
            NumPy's own, from which each fit takes a seed.
        memory: a folder, or joblib.Memory, that keeps image features for later processes; False keeps none.
            By default up to 512 MB are kept within a process: further fits, folds and methods on the same
            images are fast.
        verbose: show progress bars. Default: in a terminal or notebook.
        errors: "raise" `dcp_zoo.UnreadableImages`, as scikit-learn does for bad rows; it names all images
            that cannot be read. Or "keep" on without them, with a warning: their labels, probabilities and
            features are NaN, and `fit` and `score` leave them out.

    Attributes:
        classes_: the labels, sorted (C,).
        model_: the trained model.
        history_: every epoch in which prompts were trained, see `dcp_zoo.training.Epoch`; empty if none
            were.
    """

    def __init__(
        self,
        model: str = "dcp_mini",
        method: str = DEFAULT_METHOD,
        *,
        classifier: str | None = None,
        recipe: RecipeLike = None,
        classnames: Sequence[str] | None = None,
        callbacks: Sequence[Callback] | None = None,
        encoder: str | Sequence[str] | None = None,
        batch_size: int = 64,
        random_state: int | np.random.RandomState | np.random.Generator | None = 1,
        device: str = "auto",
        precision: str = "auto",
        memory: Any = None,
        verbose: bool | None = None,
        errors: str = "raise",
    ) -> None:
        self.model = model
        self.method = method
        self.classifier = classifier
        self.recipe = recipe
        self.classnames = classnames
        self.callbacks = callbacks
        self.encoder = encoder
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.precision = precision
        self.memory = memory
        self.verbose = verbose
        self.errors = errors

    @fair_threads()
    @out_of_inference_mode()
    def fit(
        self,
        images: Images,
        labels: Labels = None,
        sample_weight: Weights = None,
        groups: Groups = None,
        *,
        validation: Images = None,
    ) -> "FewShotClassifier":
        """Train on labelled images: in seconds for methods on frozen features, in minutes for DCP. ZooError
        for bad input, an unknown model or method, or images that cannot be read.

        Args:
            images, labels: see `dcp_zoo.train`.
            sample_weight: what the loss of each image is multiplied with (n,); of a text probe alone, as by
                default. Images with weight 0 are left out.
            groups: see `dcp_zoo.train`. With scikit-learn's metadata routing, `set_fit_request(groups=True)`
                passes those of `cross_val_score` and `GridSearchCV` on.
            validation: (images, labels), or a folder, on which some methods choose their hyperparameters.
                Not the images of a test.
        """
        classes, split = labelled(images, labels, self.classnames, groups)
        if sample_weight is not None:
            split, sample_weight = weighted(split, sample_weight)
        history: list[Epoch] = []
        with kept_features(self.memory):
            self.model_ = train_labelled(
                split,
                classes,
                validation,
                self.model,
                self.method,
                RunOptions(progress=self._progress(), callbacks=self.callbacks or ()),
                history=lambda model, epoch: history.append(epoch),
                recipe=self.recipe,
                classifier=self.classifier,
                device=self.device,
                precision=self.precision,
                encoder=self.encoder,
                errors=self.errors,
                sample_weight=sample_weight,
                seed=seed_of(self.random_state),
            )
        self.history_ = history
        self.classes_ = classes
        return self

    def predict_proba(self, images: Images, *, together: bool = False) -> np.ndarray:
        """Probabilities (n, C) in the order of `classes_`; `together`: see `dcp_zoo.predict`."""
        outputs = self._outputs(images)
        return refined(outputs, np.full(len(outputs.logits), together))

    def decision_function(self, images: Images) -> np.ndarray:
        """Logits (n, C) in the order of `classes_`; of two classes, how far the second is ahead (n,)."""
        logits = self._outputs(images).logits
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def transform(self, images: Images) -> np.ndarray:
        """The features (n, F) that the classifier reads, of length 1, for another classifier in a
        pipeline."""
        features = self._outputs(images).features
        assert features is not None  # a fitted head has stored statistics
        return features

    @property
    def _n_features_out(self) -> int:
        """For `get_feature_names_out`, and `set_output`."""
        return self._head().num_features

    def _outputs(self, images: Images, reject: float | None = None) -> Outputs:
        """The outputs for images, NaN for those that cannot be read."""
        head = self._head()
        items = unlabelled(images)
        with kept_features(self.memory):
            outputs, _ = outputs_of(
                head,
                items,
                self.batch_size,
                self.precision,
                self._progress(),
                self.errors,
                reject,
            )
        return outputs

    def predict(self, images: Images, *, reject: float | None = None) -> np.ndarray:
        """The most probable label of each image (n,); with `reject`, None for images of none of the classes,
        see `dcp_zoo.predict`. ZooError for `reject`, and a head without a threshold for its classes."""
        outputs = self._outputs(images, reject)
        labels = self.classes_[outputs.logits.argmax(-1)]
        broken = np.isnan(outputs.logits[:, 0])
        if outputs.rejected is not None:
            labels = labels.astype(object)
            labels[outputs.rejected] = None
        if broken.any():
            labels = labels.astype(object)
            labels[broken] = np.nan
        return labels

    def predict_set(self, images: Images, coverage: float = 0.9) -> list[np.ndarray]:
        """The labels that each of n images may have, the most probable first: the fewest with which this
        share of images like those of training, 0.8, 0.9 or 0.95, have theirs in the set; over all images, not
        for each class. Empty for images that `predict` rejects, and those that cannot be read. ZooError for a
        classifier that does not promise it, such as one of too few images."""
        least = Promises.of(self._head().promises, coverage).included
        assert least is not None
        return [self.classes_[positions] for positions in self._outputs(images).sets(least)]

    def score(self, images: Images, labels: Labels = None, sample_weight: Weights = None) -> float:
        """Accuracy from 0 to 1 on labelled images, which may be a folder with one folder per class, by its
        name or its label. As in scikit-learn, training images count as well: for an honest figure pass new
        ones. ZooError for a folder of another class."""
        if labels is None:
            items = with_classes(images, None, self.classes_.tolist(), self._head().classnames)
            labels = self.classes_[[item.label for item in items]]
        else:
            items, labels = with_labels(images, labels)
        predicted = self.predict([item.path for item in items])
        weights = np.ones(len(predicted)) if sample_weight is None else np.asarray(sample_weight)
        check_consistent_length(predicted, weights)
        readable = [i for i, label in enumerate(predicted) if not is_nan(label)]
        if not readable:
            raise ZooError("None of these images can be read: pass readable ones.")
        true = np.asarray(labels)[readable]
        labels = predicted[readable].astype(self.classes_.dtype)
        return float(accuracy_score(true, labels, sample_weight=weights[readable]))

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write a checkpoint, which `load`, `dcp_zoo.create_model` and the command line read. ZooError for a
        folder that has another one, unless `overwrite`, or that is not writable."""
        model = self._head()
        info: Values = {}
        labels = self.classes_.tolist()
        if labels != model.classnames:
            info[LABELS] = list(zip(model.classnames, labels, strict=True))
        return model.save_pretrained(folder, overwrite=overwrite, **info)

    @classmethod
    def load(cls, folder: str | Path, **params: Any) -> "FewShotClassifier":
        """A fitted classifier from a checkpoint; `params` are arguments of the class, such as device="cuda".
        ZooError for no checkpoint, a damaged one, or one with other classes than it was fitted to."""
        model = loaded(f"local-dir:{folder}", params.get("device", "auto"))
        stored: Values = {
            "method": model.method,
            "classifier": "text-probe" if model.text_probe else "none",
            "encoder": [encoder.source for encoder in model.image_encoders] or None,
        }
        self = cls(model.encoder.architecture, **(stored | params))
        self.model_ = model
        self.history_ = []
        labels = np.asarray(_labels(model))
        order = np.argsort(labels, kind="stable")  # as scikit-learn's scores expect them
        self.classes_ = labels[order]
        names = [model.classnames[i] for i in order]
        if names != model.classnames:
            model.set_classnames(names)
        return self

    def _head(self) -> Head:
        check_is_fitted(self)
        return self.model_

    def _progress(self) -> Progress:
        return bar if self.verbose is None else partial(bar, disable=not self.verbose)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.no_validation = True
        return tags

    def __getstate__(self) -> Values:
        """For pickle: a head as the files of its checkpoint, without CLIP's weights."""
        state = super().__getstate__()
        if "model_" in state:
            with TemporaryDirectory() as folder:
                self.save(folder)
                state = state | {"model_": packed(Path(folder).iterdir())}
        return state

    def __setstate__(self, state: Values) -> None:
        files = state.get("model_")
        if isinstance(files, dict):
            with unpacked(files) as folder:
                state = state | {"model_": loaded(f"local-dir:{folder}", state["device"])}
        super().__setstate__(state)


def weighted(split: Split, sample_weight: Weights) -> tuple[Split, tuple[float, ...]]:
    """The images whose weight is above 0, and these weights. ZooError unless there is one for each image."""
    if split.no_class:
        raise ZooError("Images of none of these have no weights: omit sample_weight, or these images.")
    weights = np.asarray(sample_weight, float)
    if weights.shape != (len(split.train),) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ZooError(f"sample_weight needs {len(split.train)} numbers from 0, one per image.")
    used = replace(split, train=list(compress(split.train, weights)))
    if len({item.label for item in used.train}) < 2:
        raise ZooError("sample_weight leaves images of fewer than two classes: raise some of the weights above 0.")
    return used, tuple(weights[weights > 0].tolist())


def seed_of(random_state: object) -> int:
    """A seed: the integer itself, or one drawn from a random state of NumPy's. ZooError for anything
    else."""
    if isinstance(random_state, Integral) and int(random_state) >= 0:
        return int(random_state)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(SEEDS))
    with as_zoo_error("random_state: {}. Pass an integer from 0, a RandomState, a Generator or None.", ValueError):
        return int(check_random_state(random_state).randint(SEEDS))


def _labels(model: Head) -> list[Any]:
    """The labels of a head's classes: those that `save` stored, or the names."""
    pairs: list[Any] = model.info.get(LABELS) or [(name, name) for name in model.classnames]
    if [name for name, _ in pairs] != model.classnames:
        raise ZooError("The labels of these classes are not known, as others were trained on: fit again.")
    return [label for _, label in pairs]
