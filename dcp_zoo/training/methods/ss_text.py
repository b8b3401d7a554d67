"""SS-Text (Silva-Rodriguez et al., MICCAI 2025): text features plus training features, with nothing to choose.

With image features f (B, E), text features t_c (E,) of the classes, s = exp(logit_scale), and n training images, of
which n_c are of class c and have features that sum to m_c (E,):

    w_c      = t_c + s n_c / n m_c                                           (E,)
    logits_c = s f w_c^T / |w_c|                                             (B,)

w minimises the linear part of the cross-entropy, -s f w_y^T in the mean over the training images, plus the sum over the
classes of |w_c - t_c|^2 / (2 n_c): the fewer images a class has, the closer it stays to its text.
"""

import torch
from torch.nn import functional as F

from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import FITTED, Method, Task


@torch.no_grad()
def fit(task: Task) -> LinearHead:
    features, classes = task.train_features, len(task.classnames)
    one_hot = F.one_hot(task.train_labels, classes).to(features)  # (n, C)
    strength = task.clip.clip.logit_scale.exp() * one_hot.mean(0)  # (C,)
    return task.text_head(F.normalize(task.text + strength[:, None] * (one_hot.T @ features), dim=-1))


PAPER = (
    "Silva-Rodriguez et al., Few-Shot, Now for Real: Medical VLMs Adaptation without Balanced Sets or Validation, "
    "MICCAI 2025"
)
SS_TEXT = Method("ss-text", "SS-Text", PAPER, fit, abilities=FITTED, features=True)
