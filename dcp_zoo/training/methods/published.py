"""The published hyperparameters of every method, in one place and without torch, as plans and help texts read them.

The function of a method maps a model, a dataset, the number of shots and a protocol to its recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dcp_zoo.fields import count, option
from dcp_zoo.training.recipes import TEXT_PROBE, BaseRecipe, Recipe, TrainingRecipe, augment_option, default_recipe
from dcp_zoo.zoo.registry import get_spec

LORA_STEPS, TWO_STAGE_STEPS, SVD_STEPS = 500, 300, 200  # per shot
TRANSFER = 4  # times DCP's clip_reg, for what it was not trained on
IMAGENET_EPOCHS = 5  # of DCP's schedule of 20, which its script of tests on other datasets loads
PEAK = "peak learning rate, reached in epoch 1 and followed by a cosine towards 0"
EPOCHS = "length of the schedule; null: as many as the number of classes and images needs"
DEPTH = "blocks of each tower with new prompts; at most the number of blocks of the shorter tower"
Published = TypeVar("Published", bound=BaseRecipe)


def budget_overrides(model: str, dataset: str) -> dict[str, Any]:
    """Changes to a method's published optimizer, schedule, batch size and augmentation for models that need others than
    CLIP, for which these were tuned: those of the model's DCP recipe, if the registry has one."""
    if not get_spec(model).recipe:
        return {}
    recipe = default_recipe(model, dataset)
    return {part.name: getattr(recipe, part.name) for part in fields(TrainingRecipe) if part.name != "classifier"}


def augmentation(model: str, dataset: str) -> str:
    """Random crops and flips, as published, unless the model needs another augmentation."""
    return budget_overrides(model, dataset).get("augment", "crop-flip")


def published(recipe: type[Published], **by_shots: Callable[[int], Any]) -> Callable[[str, str, int, str], Published]:
    """For a method with the same numbers for every task, but those that depend on the shots: the defaults of its
    recipe, with the model's augmentation."""

    def of_task(model: str, dataset: str, shots: int, protocol: str) -> Published:
        augment = "none" if recipe.augment == "none" else augmentation(model, dataset)
        return recipe(augment=augment, **{name: value(max(shots, 1)) for name, value in by_shots.items()})

    return of_task


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    """The paper's."""

    C: float | None = option(
        None, "inverse strength of the L2 penalty; by default chosen on validation images, or by cross-validation"
    )
    max_iter: int = count(1000, "iterations of L-BFGS, at most")


@dataclass(frozen=True)
class CropsRecipe(BaseRecipe):
    """Of a method on features of several views of each training image: rows, or averaged."""

    augment: str = augment_option("crop-flip")
    augment_epochs: int = count(10, "random crops of each training image; unused by the miniature")


@dataclass(frozen=True)
class TipAdapterRecipe(CropsRecipe):
    """The paper's. Its code uses a different search range for each dataset; here all share one grid, of 20 alphas and
    40 betas from 0.1 to `search_max`."""

    alpha: float = option(1.0, "weight of the cache, without validation images and while keys are trained")
    beta: float = option(1.0, "sharpness of the cache's similarities; used like alpha")
    search_max: float = option(50.0, "largest alpha and beta that are tried on validation images")


@dataclass(frozen=True)
class TipAdapterFRecipe(TipAdapterRecipe):
    """Adds the training of the keys: AdamW with a cosine schedule over all steps."""

    lr: float = option(1e-3, "learning rate of the first step")
    eps: float = option(1e-4, "epsilon of adamw")
    batch_size: int = count(256, "images per step")
    epochs: int = count(20, "length of the schedule")


@dataclass(frozen=True)
class ProKeRRecipe(CropsRecipe):
    """The authors' code, which searches other ranges for each dataset; here all share 5 betas from 0.5 to 8 and 6
    lambdas from 0.01 to 3."""

    beta: float = option(1.5, "sharpness of the kernel, without validation images", min=0)
    penalty: float = option(0.05, "lambda, without validation images", min=1e-4)


def at_most(shots: int, known: dict[int, float]) -> float:
    """The value for the largest known number of shots that is not above this one."""
    return known[max(k for k in known if k <= shots)]


@dataclass(frozen=True)
class GDARecipe(CropsRecipe):
    """The paper's."""

    alpha: float | None = option(None, "weight of the Gaussian part; by default chosen on the validation images")
    text: bool = option(True, "add zero-shot CLIP; false: the Gaussian part alone, with nothing to choose")


