"""Zero-shot CLIP (Radford et al., ICML 2021): the cosine between an image and the name of each class.

With image features f (B, E), text features t_c (E,) of the class names in a template, and s = exp(logit_scale):

    logits_c = s f t_c^T                                                     (B,)

Zero-shot with 8 prompts: t_c is the normalised mean over the dataset's template and the seven that CLIP's authors
selected on ImageNet, as used by Tip-Adapter.
"""

import torch
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import Method, Task

ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def fit(task: Task) -> LinearHead:
    return task.text_head(task.text, texts=task.texts)


def fit_ensemble(task: Task) -> LinearHead:
    own = task.texts
    texts: Texts = (own, *ENSEMBLE) if isinstance(own, str) else own
    found = [task.clip.zero_shot_classifier(task.classnames, template) for template in (own, *ENSEMBLE)]
    return task.text_head(F.normalize(torch.stack(found).mean(0), dim=-1), texts=texts)


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
ZERO_SHOT = Method("zero-shot", "Zero-shot", PAPER, fit, trains=False, features=True)
ZERO_SHOT_ENSEMBLE = Method("zero-shot-ensemble", "Zero-shot, 8 prompts", PAPER, fit_ensemble, trains=False)
