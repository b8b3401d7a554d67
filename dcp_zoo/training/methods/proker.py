"""ProKeR (Bendou et al., CVPR 2025): kernel ridge regression of what zero-shot CLIP leaves over of the labels.

With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), n keys K (n, E) and one-hot
labels L (n, C) as in `CacheHead`, and the kernel k(x, y) = exp(-beta (1 - x y^T)):

    A      = (k(K, K) / lambda + I)^-1 (L - K W^T)                           (n, C)
    logits = s (f W^T + k(f, K) A)                                           (B, C)

This is the authors' code, in which lambda scales what the ridge regression adds, besides penalising it. beta and lambda
are chosen on the few-shot validation images, the smallest on a tie; else they are the authors' for ImageNet. The
authors' code searches other ranges for each dataset; here all share `BETAS` and `PENALTIES`.
"""

from dataclasses import dataclass
from itertools import product

import torch

from dcp_zoo.fields import option
from dcp_zoo.heads.kinds import CacheHead
from dcp_zoo.training.methods.base import CACHED, CropsRecipe, Method, Task, most_accurate
from dcp_zoo.training.methods.tip_adapter import cache_head

BETAS, PENALTIES = (0.5, 1.0, 2.0, 4.0, 8.0), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class ProKeRRecipe(CropsRecipe):
    beta: float = option(1.5, "sharpness of the kernel, without validation images; by default by the shots", min=0)
    penalty: float = option(0.05, "lambda, without validation images; by default by the shots", min=1e-4)

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "ProKeRRecipe":
        # what the authors' code chose on ImageNet, by the shots
        chosen = {1: (3.0, 0.05), 2: (2.6, 0.05), 4: (1.5, 0.05), 8: (1.66, 0.07), 16: (1.7, 0.1)}
        beta, penalty = chosen[max(least for least in chosen if least <= shots)]
        return cls(beta=beta, penalty=penalty)


@torch.no_grad()
def fit(task: Task) -> CacheHead:
    recipe: ProKeRRecipe = task.recipe
    head = cache_head(task, task.clip.clip.logit_scale.exp().item())
    keys, text = head.keys.cpu().double(), head.weight.cpu().double()
    similar, left = keys @ keys.T, head.values.cpu() - keys @ text.T

    def with_strength(beta: float, penalty: float) -> CacheHead:
        system = (-beta * (1 - similar)).exp() / penalty + torch.eye(len(keys))
        head.values = torch.cholesky_solve(left, torch.linalg.cholesky(system)).to(head.values)
        head.beta.fill_(beta)
        return head

    beta, penalty = recipe.beta, recipe.penalty
    if task.val is not None:
        features, pairs = task.features(task.val), list(product(BETAS, PENALTIES))
        shown = task.progress(pairs, "beta and lambda", len(pairs))
        candidates = ((pair, with_strength(*pair).classify(features)) for pair in shown)
        beta, penalty = most_accurate(candidates, task.val.labels)
    head.info = {"beta": beta, "lambda": penalty}
    return with_strength(beta, penalty)


PAPER = "Bendou et al., ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models, CVPR 2025"
PROKER = Method("proker", "ProKeR", PAPER, fit, ProKeRRecipe, CACHED, chooses=True, features=True)
