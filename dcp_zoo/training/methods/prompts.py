"""Learned prompts in the text (CoOp, CoCoOp, KgCoOp, ProGrad), in the image (VPT-deep) or in both (IVLP,
MaPLe, PromptSRC). DCP has a file of its own.

With image features f (B, E), text features t (C, E) with prompts and t' of zero-shot CLIP, all normalised, and
s = exp(logit_scale).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.heads.config import PHRASE, Abilities
from dcp_zoo.heads.kinds import ConditionalHead, PromptHead
from dcp_zoo.training.loop import train
from dcp_zoo.training.methods.base import Method
from dcp_zoo.training.recipes import TrainingRecipe, count, option
from dcp_zoo.training.task import Task

PROMPT_STD = 0.02  # of initial prompts, as in the papers
FROM_IMAGENET = ("cross-dataset", "domain-shift")  # protocols that measure its transfer
CTX_INIT = "words before the class name that initialise the first text prompts"
TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])  # of PromptSRC


def random_prompts(count: int, n_ctx: int, width: int) -> list[Tensor]:
    """`count` sets of random prompts (n_ctx, width)."""
    return [torch.randn(n_ctx, width) * PROMPT_STD for _ in range(count)]


def text_prompts(task: Task, blocks: int = 1) -> tuple[list[Tensor], str]:
    """Random prompts for so many text blocks, the first of which are the first words of the recipe's phrase,
    if it has enough; and the words left."""
    n_ctx = task.recipe.n_ctx
    prompts = random_prompts(blocks, n_ctx, task.clip.text_tower.width)
    words = task.recipe.ctx_init.split()
    if len(words) >= n_ctx:
        prompts[0] = task.clip.embed_words(task.recipe.ctx_init, n_ctx)
    return prompts, " ".join(words[n_ctx:])


def new_head(task: Task, text: Iterable[Tensor] = (), vision: Iterable[Tensor] = (), rest: str = "") -> PromptHead:
    """The task's CLIP with these prompts."""
    return PromptHead(task.clip, task.classnames, text, vision, texts=task.texts, rest=rest)


# --------------------------------------------------------------------------------------------------------------- CoOp


@dataclass(frozen=True)
class CoOpRecipe(TrainingRecipe, lr=0.002, batch_size=32):
    """The paper's for ViT-B/16, with unified context."""

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
    head = new_head(task, prompts)
    train(task, head)
    return head


# ------------------------------------------------------------------------------------------------------------- CoCoOp


@dataclass(frozen=True)
class CoCoOpRecipe(TrainingRecipe, lr=0.002, batch_size=1, epochs=10):
    """The authors' for ViT-B/16, the same in all of their protocols."""

    n_ctx: int = count(4, "prompt tokens")
    ctx_init: str = option(PHRASE, CTX_INIT)


def fit_cocoop(task: Task) -> ConditionalHead:
    """CoCoOp: CoOp whose prompts are shifted by a network that reads the image's features.

    Text: `[SOS] p_1 + h .. p_M + h rest-of-phrase name . [EOT]`, with p at first the phrase's first words and the
    shift h of `ConditionalHead`. Images: plain CLIP.
    """
    prompts, rest = text_prompts(task)
    head = ConditionalHead(task.clip, task.classnames, prompts, texts=task.texts, rest=rest)
    train(task, head)
    return head


# ------------------------------------------------------------------------------------------------------------- KgCoOp


@dataclass(frozen=True)
class KgCoOpRecipe(CoCoOpRecipe, batch_size=128, epochs=100):
    """The authors' for ViT-B/16, the same in all of their protocols."""

    text_weight: float = option(8.0, "weight of the distance between prompted and zero-shot text features")


def fit_kgcoop(task: Task) -> PromptHead:
    """KgCoOp: CoOp whose text features stay near those of zero-shot CLIP.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with p at first the phrase's first words. Images: plain
    CLIP.

        loss = cross-entropy of s f t^T + 8 (1 - mean over c of t_c t'_c^T)
    """
    recipe: KgCoOpRecipe = task.recipe
    clip = task.clip
    prompts, rest = text_prompts(task)
    head = new_head(task, prompts, rest=rest)
    zero_shot = task.text

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        text = head.encode_text()
        cross_entropy = F.cross_entropy(clip.logits(head.encode_image(inputs), text).float(), labels)
        distance = 1 - (text * zero_shot).sum(-1).mean()
        return cross_entropy + recipe.text_weight * distance, cross_entropy

    train(task, head, loss_of=loss_of)
    return head


# ------------------------------------------------------------------------------------------------------------ ProGrad


@dataclass(frozen=True)
class ProGradRecipe(CoOpRecipe):
    """That of the authors' scripts: CoOp's."""

    projection: float = option(1.0, "lambda, the share of a conflict with zero-shot CLIP that is taken away", min=0)