@dataclass(frozen=True)
class LPPlusPlusRecipe(BaseRecipe):
    """The authors' code; step sizes depend on the data."""

    epochs: int = count(300, "steps of v and b, each on all training images; alpha takes a tenth of them")
    momentum: float = option(0.9, "momentum of v and b")
    alpha: float = option(250.0, "initial alpha, in multiples of the mean cosine of images and their class names")


@dataclass(frozen=True)
class CLAPRecipe(TrainingRecipe):
    """The authors' code: SGD with momentum 0.9 and learning rate 0.1, cosine after one epoch at 1e-5, 300 epochs. It
    trains on features, in seconds."""

    is_trained = False
    lr: float = option(0.1, PEAK)
    weight_decay: float = option(0.0, "L2 penalty of sgd, decoupled weight decay of adamw")
    batch_size: int = count(256, "features per step")
    epochs: int = count(300, "length of the schedule")
    augment_epochs: int = count(20, "random crops of each training image; unused by the miniature")
    unit: bool = option(
        True, "start from normalised text features; false: from the text tower's raw output, as in the authors' code"
    )


def dcp(model: str, dataset: str, shots: int, protocol: str) -> Recipe:
    """The default recipe; where it agrees with zero-shot CLIP, more so for classes and styles that it was not trained
    on, and without a text probe for other styles, which it would judge by photographs. From ImageNet, transfer is
    measured after `IMAGENET_EPOCHS`: this reads the authors' scripts, which disagree on it."""
    default = default_recipe(model, dataset)
    if protocol == "few-shot":
        return default
    classifier = "none" if protocol == "domain-shift" else default.classifier
    stop = IMAGENET_EPOCHS if dataset == "imagenet" and default.epochs else None
    return replace(default, clip_reg=TRANSFER * default.clip_reg, classifier=classifier, stop_epoch=stop)


@dataclass(frozen=True)
class CoOpRecipe(TrainingRecipe):
    """The paper's, for ViT-B/16: M = 16 tokens of unified context, the class name at the end."""

    lr: float = option(0.002, PEAK)
    batch_size: int = count(32, "images per step, at most")
    epochs: int | None = count(200, EPOCHS)
    n_ctx: int = count(16, "M, prompt tokens before the class name")


def coop(model: str, dataset: str, shots: int, protocol: str) -> CoOpRecipe:
    """50 epochs for 1 shot and for ImageNet, 100 for 2 and 4 shots, 200 for more."""
    epochs = 50 if shots == 1 or dataset == "imagenet" else 100 if shots <= 4 else 200
    return CoOpRecipe(epochs=epochs).updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class VPTRecipe(TrainingRecipe):
    """SGD with learning rate 0.0025, batches of 4; every block of the vision tower has its own prompts."""

    lr: float = option(0.0025, PEAK)
    n_ctx: int = count(8, "prompt tokens in a block")
    depth: int = count(12, "blocks with their own prompts; at most the tower's blocks")


def vpt_deep(model: str, dataset: str, shots: int, protocol: str) -> VPTRecipe:
    """5 epochs as in MaPLe's comparison of transfer; for few-shot, which that lacks, DCP's 20."""
    epochs = 20 if protocol == "few-shot" else 5
    return VPTRecipe(epochs=epochs).updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class MaPLeRecipe(TrainingRecipe):
    """SGD with learning rate 0.0035, batches of 4."""

    n_ctx: int = count(2, "prompt tokens in a block of each tower")
    depth: int = count(9, DEPTH)
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")


def maple(model: str, dataset: str, shots: int, protocol: str) -> MaPLeRecipe:
    """The paper's: 5 epochs for base-to-new, and a smaller budget where an ImageNet head must transfer. It has no
    few-shot protocol; there, DCP's 20 epochs."""
    published = MaPLeRecipe(epochs=20 if protocol == "few-shot" else 5)
    if protocol in ("cross-dataset", "domain-shift"):
        published = replace(published, lr=0.0026, epochs=2, depth=3)
    return published.updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class PromptSRCRecipe(MaPLeRecipe):
    """SGD with learning rate 0.0025, batches of 4, 50 epochs."""

    lr: float = option(0.0025, PEAK)
    epochs: int | None = count(50, EPOCHS)
    n_ctx: int = count(4, "prompt tokens in a block of each tower")
    text_weight: float = option(25.0, "weight of the L1 distance between prompted and frozen text features")
    image_weight: float = option(10.0, "weight of the L1 distance between prompted and frozen image features")
    average_mean: float = option(0.6, "centre of the Gaussian over epochs, as a fraction of their number")
    average_std: float = option(0.6, "standard deviation of the Gaussian, as a fraction of the number of epochs")


