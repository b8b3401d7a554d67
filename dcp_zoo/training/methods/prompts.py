"""A frozen CLIP with learned prompts, see `PromptHead` and `DCP`, by methods that differ in where the prompts are:

- CoOp: in the text, before the name.
- VPT-deep, in the setting of MaPLe's comparison: in the image.
- MaPLe: in both, those of the image mapped from the text's.
- PromptSRC: in both.
- DCP: in both, which rewrite each other; rounded as they will be stored, with the stored statistics measured.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.classes import TEMPLATE, Texts
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.inputs import Inputs, Tokens
from dcp_zoo.model.prompt_head import PromptHead
from dcp_zoo.training.device import cast_frozen, total_memory
from dcp_zoo.training.fit_probe import probe_views
from dcp_zoo.training.loop import EpochAverage, cross_entropy
from dcp_zoo.training.methods.base import Task, train_prompts
from dcp_zoo.training.sources import ImageSource, Progress, encode_views

PROMPT_STD = 0.02  # of initial prompts, as in the papers


def random_prompts(count: int, n_ctx: int, width: int) -> list[Tensor]:
    """`count` sets of random prompts (n_ctx, width)."""
    return [torch.randn(n_ctx, width) * PROMPT_STD for _ in range(count)]


def start_from(clip: FrozenCLIP, prompts: list[Tensor], phrase: str) -> tuple[list[Tensor], str]:
    """The text prompts, the first of which are a phrase's first words, if it has enough; and the words left."""
    words, n_ctx = phrase.split(), len(prompts[0])
    if len(words) >= n_ctx:
        prompts = [clip.embed_words(phrase, n_ctx), *prompts[1:]]
    return prompts, " ".join(words[n_ctx:])


def new_head(task: Task, text: Iterable[Tensor], vision: Iterable[Tensor], rest: str = "") -> PromptHead:
    """The task's CLIP with these prompts."""
    clip, names = task.clip, task.classnames
    return PromptHead(clip, names, text, vision, texts=task.texts, rest=rest)


def fit_coop(task: Task) -> PromptHead:
    """Text: `[SOS] p_1 .. p_M name . [EOT]`, the same learned p for every class. Images: plain CLIP."""
    prompts = random_prompts(1, task.recipe.n_ctx, task.clip.text_tower.width)
    head = new_head(task, prompts, ())
    train_prompts(task, head, task.feature_source)
    return head.requires_grad_(False)


def fit_vpt(task: Task) -> PromptHead:
    """Images: prompts at the end of the sequence, with new ones for every block. Text: as in zero-shot CLIP."""
    tower = task.clip.vision_tower
    prompts = random_prompts(min(task.recipe.depth, len(tower.blocks)), task.recipe.n_ctx, tower.width)
    head = new_head(task, (), prompts)
    train_prompts(task, head, task.train_images)
    return head.requires_grad_(False)


class MaPLe(PromptHead):
    """Text: `[SOS] p_1 .. p_M rest-of-phrase name . [EOT]`, with new p before each of the first blocks.
    Vision: the same at the end of the sequence, the prompts of block i being a linear map F_i of the text tower's."""

    couplings: nn.ModuleList

    def image_prompts(self) -> list[Tensor]:
        return self.encoder.entering(self.mapped())

    def mapped(self) -> list[Tensor]:
        """The vision prompts (M, Dv) of each block."""
        return [coupling(p) for coupling, p in zip(self.couplings, self.text_prompts, strict=True)]


def new_maple(task: Task) -> MaPLe:
    """With prompts and maps as they are before training."""
    text, vision, recipe = task.clip.text_tower, task.clip.vision_tower, task.recipe
    depth = min(recipe.depth, len(text.blocks), len(vision.blocks))
    prompts = random_prompts(depth, recipe.n_ctx, text.width)
    couplings = nn.ModuleList(nn.Linear(text.width, vision.width) for _ in range(depth)).to(task.clip.device)
    prompts, rest = start_from(task.clip, prompts, recipe.ctx_init)
    clip, names = task.clip, task.classnames
    head = MaPLe(clip, names, prompts, texts=task.texts, rest=rest)
    head.couplings = couplings
    return head


def fit_maple(task: Task) -> PromptHead:
    """After training the vision prompts are kept in place of the maps."""
    trained = new_maple(task)
    train_prompts(task, trained, task.train_images)
    with torch.no_grad():
        vision = trained.mapped()
    return new_head(task, trained.text_prompts, vision, trained.rest).requires_grad_(False)


TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES[:60])


def new_promptsrc(task: Task) -> PromptHead:
    """Independent prompts in the first blocks of both towers, as they are before training."""
    towers, recipe = (task.clip.text_tower, task.clip.vision_tower), task.recipe
    depth = min(recipe.depth, *(len(tower.blocks) for tower in towers))
    text, vision = (random_prompts(depth, recipe.n_ctx, tower.width) for tower in towers)
    text, rest = start_from(task.clip, text, recipe.ctx_init)
    return new_head(task, text, vision, rest)