def fit_prograd(task: Task) -> PromptHead:
    """ProGrad: CoOp whose steps never lead away from zero-shot CLIP's predictions.

    Text: that of CoOp, with p at first zeros and, as the last ones, the words "a photo of a". Images: plain CLIP.
    With the gradients, by p, g of the cross-entropy of z = s f t^T with the labels, and h of its cross-entropy
    with softmax(s f t'^T), a step follows

        g - lambda min(0, g h^T) h / |h|^2
    """
    recipe: ProGradRecipe = task.recipe
    clip = task.clip
    words = clip.embed_words(PHRASE, len(PHRASE.split()))
    head = new_head(task, [F.pad(words, (0, 0, recipe.n_ctx - len(words), 0))])
    (prompts,) = head.text_prompts
    zero_shot = task.text

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = head.encode_image(inputs)
        logits = clip.logits(features, head.encode_text()).float()
        cross_entropy = F.cross_entropy(logits, labels)
        general_loss = F.cross_entropy(logits, clip.logits(features, zero_shot).float().softmax(-1))
        (general,) = torch.autograd.grad(general_loss, prompts, retain_graph=True)
        (step,) = torch.autograd.grad(cross_entropy, prompts)
        agreement = (step * general).sum()
        if agreement < 0:
            step = step - recipe.projection * agreement / general.square().sum() * general
        return (prompts * step).sum(), cross_entropy  # whose gradient is the step

    train(task, head, loss_of=loss_of)
    return head


# ----------------------------------------------------------------------------------------------------------- VPT-deep


@dataclass(frozen=True)
class VPTDeepRecipe(TrainingRecipe, lr=0.0025):
    n_ctx: int = count(8, "prompt tokens in a block")
    depth: int = count(12, "blocks with their own prompts; at most the tower's blocks")

    # as in MaPLe's comparison of transfer; for few-shot, which that lacks, DCP's 20 epochs
    by_protocol = {protocol: {"epochs": 5} for protocol in ("base-to-new", *FROM_IMAGENET)}


def fit_vpt_deep(task: Task) -> PromptHead:
    """VPT-deep, in the setting of MaPLe's comparison: prompts in the image.

    Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP.
    """
    tower = task.clip.vision_tower
    prompts = random_prompts(min(task.recipe.depth, len(tower.blocks)), task.recipe.n_ctx, tower.width)
    head = new_head(task, vision=prompts)
    train(task, head)
    return head


# --------------------------------------------------------------------------------------------------------------- IVLP


@dataclass(frozen=True)
class IndependentRecipe(TrainingRecipe, lr=0.0025):
    """That of the baseline in PromptSRC's repository, for base-to-new; its other protocols have none of
    their own."""

    n_ctx: int = count(4, "prompt tokens in a block of each tower")
    depth: int = count(9, "blocks of each tower with new prompts; at most the blocks of the shorter tower")
    ctx_init: str = option(PHRASE, CTX_INIT)


def shared_depth(task: Task) -> int:
    """The number of blocks of each tower with prompts."""
    return min(task.recipe.depth, len(task.clip.text_tower.blocks), len(task.clip.vision_tower.blocks))


def independent_prompts(task: Task) -> PromptHead:
    """Prompts in both towers as they are before training, none of which depend on others.

    Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, with prompts of its own.
    """
    depth = shared_depth(task)
    text, rest = text_prompts(task, depth)
    return new_head(task, text, random_prompts(depth, task.recipe.n_ctx, task.clip.vision_tower.width), rest)


def fit_ivlp(task: Task) -> PromptHead:
    """Independent vision-language prompting, the baseline of PromptSRC: `independent_prompts`, trained by
    cross-entropy alone."""
    head = independent_prompts(task)
    train(task, head)
    return head


# -------------------------------------------------------------------------------------------------------------- MaPLe


@dataclass(frozen=True)
class MaPLeRecipe(IndependentRecipe, lr=0.0035, n_ctx=2):
    # a smaller budget where an ImageNet head must transfer; for few-shot, which the paper lacks, DCP's 20 epochs
    by_protocol = {
        "base-to-new": {"epochs": 5},
        **{protocol: {"lr": 0.0026, "epochs": 2, "depth": 3} for protocol in FROM_IMAGENET},
    }


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
        return self.encoder.embed_prompts(self.mapped())

    def mapped(self) -> list[Tensor]:
        """The vision prompts (M, Dv) of each block."""
        return [coupling(p) for coupling, p in zip(self.couplings, self.text_prompts, strict=True)]


def new_maple(task: Task) -> MaPLe:
    """With prompts and maps as they are before training."""
    depth = shared_depth(task)
    prompts, rest = text_prompts(task, depth)
    head = MaPLe(task.clip, task.classnames, prompts, texts=task.texts, rest=rest)
    widths = task.clip.text_tower.width, task.clip.vision_tower.width
    head.couplings = nn.ModuleList(nn.Linear(*widths) for _ in range(depth)).to(task.clip.device)
    return head


