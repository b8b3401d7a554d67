"""Learned prompts in one tower or both: CoOp, VPT-deep, IVLP and MaPLe. DCP and PromptSRC have files of
their own."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.recipes import TrainingRecipe, changed, count, option
from dcp_zoo.training.task import Task

PROMPT_STD = 0.02  # of initial prompts, as in the papers


def random_prompts(count: int, n_ctx: int, width: int) -> list[Tensor]:
    """`count` sets of random prompts (n_ctx, width)."""
    return [torch.randn(n_ctx, width) * PROMPT_STD for _ in range(count)]


def start_from(clip: FrozenCLIP, prompts: list[Tensor], phrase: str) -> tuple[list[Tensor], str]:
    """The text prompts, the first of which are a phrase's first words, if it has enough; and the words
    left."""
    words = phrase.split()
    n_ctx = len(prompts[0])
    if len(words) >= n_ctx:
        prompts = [clip.embed_words(phrase, n_ctx), *prompts[1:]]
    return prompts, " ".join(words[n_ctx:])


def new_head(task: Task, text: Iterable[Tensor], vision: Iterable[Tensor], rest: str = "") -> PromptHead:
    """The task's CLIP with these prompts."""
    return PromptHead(task.clip, task.classnames, text, vision, texts=task.texts, rest=rest)


# --------------------------------------------------------------------------------------------------------------- CoOp


@dataclass(frozen=True)
class CoOpRecipe(TrainingRecipe):
    """The paper's for ViT-B/16, with unified context."""

    lr: float = changed(TrainingRecipe, "lr", 0.002)
    batch_size: int = changed(TrainingRecipe, "batch_size", 32)
    epochs: int | None = count(200, "length of the schedule; by default less for fewer than five shots and ImageNet")
    n_ctx: int = count(16, "prompt tokens")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "CoOpRecipe":
        if shots == 1 or dataset == "imagenet":
            return cls(epochs=50)
        return cls(epochs=100) if shots < 5 else cls()


def fit_coop(task: Task) -> PromptHead:
    """CoOp: prompts in the text, before the class name.

    Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP.
    """
    prompts = random_prompts(1, task.recipe.n_ctx, task.clip.text_tower.width)
    head = new_head(task, prompts, ())
    train(task, head, task.feature_loader())
    return head.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- VPT-deep


@dataclass(frozen=True)
class VPTDeepRecipe(TrainingRecipe):
    lr: float = changed(TrainingRecipe, "lr", 0.0025)
    n_ctx: int = count(8, "prompt tokens in a block")
    depth: int = count(12, "blocks with their own prompts; at most the tower's blocks")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "VPTDeepRecipe":
        # as in MaPLe's comparison of transfer; for few-shot, which that lacks, DCP's 20 epochs
        return cls() if protocol == "few-shot" else cls(epochs=5)


def fit_vpt_deep(task: Task) -> PromptHead:
    """VPT-deep, in the setting of MaPLe's comparison: prompts in the image.

    Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP.
    """
    tower = task.clip.vision_tower
    prompts = random_prompts(min(task.recipe.depth, len(tower.blocks)), task.recipe.n_ctx, tower.width)
    head = new_head(task, (), prompts)
    train(task, head)
    return head.requires_grad_(False)


# --------------------------------------------------------------------------------------------------------------- IVLP


@dataclass(frozen=True)
class IndependentRecipe(TrainingRecipe):
    """That of the baseline in PromptSRC's repository, for base-to-new; its other protocols have none of
    their own."""

    lr: float = changed(TrainingRecipe, "lr", 0.0025)
    n_ctx: int = count(4, "prompt tokens in a block of each tower")
    depth: int = count(9, "blocks of each tower with new prompts; at most the blocks of the shorter tower")
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")


def independent_prompts(task: Task) -> PromptHead:
    """Prompts in both towers as they are before training, none of which depend on others.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, with prompts of its own.
    """
    recipe = task.recipe
    text_tower = task.clip.text_tower
    vision_tower = task.clip.vision_tower
    depth = min(recipe.depth, len(text_tower.blocks), len(vision_tower.blocks))
    text = random_prompts(depth, recipe.n_ctx, text_tower.width)
    vision = random_prompts(depth, recipe.n_ctx, vision_tower.width)
    text, rest = start_from(task.clip, text, recipe.ctx_init)
    return new_head(task, text, vision, rest)


def fit_ivlp(task: Task) -> PromptHead:
    """Independent vision-language prompting, the baseline of PromptSRC: `independent_prompts`, trained by
    cross-entropy alone."""
    head = independent_prompts(task)
    train(task, head)
    return head.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- MaPLe


@dataclass(frozen=True)
class MaPLeRecipe(TrainingRecipe):
    n_ctx: int = count(2, "prompt tokens in a block of each tower")
    depth: int = count(9, "blocks of each tower with new prompts; at most the blocks of the shorter tower")
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")

    @classmethod
    def for_task(cls, model: str, dataset: str, shots: int, protocol: str) -> "MaPLeRecipe":
        # a smaller budget where an ImageNet head must transfer; for few-shot, which the paper lacks, DCP's
        # 20 epochs
        if protocol in ("cross-dataset", "domain-shift"):
            return cls(lr=0.0026, epochs=2, depth=3)
        if protocol == "base-to-new":
            return cls(epochs=5)
        return cls()


class MaPLe(PromptHead):
    """MaPLe while it is trained, with the maps F_i as `couplings`: prompts in both towers, those of the
    image mapped from the text's.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text
    tower's.
    """

    couplings: nn.ModuleList
    has_image_prompts = True  # mapped ones

    def image_prompts(self) -> list[Tensor]:
        return self.encoder.entering(self.mapped())

    def mapped(self) -> list[Tensor]:
        """The vision prompts (M, Dv) of each block."""
        return [coupling(p) for coupling, p in zip(self.couplings, self.text_prompts, strict=True)]


def new_maple(task: Task) -> MaPLe:
    """With prompts and maps as they are before training."""
    recipe: MaPLeRecipe = task.recipe
    text = task.clip.text_tower
    vision = task.clip.vision_tower
    depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
    prompts = random_prompts(depth, recipe.n_ctx, text.width)
    couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
    prompts, rest = start_from(task.clip, prompts, recipe.ctx_init)
    head = MaPLe(task.clip, task.classnames, prompts, texts=task.texts, rest=rest)
    head.couplings = couplings
    return head


def fit_maple(task: Task) -> PromptHead:
    """After training the vision prompts are kept in place of the maps."""
    trained = new_maple(task)
    train(task, trained)
    with torch.no_grad():
        vision = trained.mapped()
    return new_head(task, trained.text_prompts, vision, trained.rest).requires_grad_(False)


COOP = Method(
    "coop", "CoOp", "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022", fit_coop, CoOpRecipe
)
VPT_DEEP = Method("vpt-deep", "VPT-deep", "Jia et al., Visual Prompt Tuning, ECCV 2022", fit_vpt_deep, VPTDeepRecipe)
IVLP = Method(
    "ivlp",
    "IVLP",
    "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023",
    fit_ivlp,
    IndependentRecipe,
)
MAPLE = Method(
    "maple", "MaPLe", "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023", fit_maple, MaPLeRecipe
)
