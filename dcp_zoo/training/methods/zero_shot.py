"""Zero-shot CLIP, with one prompt or eight; and SS-Text, which adds the training images with nothing to
choose."""

import torch
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import FITTED, Method, plain
from dcp_zoo.training.task import Task

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
    """The cosine between an image and the name of each class. With image features f (B, E), text features
    t_c (E,) of the class names in a template, and s = exp(logit_scale):

        logits_c = s f t_c^T                                                 (B,)
    """
    return task.text_head(task.text, texts=task.texts)


def fit_ensemble(task: Task) -> LinearHead:
    """t_c is the normalised mean over the dataset's template and the seven that CLIP's authors selected on
    ImageNet, as used by Tip-Adapter. Sentences of the classes take the place of all templates."""
    texts: Texts = (task.texts, *ENSEMBLE) if isinstance(task.texts, str) else task.texts
    return task.text_head(task.clip.zero_shot_classifier(task.classnames, texts), texts=texts)


@torch.no_grad()
def fit_ss_text(task: Task) -> LinearHead:
    """SS-Text: text features plus training features. With image features f (B, E), text features t_c (E,) of
    the classes, s = exp(logit_scale), and n training images, of which n_c are of class c and have features
    that sum to m_c:

        w_c      = t_c + s n_c / n m_c                                       (E,)
        logits_c = s f w_c^T / |w_c|                                         (B,)

    w minimises the linear part of the cross-entropy, -s f w_y^T in the mean over the training images, plus
    the sum over the classes of |w_c - t_c|^2 / (2 n_c): the fewer images a class has, the closer it stays to
    its text.
    """
    features = task.embeddings(task.train)
    one_hot = F.one_hot(task.train.labels, len(task.classnames)).to(features)  # (n, C)
    strength = task.clip.clip.logit_scale.exp() * one_hot.mean(0)  # (C,), s n_c / n
    weight = task.text + strength[:, None] * (one_hot.T @ features)
    return task.text_head(F.normalize(weight, dim=-1))


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
ZERO_SHOT = Method("zero-shot", "Zero-shot", PAPER, fit, trains=False, features=plain)
ZERO_SHOT_ENSEMBLE = Method("zero-shot-ensemble", "Zero-shot, 8 prompts", PAPER, fit_ensemble, trains=False)

PAPER = (
    "Silva-Rodriguez et al., Few-Shot, Now for Real: Medical VLMs Adaptation without Balanced Sets or Validation, "
    "MICCAI 2025"
)
SS_TEXT = Method("ss-text", "SS-Text", PAPER, fit_ss_text, abilities=FITTED, features=plain)
