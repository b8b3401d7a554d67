"""Zero-shot CLIP (Radford et al., 2021): class names in one or several prompt templates; nothing is trained."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames
from dcp_zoo.training.methods.base import CosineClassifier, Task

# the seven templates that CLIP's authors selected on ImageNet, as used by Tip-Adapter
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ZeroShot(CosineClassifier):
    """Cosine between image features and the text features of the class names, of a CLIP that a method has trained or
    the task's. With `templates` besides the dataset's, a class is the normalised mean of its normalised features."""

    def __init__(self, task: Task, templates: Sequence[str] = (), clip: FrozenCLIP | None = None) -> None:
        super().__init__(task, clip)
        self.template, self.templates = task.template, templates
        self.set_classnames(task.classnames)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.template = template or self.template
        names = check_classnames(classnames)
        texts = [self.clip.zero_shot_classifier(names, t) for t in (self.template, *self.templates)]
        self.text = F.normalize(torch.stack(texts).mean(0), dim=-1)


def fit(task: Task) -> ZeroShot:
    return ZeroShot(task)


fit_probe = fit  # and the stage that its recipe names


def fit_ensemble(task: Task) -> ZeroShot:
    return ZeroShot(task, ENSEMBLE)
