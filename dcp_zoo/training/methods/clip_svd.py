"""CLIP-SVD (Koleilat et al., arXiv:2509.03740): trains only the singular values of the weights in both towers, through
the dataset's prompt template.

In every block of both towers, each of the weights W of queries, keys, values, attention's output and MLP layers is

    W = U diag(values) V^T

with the U, V and values, at first, of its singular value decomposition. The loss is that of CLIP-LoRA. No model
selection: the last step is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcp_zoo.fields import changed
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.methods.base import Method, Task, own_clip
from dcp_zoo.training.methods.clip_weights import AdamWRecipe, both_blocks, check_blocks, train_weights, zero_shot_of


@dataclass(frozen=True)
class CLIPSVDRecipe(AdamWRecipe):
    """That of the authors' code: one setting for all datasets."""

    lr: float = changed(AdamWRecipe, "lr", 5e-4)
    steps: int = changed(AdamWRecipe, "steps", 800)


def fit(task: Task) -> LinearHead:
    clip = own_clip(task.clip)
    check_blocks(clip, "CLIP-SVD")
    blocks = both_blocks(clip)
    weights = [(block.attn, "in_proj_weight", 3) for block in blocks]
    weights += [(m, "weight", 1) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for module, name, parts in weights:
        parametrize.register_parametrization(module, name, SingularValues(getattr(module, name), parts))
    train_weights(clip, task, [p for p in clip.parameters() if p.requires_grad], task.recipe.steps)
    for module, name, _ in weights:
        parametrize.remove_parametrizations(module, name)
    return zero_shot_of(clip, task)


class SingularValues(nn.Module):
    """Parametrises a weight W by the singular values of its `parts`, equal blocks of rows (D, D'): U diag(values) V^T.
    What is trained is added to W as it is, so that nothing changes before."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(weight.detach().unflatten(0, (parts, -1)), full_matrices=False)
        self.u, self.start, self.vh, self.values = u, s, vh, nn.Parameter(s.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((self.u * (self.values - self.start)[:, None]) @ self.vh).flatten(0, 1)


PAPER = "Koleilat et al., Singular Value Few-shot Adaptation of Vision-Language Models, arXiv:2509.03740"
CLIP_SVD = Method("clip-svd", "CLIP-SVD", PAPER, fit, CLIPSVDRecipe)
