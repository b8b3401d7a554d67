"""The methods that DCP is compared with: one table, each method a module, all with the same images and seeds."""

from . import linear_probe, zero_shot
from .base import Classifier, Method, PlainCLIP, Task, plain_clip

__all__ = ["METHODS", "Classifier", "Method", "PlainCLIP", "Task", "plain_clip"]

CLIP_PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"

METHODS = {
    method.name: method
    for method in (
        Method("zero-shot", "Zero-shot CLIP", CLIP_PAPER, False, True, zero_shot.recipe, zero_shot.fit),
        Method(
            "zero-shot-ensemble",
            "Zero-shot CLIP, 8 templates",
            CLIP_PAPER,
            False,
            True,
            zero_shot.recipe,
            zero_shot.fit_ensemble,
        ),
        Method("linear-probe", "Linear probe", CLIP_PAPER, True, False, linear_probe.recipe, linear_probe.LinearProbe),
    )
}