def promptsrc(model: str, dataset: str, shots: int, protocol: str) -> PromptSRCRecipe:
    """The authors' numbers for each protocol: 20 epochs and a late, narrow Gaussian for base-to-new; 20 epochs, 3
    blocks and an early, wide Gaussian for transfer from ImageNet."""
    published = PromptSRCRecipe()
    if protocol == "base-to-new":
        published = replace(published, epochs=20, average_mean=0.75, average_std=0.05)
    if protocol in ("cross-dataset", "domain-shift"):
        published = replace(published, epochs=20, depth=3, average_mean=0.3, average_std=0.5)
    return published.updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class ProLIPRecipe(BaseRecipe):
    """The authors' code: Adam with a cosine over all steps."""

    augment: str = augment_option("crop-flip")
    penalty: float = option(0.25, "lambda, 1 / shots")
    lr: float = option(1e-5, "learning rate of the first step")
    eps: float = option(1e-4, "epsilon of adam")
    epochs: int = count(300, "optimizer steps, each on all training images")


@dataclass(frozen=True)
class AdamWRecipe(BaseRecipe):
    """AdamW with a cosine down to 1e-6, as in the authors' code of CLIP-LoRA, CLIP-SVD and 2SFS."""

    augment: str = augment_option("crop-flip")
    lr: float = option(2e-4, "learning rate of the first step, in each stage if there are several")
    weight_decay: float = option(1e-2, "decoupled weight decay of adamw")
    batch_size: int = count(32, "images per step")


@dataclass(frozen=True)
class CLIPLoRARecipe(AdamWRecipe):
    """The authors' code."""

    rank: int = count(2, "rank r of the updates")
    alpha: float = option(1.0, "scale of the updates, which are multiplied by alpha / sqrt(r)")
    dropout: float = option(0.25, "dropout rate of the updates' inputs")
    steps: int = count(4 * LORA_STEPS, "optimizer steps; the default is 500 per shot")


def clip_lora(model: str, dataset: str, shots: int, protocol: str) -> CLIPLoRARecipe:
    """A fifth of the published steps where the registry has a higher rate."""
    per_shot = LORA_STEPS // 5 if "clip-lora" in get_spec(model).baseline_recipes else LORA_STEPS
    return CLIPLoRARecipe(augment=augmentation(model, dataset), steps=per_shot * max(shots, 1))


@dataclass(frozen=True)
class CLIPSVDRecipe(AdamWRecipe):
    """The authors' code: one setting for all datasets."""

    lr: float = option(5e-4, "learning rate of the first step")
    steps: int = count(4 * SVD_STEPS, "optimizer steps; the default is 200 per shot")


@dataclass(frozen=True)
class TwoStageRecipe(AdamWRecipe):
    """The authors' code."""

    steps: int = count(4 * TWO_STAGE_STEPS, "optimizer steps of both stages; the default is 300 per shot")
    first_stage: float = option(0.6, "fraction of the steps in the first stage", min=0, max=1)

    @property
    def stages(self) -> tuple[int, int]:
        """The steps of each stage."""
        first = int(self.steps * self.first_stage)
        return first, self.steps - first


RECIPES: dict[str, Callable[[str, str, int, str], BaseRecipe]] = {  # by method
    "zero-shot": published(BaseRecipe),
    "zero-shot-ensemble": published(BaseRecipe),
    "linear-probe": published(LinearProbeRecipe),
    "tip-adapter": published(TipAdapterRecipe),
    "tip-adapter-f": published(TipAdapterFRecipe),
    "proker": published(  # without validation images the authors' code has values that it chose on ImageNet
        ProKeRRecipe,
        beta=lambda shots: at_most(shots, {1: 3.0, 2: 2.6, 4: 1.5, 8: 1.66, 16: 1.7}),
        penalty=lambda shots: at_most(shots, {1: 0.05, 8: 0.07, 16: 0.1}),
    ),
    "ss-text": published(BaseRecipe),
    "gda": published(GDARecipe),
    "lp-plus-plus": published(LPPlusPlusRecipe),
    "text-probe": lambda *_: BaseRecipe(classifier=TEXT_PROBE),
    "clap": published(CLAPRecipe),
    "prolip": published(ProLIPRecipe, penalty=lambda shots: 1 / shots),
    "coop": coop,
    "vpt-deep": vpt_deep,
    "maple": maple,
    "promptsrc": promptsrc,
    "clip-lora": clip_lora,
    "clip-svd": published(CLIPSVDRecipe, steps=lambda shots: SVD_STEPS * shots),
    "2sfs": published(TwoStageRecipe, steps=lambda shots: TWO_STAGE_STEPS * shots),
    "dcp": dcp,
}
