"""Any method as a head: what it learnt as a `LinearHead`, which is saved, loaded, fused and exported like a DCP; and
the classifier that is fitted on a head's image features."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.head import Head
from dcp_zoo.model.linear_head import TOWER, LinearHead
from dcp_zoo.model.names import Texts
from dcp_zoo.training.evaluation import EVAL_BATCH, eval_batch, predict, predict_modes
from dcp_zoo.training.methods.base import FeatureClassifier, Task
from dcp_zoo.training.methods.zero_shot import ZeroShot
from dcp_zoo.training.recipes import NOT_LEARNT, TrainingRecipe
from dcp_zoo.training.sources import ImageSource
from dcp_zoo.training.stage import fit_stage, image_features, on_cpu, text_probe

AnyHead = TypeVar("AnyHead", bound=Head)


class HeadClassifier:
    """A head as the `Classifier` of a method; `images` are the training images without augmentation, for the head."""

    def __init__(self, head: Head, task: Task, images: ImageSource, info: dict[str, Any]) -> None:
        self.head, self.images, self.progress, self.info = head.eval(), images, task.progress, info
        self.batch_size = getattr(task.recipe, "eval_batch_size", EVAL_BATCH)

    def logits(self, source: ImageSource) -> Tensor:
        """Logits (n, C) of all images, with the stored statistics or in batches of the recipe's `eval_batch_size`."""
        return predict(source.for_model(self.head), eval_batch(self.head, self.batch_size), progress=self.progress)

    def logits_by_mode(self, source: ImageSource) -> dict[str, Tensor]:
        """Logits (n, C) of all images in each way that a head is measured, see `predict_modes`."""
        return predict_modes(source.for_model(self.head), self.batch_size, self.progress)

    def linear(self) -> tuple[Tensor, Tensor]:
        return self.head.text_linear()

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.head.set_classnames(classnames)


def as_head(method: str, classifier: Any, task: Task) -> Head:
    """What a method learnt on a task, as a head on the task's CLIP, or on a copy if it changed the image tower."""
    if isinstance(classifier, HeadClassifier):
        classifier.head.info = dict(classifier.info)
        return classifier.head
    if isinstance(classifier, WithStage):
        head = as_head(method, classifier.before, task)
        head.info, head.classifier = dict(classifier.info), classifier.stage
        return head
    clip, (weight, bias) = classifier.clip, classifier.linear()
    changed = changed_tower(clip, task.clip)
    tensors = {"weight": weight.detach().contiguous(), "bias": bias.detach()} | changed
    prompts: list[Tensor] = classifier.image_prompts() if hasattr(classifier, "image_prompts") else []
    if prompts:
        tensors["prompts"] = torch.stack(clip.entering(prompts))
    head = LinearHead(
        copy.deepcopy(task.clip.clip) if changed else task.clip.clip,
        task.classnames,
        tensors,
        method=method,
        template=task.template if isinstance(classifier, ZeroShot) and classifier.is_frozen else "",
        tokenizer=clip.tokenizer,
    )
    head.info = dict(classifier.info)
    return as_of(task.clip, head)


def as_of(clip: FrozenCLIP, head: AnyHead) -> AnyHead:
    """A new head, on the device of the CLIP that it was made on, and with its name, weights id and preprocessing."""
    head.architecture, head.clip_source = clip.architecture, clip.clip_source
    classes = {"architecture": head.architecture, "num_classes": head.num_classes, "label_names": head.classnames}
    head.pretrained_cfg = head.default_cfg = clip.pretrained_cfg | classes
    return head.to(clip.device)


def with_stage(method: str, classifier: Any, task: Task) -> Any:
    """A method's classifier followed by the stage, fitted to its features of the task's images, see `text_probe`."""
    if isinstance(classifier, FeatureClassifier) and classifier.is_frozen:
        return WithStage(classifier, task)
    head = as_head(method, classifier, task)
    images = classifier.images if isinstance(classifier, HeadClassifier) else task.plain_train.for_model(head)
    found = fit_stage(images, task.val, task.progress)
    return HeadClassifier(head, task, images, classifier.info | {"classifier": found})


class WithStage(FeatureClassifier):
    """A classifier on frozen image features, followed by the stage."""

    def __init__(self, before: FeatureClassifier, task: Task) -> None:
        super().__init__(task)
        self.before, self.names = before, list(task.classnames)
        train = task.plain_train
        val = None if task.val is None else (self.features(task.val), task.val.labels)
        views, text = image_features(train, task.progress), on_cpu(before.linear())
        self.stage, found = text_probe(self.names, views, train.labels, text, val)
        self.info = before.info | {"classifier": found}

    def linear(self) -> tuple[Tensor, Tensor]:
        return self.stage.to(self.clip.device).linear(self.before.linear(), self.names)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.before.set_classnames(classnames, template)
        self.names = list(classnames)


def changed_tower(clip: FrozenCLIP, original: FrozenCLIP) -> dict[str, Tensor]:
    """The tensors of the image tower that a method changed."""
    if clip is original:
        return {}
    before = original.visual.state_dict()
    return {f"{TOWER}{name}": t for name, t in clip.visual.state_dict().items() if not torch.equal(t, before[name])}


def check_learnt(head: Head, task: Task) -> None:
    """Warn if a method with a schedule has not learnt its training images, see `warn_if_not_learnt`."""
    length = next((name for name in ("steps", "epochs") if hasattr(task.recipe, name)), "")
    if not length or task.train is None:
        return
    train = task.plain_train
    recipe = task.recipe.fitted(len(train.items), train.num_classes)
    value = recipe.num_epochs if isinstance(recipe, TrainingRecipe) else getattr(recipe, length)
    logits = predict(train.for_model(head), EVAL_BATCH, progress=task.progress)
    warn_if_not_learnt(F.cross_entropy(logits, train.labels).item(), train.num_classes, length, value)


def warn_if_not_learnt(loss: float, classes: int, length: str, value: int) -> None:
    """Warn, with the next step, if the loss on the training images at the end is above `NOT_LEARNT` of that of a random
    guess among the classes. The recipe's field `length` had this `value`."""
    guess = math.log(max(classes, 2))
    if loss > NOT_LEARNT * guess:
        warnings.warn(
            f"The training images are not learnt: their loss is {loss:.2f} at the end, where guessing gives "
            f"{guess:.2f}. Train longer (--set {length}={3 * value}; in Python recipe={{'{length}': {3 * value}}}), or "
            "check that the labels are right.",
            stacklevel=3,
        )
