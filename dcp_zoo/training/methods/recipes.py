"""The published hyperparameters of every method, in one place and without torch, as plans and help texts read them.

The function of a method maps a model, a dataset, the number of shots and a protocol to its recipe.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import option
from dcp_zoo.training.recipes import AUGMENT_HELP, AUGMENTS, BaseRecipe, Recipe, TrainingRecipe, default_recipe
from dcp_zoo.zoo.registry import get_spec

LORA_STEPS, TWO_STAGE_STEPS = 500, 300  # per shot
TRANSFER = 4  # times DCP's clip_reg, for what it was not trained on


def budget_overrides(model: str, dataset: str) -> dict[str, Any]:
    """Changes to a method's published optimizer, schedule, batch size and augmentation for models that need others:
    those of the model's DCP recipe.

    Published hyperparameters were tuned for CLIP. Models that they suit have no recipe in the registry: no changes.
    """
    if not get_spec(model).recipe:
        return {}
    recipe = default_recipe(model, dataset)
    return {field.name: getattr(recipe, field.name) for field in fields(TrainingRecipe)}


def augmentation(model: str, dataset: str) -> str:
    """Random crops and flips, as published, unless the model needs another augmentation."""
    return budget_overrides(model, dataset).get("augment", "crop-flip")


# ---------------------------------------------------------------------------------------------------- on image features


def zero_shot(model: str, dataset: str, shots: int, protocol: str) -> BaseRecipe:
    return BaseRecipe()


zero_shot_ensemble = zero_shot


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    """The paper's.

    Attributes:
        C: inverse strength of the L2 penalty. None: chosen on the validation images, without any by cross-validation,
            or with one image per class 0.316.
        max_iter: of L-BFGS.
    """

    C: float | None = None
    max_iter: int = 1000


def linear_probe(model: str, dataset: str, shots: int, protocol: str) -> LinearProbeRecipe:
    return LinearProbeRecipe()


@dataclass(frozen=True)
class TipAdapterRecipe(BaseRecipe):
    """The paper's. Its code uses a different search range for each dataset; here all share one grid.

    Attributes:
        augment_epochs: random crops of a training image whose features are averaged into its key. If the views can be
            enumerated, as with flips only, these are averaged instead.
        alpha, beta: weight of the cache and sharpness of its similarities, used without validation images.
        search_max: with validation images, the best of 20 alphas and 40 betas from 0.1 to this value is used.
    """

    augment: str = "crop-flip"
    augment_epochs: int = 10
    alpha: float = 1.0
    beta: float = 1.0
    search_max: float = 50.0


def tip_adapter(model: str, dataset: str, shots: int, protocol: str) -> TipAdapterRecipe:
    return TipAdapterRecipe(augment=augmentation(model, dataset))


@dataclass(frozen=True)
class TipAdapterFRecipe(TipAdapterRecipe):
    """Adds the training of the keys: AdamW with a cosine schedule over all steps.

    Attributes:
        alpha, beta: also used while the keys are trained.
    """

    lr: float = 1e-3
    eps: float = 1e-4
    batch_size: int = 256
    epochs: int = 20


def tip_adapter_f(model: str, dataset: str, shots: int, protocol: str) -> TipAdapterFRecipe:
    return TipAdapterFRecipe(augment=augmentation(model, dataset))


@dataclass(frozen=True)
class GDARecipe(BaseRecipe):
    """The paper's."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    augment_epochs: int = option(10, "random crops of each training image; unused by the miniature")
    alpha: float | None = option(None, "weight of the Gaussian part; by default chosen on the validation images")
    text: bool = option(True, "add zero-shot CLIP; false: the Gaussian part alone, with nothing to choose")


def gda(model: str, dataset: str, shots: int, protocol: str) -> GDARecipe:
    return GDARecipe(augment=augmentation(model, dataset))