def fit_maple(task: Task) -> PromptHead:
    """After training the vision prompts are kept in place of the maps."""
    trained = new_maple(task)
    train(task, trained)
    with torch.no_grad():
        vision = trained.mapped()
    return new_head(task, trained.text_prompts, vision, trained.rest)


# ---------------------------------------------------------------------------------------------------------- PromptSRC


@dataclass(frozen=True)
class PromptSRCRecipe(IndependentRecipe, epochs=50):
    text_weight: float = option(25.0, "weight of the L1 distance between prompted and frozen text features")
    image_weight: float = option(10.0, "weight of the L1 distance between prompted and frozen image features")
    average_mean: float = option(0.6, "centre of the Gaussian over epochs, as a fraction of their number")
    average_std: float = option(0.6, "its standard deviation, likewise")

    # the authors': a late, narrow Gaussian for base-to-new; an early, wide one for transfer from ImageNet
    by_protocol = {
        "base-to-new": {"epochs": 20, "average_mean": 0.75, "average_std": 0.05},
        **{protocol: {"epochs": 20, "depth": 3, "average_mean": 0.3, "average_std": 0.5} for protocol in FROM_IMAGENET},
    }


def fit_promptsrc(task: Task) -> PromptHead:
    """PromptSRC (Khattak et al., ICCV 2023): independent prompts in both towers, regularised towards frozen CLIP
    and averaged over epochs.

    Prompts are those of IVLP, in the first blocks of each tower. With prompted features f (B, E) of images and t
    (C, E) of class names, frozen CLIP's f' and t', all normalised, and s = exp(logit_scale):

        loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
               + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

    t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of
    those after each epoch e = 1 .. T, with Gaussian weights

        exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

    No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other
    five; here the first serves for all.
    """
    recipe: PromptSRCRecipe = task.recipe
    clip = task.clip
    head = independent_prompts(task)
    frozen_text = ensemble(clip, task.classnames, task.texts)  # t'

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = head.encode_image(inputs)
        text = head.encode_text()
        with torch.no_grad():
            frozen_features = clip.encode_image(inputs)
        logits = clip.logits(features, text).float()
        frozen_logits = clip.logits(frozen_features, frozen_text).float()
        divergence = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
        image_distance = (features - frozen_features).abs().mean()
        text_distance = (text - frozen_text).abs().mean()
        cross_entropy = F.cross_entropy(logits, labels)
        total = cross_entropy + divergence / logits.numel()
        return total + recipe.image_weight * image_distance + recipe.text_weight * text_distance, cross_entropy

    train(task, head, loss_of=loss_of, epoch_weights=epoch_weights(recipe))
    return head


@torch.no_grad()
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are
    sentences."""
    templates = TEMPLATES if isinstance(texts, str) else [texts]
    features = [clip.encode_sentences(classnames, template) for template in templates]
    return F.normalize(torch.stack(features).mean(0), dim=-1)


def epoch_weights(recipe: PromptSRCRecipe) -> list[float]:
    """The Gaussian weights of the epochs that are run, with a sum of 1."""
    assert recipe.epochs is not None
    exponents = []
    for epoch in range(1, recipe.num_epochs + 1):
        exponents.append(-(((epoch / recipe.epochs - recipe.average_mean) / recipe.average_std) ** 2) / 2)
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # the largest is 1
    return [weight / sum(weights) for weight in weights]


COOP = Method(
    "coop", "CoOp", "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022", fit_coop, CoOpRecipe
)
COCOOP = Method(
    "cocoop",
    "CoCoOp",
    "Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022",
    fit_cocoop,
    CoCoOpRecipe,
    Abilities(linear=False, fitted=True),
)
KGCOOP = Method(
    "kgcoop",
    "KgCoOp",
    "Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023",
    fit_kgcoop,
    KgCoOpRecipe,
)
PROGRAD = Method(
    "prograd", "ProGrad", "Zhu et al., Prompt-aligned Gradient for Prompt Tuning, ICCV 2023", fit_prograd, ProGradRecipe
)
VPT_DEEP = Method("vpt-deep", "VPT-deep", "Jia et al., Visual Prompt Tuning, ECCV 2022", fit_vpt_deep, VPTDeepRecipe)
MAPLE = Method(
    "maple", "MaPLe", "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023", fit_maple, MaPLeRecipe
)
IVLP = Method(
    "ivlp",
    "IVLP",
    "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023",
    fit_ivlp,
    IndependentRecipe,
)
PROMPTSRC = Method(
    "promptsrc",
    "PromptSRC",
    "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023",
    fit_promptsrc,
    PromptSRCRecipe,
)
