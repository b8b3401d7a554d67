"""The methods that DCP is compared with: one table, each method a module, all with the same images and seeds."""

from dcp_zoo.methods import coop, dcp, linear_probe, maple, tip_adapter, vpt, zero_shot
from dcp_zoo.methods.base import Classifier, Method, PlainCLIP, Task, plain_clip

__all__ = ["METHODS", "Classifier", "Method", "PlainCLIP", "Task", "plain_clip"]

CLIP = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
TIP = "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
COOP = "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022"
VPT = "Jia et al., Visual Prompt Tuning, ECCV 2022"
MAPLE = "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023"
DCP = "Liu et al., Deeply Coupled Cross-Modal Prompt Learning, Findings of ACL 2023"

_FROZEN = {"trains": False, "transfers": True}
_CLOSED = {"trains": True, "transfers": False}
_OPEN = {"trains": True, "transfers": True}

_METHODS = [
    Method("zero-shot", "Zero-shot", CLIP, zero_shot.recipe, zero_shot.fit, **_FROZEN),
    Method("zero-shot-ensemble", "Zero-shot, 8 prompts", CLIP, zero_shot.recipe, zero_shot.fit_ensemble, **_FROZEN),
    Method("linear-probe", "Linear probe", CLIP, linear_probe.recipe, linear_probe.LinearProbe, **_CLOSED),
    Method("tip-adapter", "Tip-Adapter", TIP, tip_adapter.recipe, tip_adapter.fit, **_CLOSED),
    Method("tip-adapter-f", "Tip-Adapter-F", TIP, tip_adapter.recipe_f, tip_adapter.fit_f, **_CLOSED),
    Method("coop", "CoOp", COOP, coop.recipe, coop.fit, **_OPEN),
    Method("vpt-deep", "VPT-deep", VPT, vpt.recipe, vpt.fit, **_OPEN),
    Method("maple", "MaPLe", MAPLE, maple.recipe, maple.fit, **_OPEN),
    Method("dcp", "DCP", DCP, dcp.recipe, dcp.fit, **_OPEN),
]

METHODS = {method.name: method for method in _METHODS}