@dataclass(frozen=True)
class LPPlusPlusRecipe(BaseRecipe):
    """The authors' code; step sizes depend on the data."""

    epochs: int = option(300, "steps of v and b, each on all training images; alpha takes a tenth of them")
    momentum: float = option(0.9, "momentum of v and b")
    alpha: float = option(250.0, "initial alpha, in multiples of the mean cosine of images and their class names")


def lp_plus_plus(model: str, dataset: str, shots: int, protocol: str) -> LPPlusPlusRecipe:
    return LPPlusPlusRecipe()


@dataclass(frozen=True)
class CLAPRecipe(TrainingRecipe):
    """The authors' code: SGD with momentum 0.9 and learning rate 0.1, cosine after one epoch at 1e-5, 300 epochs."""

    lr: float = option(0.1, "peak learning rate, reached in epoch 1 and followed by a cosine towards 0")
    weight_decay: float = option(0.0, "L2 penalty of sgd, decoupled weight decay of adamw")
    batch_size: int = option(256, "features per step")
    epochs: int = option(300, "length of the schedule")
    augment_epochs: int = option(20, "random crops of each training image; unused by the miniature")

    unit: bool = option(True, "start from normalised text features; false: from the text tower's output, as the code")


def clap(model: str, dataset: str, shots: int, protocol: str) -> CLAPRecipe:
    return CLAPRecipe(augment=augmentation(model, dataset))


# -------------------------------------------------------------------------------------------------------------- prompts


def dcp(model: str, dataset: str, shots: int, protocol: str) -> Recipe:
    """The default recipe; where it agrees with zero-shot CLIP, more so for classes and styles that it was not trained
    on, and without a classifier stage for other styles, as Gaussians of photographs misjudge drawings."""
    default = default_recipe(model, dataset)
    if protocol == "few-shot":
        return default
    stage = "none" if protocol == "domain-shift" else default.classifier
    return replace(default, clip_reg=TRANSFER * default.clip_reg, classifier=stage)


@dataclass(frozen=True)
class CoOpRecipe(TrainingRecipe):
    """The paper's, for ViT-B/16: M = 16 tokens of unified context, the class name at the end.

    Attributes:
        n_ctx: M.
    """

    lr: float = 0.002
    batch_size: int = 32
    epochs: int | None = 200
    n_ctx: int = 16


def coop(model: str, dataset: str, shots: int, protocol: str) -> CoOpRecipe:
    """50 epochs for 1 shot and for ImageNet, 100 for 2 and 4 shots, 200 for more."""
    epochs = 50 if shots == 1 or dataset == "imagenet" else 100 if shots <= 4 else 200
    return CoOpRecipe(epochs=epochs).updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class VPTRecipe(TrainingRecipe):
    """SGD with learning rate 0.0025, batches of 4; every block of the vision tower has its own prompts.

    Attributes:
        n_ctx: prompt tokens in a block.
        depth: blocks with their own prompts; at most the number of blocks of the tower.
    """

    lr: float = 0.0025
    n_ctx: int = 8
    depth: int = 12


def vpt(model: str, dataset: str, shots: int, protocol: str) -> VPTRecipe:
    """5 epochs as in MaPLe's comparison of transfer; for few-shot, which that lacks, DCP's 20."""
    epochs = 20 if protocol == "few-shot" else 5
    return VPTRecipe(epochs=epochs).updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class MaPLeRecipe(TrainingRecipe):
    """SGD with learning rate 0.0035, batches of 4.

    Attributes:
        n_ctx: prompt tokens in a block of each tower.
        depth: blocks of each tower with their own prompts; at most the number of blocks of the shorter tower.
        ctx_init: words before the class name; the first `n_ctx` initialise the first prompts, the others stay words.
    """

    n_ctx: int = 2
    depth: int = 9
    ctx_init: str = "a photo of a"


