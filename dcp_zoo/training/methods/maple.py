"""MaPLe (Khattak et al., CVPR 2023): prompts in both towers, those of the image mapped from the text's.

Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text tower's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.methods.base import Method, Task, new_head, random_prompts, start_from, train_prompts
from dcp_zoo.training.recipes import TrainingRecipe, count, option


@dataclass(frozen=True)
class MaPLeRecipe(TrainingRecipe):
    n_ctx: int = count(2, "prompt tokens in a block of each tower")
    depth: int = count(9, "blocks of each tower with new prompts; at most the blocks of the shorter tower")
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "MaPLeRecipe":
        # a smaller budget where an ImageNet head must transfer; for few-shot, which the paper lacks, DCP's 20 epochs
        if protocol in ("cross-dataset", "domain-shift"):
            return cls(lr=0.0026, epochs=2, depth=3)
        return cls(epochs=5) if protocol == "base-to-new" else cls()


class MaPLe(PromptHead):
    """See the module; while it is trained, with the maps F_i as `couplings`."""

    couplings: nn.ModuleList
    _prompts_images = True  # mapped ones

    def image_prompts(self) -> list[Tensor]:
        return self.encoder.entering(self.mapped())

    def mapped(self) -> list[Tensor]:
        """The vision prompts (M, Dv) of each block."""
        return [coupling(p) for coupling, p in zip(self.couplings, self.text_prompts, strict=True)]


def new_maple(task: Task) -> MaPLe:
    """With prompts and maps as they are before training."""
    recipe: MaPLeRecipe = task.recipe
    text, vision = task.clip.text_tower, task.clip.vision_tower
    depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
    prompts = random_prompts(depth, recipe.n_ctx, text.width)
    couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
    prompts, rest = start_from(task.clip, prompts, recipe.ctx_init)
    head = MaPLe(task.clip, task.classnames, prompts, texts=task.texts, rest=rest)
    head.couplings = couplings
    return head


def fit(task: Task) -> PromptHead:
    """After training the vision prompts are kept in place of the maps."""
    trained = new_maple(task)
    train_prompts(task, trained, task.train_images)
    with torch.no_grad():
        vision = trained.mapped()
    return new_head(task, trained.text_prompts, vision, trained.rest).requires_grad_(False)


MAPLE = Method("maple", "MaPLe", "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023", fit, MaPLeRecipe)
