"""CoOp (Zhou et al., IJCV 2022): prompts in the text, before the class name.

Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP. The
defaults are the paper's for ViT-B/16, with unified context.
"""

from dataclasses import dataclass

from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.methods.base import Method, Task, new_head, random_prompts, train_prompts
from dcp_zoo.training.recipes import TrainingRecipe, changed, count


@dataclass(frozen=True)
class CoOpRecipe(TrainingRecipe):
    lr: float = changed(TrainingRecipe, "lr", 0.002)
    batch_size: int = changed(TrainingRecipe, "batch_size", 32)
    epochs: int | None = count(200, "length of the schedule; by default less for fewer than five shots and ImageNet")
    n_ctx: int = count(16, "prompt tokens")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "CoOpRecipe":
        return cls(epochs=50 if shots == 1 or dataset == "imagenet" else 100 if shots < 5 else 200)


def fit(task: Task) -> PromptHead:
    recipe: CoOpRecipe = task.recipe
    prompts = random_prompts(1, recipe.n_ctx, task.clip.text_tower.width)
    head = new_head(task, prompts, ())
    train_prompts(task, head, task.feature_source)
    return head.requires_grad_(False)


COOP = Method("coop", "CoOp", "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022", fit, CoOpRecipe)
