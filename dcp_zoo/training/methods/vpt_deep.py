"""VPT-deep (Jia et al., ECCV 2022), in the setting of MaPLe's comparison: prompts in the image.

Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP.
"""

from dataclasses import dataclass

from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.methods.base import Method, Task, new_head, random_prompts, train_prompts
from dcp_zoo.training.recipes import TrainingRecipe, changed, count


@dataclass(frozen=True)
class VPTDeepRecipe(TrainingRecipe):
    lr: float = changed(TrainingRecipe, "lr", 0.0025)
    n_ctx: int = count(8, "prompt tokens in a block")
    depth: int = count(12, "blocks with their own prompts; at most the tower's blocks")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "VPTDeepRecipe":
        # as in MaPLe's comparison of transfer; for few-shot, which that lacks, DCP's 20 epochs
        return cls() if protocol == "few-shot" else cls(epochs=5)


def fit(task: Task) -> PromptHead:
    recipe: VPTDeepRecipe = task.recipe
    tower = task.clip.vision_tower
    prompts = random_prompts(min(recipe.depth, len(tower.blocks)), recipe.n_ctx, tower.width)
    head = new_head(task, (), prompts)
    train_prompts(task, head, task.train_images)
    return head.requires_grad_(False)


VPT_DEEP = Method("vpt-deep", "VPT-deep", "Jia et al., Visual Prompt Tuning, ECCV 2022", config=VPTDeepRecipe, fit=fit)
