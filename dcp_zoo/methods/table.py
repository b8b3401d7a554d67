"""The table of methods: a row each, and the module that does it, imported when it is used."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcp_zoo.methods.base import Classifier, Task
    from dcp_zoo.training.recipes import BaseRecipe

CLIP = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
TIP = "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022"
COOP = "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022"
VPT = "Jia et al., Visual Prompt Tuning, ECCV 2022"
MAPLE = "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023"
DCP = "Liu et al., Deeply Coupled Cross-Modal Prompt Learning, Findings of ACL 2023"


@dataclass(frozen=True)
class Method:
    """One way to adapt CLIP to a task.

    Attributes:
        name: as in results and on the command line.
        title: as in tables and figures.
        reference: the paper.
        module: of this package, with the functions `recipe` and `fit`.
        variant: what their names end with, where a module has several.
        trains: whether it looks at training images; without, shots and seed mean nothing.
        transfers: whether it can answer with other class names than it was trained on.
    """

    name: str
    title: str
    reference: str
    module: str
    variant: str = ""
    trains: bool = True
    transfers: bool = True

    def recipe(self, model: str, dataset: str, shots: int, protocol: str) -> "BaseRecipe":
        """The published numbers, for the miniature those of its DCP recipe."""
        return self._function("recipe")(model, dataset, shots, protocol)

    def fit(self, task: "Task") -> "Classifier":
        """From a task to a classifier."""
        return self._function("fit")(task)

    def _function(self, name: str) -> Any:
        return resolve_name(f"dcp_zoo.methods.{self.module}:{name}{self.variant}")


_METHODS = [
    Method("zero-shot", "Zero-shot", CLIP, "zero_shot", trains=False),
    Method("zero-shot-ensemble", "Zero-shot, 8 prompts", CLIP, "zero_shot", "_ensemble", trains=False),
    Method("linear-probe", "Linear probe", CLIP, "linear_probe", transfers=False),
    Method("tip-adapter", "Tip-Adapter", TIP, "tip_adapter", transfers=False),
    Method("tip-adapter-f", "Tip-Adapter-F", TIP, "tip_adapter", "_f", transfers=False),
    Method("coop", "CoOp", COOP, "coop"),
    Method("vpt-deep", "VPT-deep", VPT, "vpt"),
    Method("maple", "MaPLe", MAPLE, "maple"),
    Method("dcp", "DCP", DCP, "dcp"),
]

METHODS = {method.name: method for method in _METHODS}