def fit_promptsrc(task: Task) -> PromptHead:
    """PromptSRC: independent prompts in both towers, regularised towards frozen CLIP and averaged over epochs.

    Prompts enter the first blocks of each tower as in MaPLe, except that the vision prompts are learned directly
    instead of mapped from the text prompts. With prompted features f (B, E) of images and t (C, E) of class names,
    frozen CLIP's f' and t', all normalised, and s = exp(logit_scale):

        loss = cross-entropy of s f t^T + 25 mean |t - t'| + 10 mean |f - f'|
               + KL(softmax(s f' t'^T) || softmax(s f t^T)) / (B C)

    t' averages 60 prompt templates, the first of CLIP's 80 for ImageNet. The final prompts are the average of those
    after each epoch e = 1 .. T, with Gaussian weights

        exp(-((e - mean T) / (std T))^2 / 2), normalised to a sum of 1.

    No model selection. For few-shot, the authors use one Gaussian for six datasets and another for the other five; here
    the first serves for all.
    """
    recipe, head = task.recipe, new_promptsrc(task)
    weights = epoch_weights(recipe.epochs, recipe.average_mean, recipe.average_std, recipe.num_epochs)
    frozen = ensemble(task.clip, task.classnames, task.texts)
    loss_of = promptsrc_loss(head, frozen, recipe, task.training.get("class_weight"))
    train_prompts(task, head, task.train_images, loss_of=loss_of, average=EpochAverage(weights))
    return head.requires_grad_(False)


def promptsrc_loss(
    head: PromptHead, frozen_text: Tensor, recipe: Any, class_weight: Tensor | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loss of images and labels (B,), given t' (C, E), and the cross-entropy alone."""

    def loss_of(inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        prompted = head.encode_image(inputs), head.encode_text()
        with torch.no_grad():
            frozen = head.encoder.encode_image(inputs), frozen_text
        logits, frozen_logits = (head.encoder.logits(*pair).float() for pair in (prompted, frozen))
        distances = [(a - b).abs().mean() for a, b in zip(prompted, frozen, strict=True)]
        change = F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="sum", log_target=True)
        own = cross_entropy(logits, labels, class_weight)
        total = own + change / logits.numel()
        return total + recipe.image_weight * distances[0] + recipe.text_weight * distances[1], own

    return loss_of


@torch.no_grad()
def ensemble(clip: FrozenCLIP, classnames: Sequence[str], texts: Texts = "") -> Tensor:
    """Text features t' (C, E), averaged over all templates and normalised; or of `texts`, if these are sentences."""
    templates = TEMPLATES if isinstance(texts, str) else [texts]
    found = [clip.encode_sentences(classnames, template) for template in templates]
    return F.normalize(torch.stack(found).mean(0), dim=-1)


def epoch_weights(epochs: int, mean: float, std: float, run: int | None = None) -> list[float]:
    """Gaussian weights of epochs 1 .. `run`, with a sum of 1; mean and std are fractions of `epochs`."""
    exponents = [-(((e / epochs - mean) / std) ** 2) / 2 for e in range(1, (run or epochs) + 1)]
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # the largest is 1
    return [weight / sum(weights) for weight in weights]


def fit_dcp(task: Task) -> DCP:
    """Train a DCP from fresh prompts, round the trained tensors to float16, and measure the stored statistics. With the
    task's `reload_clip` CLIP is stored in half precision while training in it; otherwise autocast converts it."""
    model, recipe, clip = new_model(task), task.recipe, task.clip
    source, fixed = task.train_images, task.plain_train
    if not source.crops:
        source, fixed = frozen_tokens(model, source, fixed, task.progress)
    if recipe.clip_reg:
        shown = max(source.num_views, probe_views(fixed))
        source.targets = fixed.targets = encode_views(fixed, clip.encode_image, shown, task.progress).float()
    task.probe_images = fixed
    if task.reload_clip:
        cast_frozen(model, task.precision)
    losses = train_prompts(task, model, source)
    if task.reload_clip and task.precision != "float32":  # the statistics are measured as the head will be used
        for own, loaded in zip(clip.clip.parameters(), task.reload_clip().clip.parameters(), strict=True):
            own.data = loaded.data  # the cast weights are freed
    round_and_store_stats(model, fixed)
    tenth = max(1, len(losses) // 10)  # enough to tell later whether it learnt
    model.info = {"first_loss": fmean(losses[:tenth]), "last_loss": fmean(losses[-tenth:])}
    return model


def frozen_tokens(
    model: DCP, source: ImageSource, fixed: ImageSource, progress: Progress
) -> tuple[ImageSource, ImageSource]:
    """With late coupling: the images of both sources as the tokens that enter the first block with prompts, of every
    view, in half precision; the images themselves if all tokens take more than a quarter of the memory."""
    tower, first = model.encoder.vision_tower, model.first_block
    numbers = source.num_views * len(source.items) * tower.num_tokens * tower.width
    if first == 0 or 2 * numbers > total_memory(torch.device("cpu")) / 4:
        return source, fixed

    def enter(inputs: Inputs) -> Tensor:
        return model.encoder.enter(inputs, first).x.half()

    stored: Any = {
        "views": encode_views(source, enter, source.num_views, progress),
        "form": partial(Tokens, block=first),
    }
    return replace(source, **stored, flips=False), replace(fixed, **stored)


def new_model(task: Task) -> DCP:
    """The task's CLIP with fresh prompts."""
    texts = task.texts if isinstance(task.texts, Mapping) else TEMPLATE
    return DCP(task.clip, task.classnames, task.recipe.config, texts=texts)


@torch.no_grad()
def round_and_store_stats(model: DCP, source: ImageSource) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the stored statistics
    on the unaugmented training images. ZooError for numbers beyond float16's range: training diverged."""
    for tensor in model._trained_state().values():
        tensor.copy_(tensor.half())
    model.store_stats(source.batches(64))
    if model.stored_stats is not None:
        model.stored_stats.copy_(model.stored_stats.half())
    if not all(tensor.isfinite().all() for tensor in model._trained_state().values()):
        problem = "Training diverged: the prompts became too large for float16."
        raise ZooError(f"{problem} Lower the learning rate (--set lr=...), and start again (--overwrite).")