def maple(model: str, dataset: str, shots: int, protocol: str) -> MaPLeRecipe:
    """The paper's: 5 epochs for base-to-new, and a smaller budget where an ImageNet head must transfer. It has no
    few-shot protocol; there, DCP's 20 epochs."""
    published = MaPLeRecipe(epochs=20 if protocol == "few-shot" else 5)
    if protocol in ("cross-dataset", "domain-shift"):
        published = replace(published, lr=0.0026, epochs=2, depth=3)
    return published.updated(budget_overrides(model, dataset))


@dataclass(frozen=True)
class PromptSRCRecipe(TrainingRecipe):
    """SGD with learning rate 0.0025, batches of 4, 50 epochs."""

    lr: float = option(0.0025, "peak learning rate, reached in epoch 1 and followed by a cosine towards 0")
    epochs: int | None = option(50, "length of the schedule; null: as many as the number of classes and images needs")
    n_ctx: int = option(4, "prompt tokens in a block of each tower")
    depth: int = option(9, "blocks of each tower with new prompts; at most the number of blocks of the shorter tower")
    ctx_init: str = option("a photo of a", "words before the class name that initialise the first text prompts")
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


# ------------------------------------------------------------------------------------------------------ weights of CLIP


@dataclass(frozen=True)
class ProLIPRecipe(BaseRecipe):
    """The authors' code: Adam with a cosine over all steps."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    penalty: float = option(0.25, "lambda, 1 / shots")
    lr: float = option(1e-5, "learning rate of the first step")
    eps: float = option(1e-4, "epsilon of adam")
    epochs: int = option(300, "optimizer steps, each on all training images")


def prolip(model: str, dataset: str, shots: int, protocol: str) -> ProLIPRecipe:
    return ProLIPRecipe(augment=augmentation(model, dataset), penalty=1 / max(shots, 1))


@dataclass(frozen=True)
class CLIPLoRARecipe(BaseRecipe):
    """The authors' code: AdamW with a cosine down to 1e-6."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    rank: int = option(2, "rank r of the updates")
    alpha: float = option(1.0, "scale of the updates, which are multiplied by alpha / sqrt(r)")
    dropout: float = option(0.25, "dropout rate of the updates' inputs")
    lr: float = option(2e-4, "learning rate of the first step")
    weight_decay: float = option(1e-2, "decoupled weight decay of adamw")
    batch_size: int = option(32, "images per step")
    steps: int = option(4 * LORA_STEPS, "optimizer steps; the default is 500 per shot")


def clip_lora(model: str, dataset: str, shots: int, protocol: str) -> CLIPLoRARecipe:
    """A fifth of the published steps where the registry has a higher rate."""
    per_shot = LORA_STEPS // 5 if "clip-lora" in get_spec(model).baseline_recipes else LORA_STEPS
    return CLIPLoRARecipe(augment=augmentation(model, dataset), steps=per_shot * max(shots, 1))


@dataclass(frozen=True)
class TwoStageRecipe(BaseRecipe):
    """The authors' code: AdamW with a cosine down to 1e-6 in each stage."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    lr: float = option(2e-4, "learning rate of the first step of each stage")
    weight_decay: float = option(1e-2, "decoupled weight decay of adamw")
    batch_size: int = option(32, "images per step")
    steps: int = option(4 * TWO_STAGE_STEPS, "optimizer steps of both stages; the default is 300 per shot")
    first_stage: float = option(0.6, "fraction of the steps in the first stage")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first_stage <= 1:
            raise ZooError(f"first_stage must be between 0 and 1, not {self.first_stage}.")

    @property
    def stages(self) -> tuple[int, int]:
        """The steps of each stage."""
        first = int(self.steps * self.first_stage)
        return first, self.steps - first


def two_stage(model: str, dataset: str, shots: int, protocol: str) -> TwoStageRecipe:
    return TwoStageRecipe(augment=augmentation(model, dataset), steps=TWO_STAGE_STEPS * max(shots, 1))
