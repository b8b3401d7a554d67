"""The models: the rows of `models.yaml`. Any other open_clip model gets a row when it is asked for. It does not
import torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dcp_zoo.backbone import MINI_CFG
from dcp_zoo.errors import ZooError, nearest_hint
from dcp_zoo.fields import Values

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip:"  # before the name of an open_clip model: "ARCH/TAG", or one of the next two
CLIP_REPO = "hf-hub:"  # before a Hub repo with an open_clip_config.json
CLIP_FOLDER = "local-dir:"  # before a folder with the same files


@dataclass(frozen=True)
class ModelSpec:
    name: str  # here and in timm's registry
    clip: str | None  # open_clip architecture, None for the bundled miniature
    clip_pretrained: str  # open_clip tag of CLIP's weights
    clip_repo: str | None  # Hub repo from which open_clip loads those weights
    image_size: int = 224  # height and width in pixels
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    interpolation: str = "bicubic"  # of the test images, in timm's terms, as the next
    crop_mode: str = "center"  # "center" resizes the short side and crops, "squash" resizes both sides
    clip_revision: str | None = None  # commit of `clip_repo`, see hub/pin_clips.py; None: the newest, whatever it is
    parameters: int | None = None  # of both towers, in millions
    gflops: float | None = None  # of the image tower, for one image, as torch's `FlopCounterMode` counts them
    # published zero-shot top-1 in percent, not measured here; None: no table has it
    zero_shot: float | None = None  # the mean over ten of the 11 datasets, without UCF101
    imagenet: float | None = None
    accuracy_source: str = ""  # the table that has these two, and its date
    head_mb: float = 0  # megabytes of a head of DCP by the default recipe, without a text probe: float16
    default_tag: str = "imagenet-16shot"  # of the head that `pretrained=True` loads
    recipe: Values = field(default_factory=dict)  # changes to the release's, `dcp_zoo.training.Recipe`
    # changes to other methods' recipes, by their names; those under `per_shot` are multiplied by the shots
    baseline_recipes: dict[str, Values] = field(default_factory=dict)

    @property
    def default_head(self) -> str:
        """The name of the head that `pretrained=True` loads."""
        return f"{self.name}.{self.default_tag}"

    @property
    def accuracies(self) -> list[str]:
        """`zero_shot` and `imagenet` as texts; "" for None."""
        return ["" if value is None else f"{value:.1f}" for value in (self.zero_shot, self.imagenet)]

    @property
    def download(self) -> str:
        """The size of CLIP's weights in float32, as most repos have them; "" if unknown or bundled."""
        if self.clip is None or self.parameters is None:
            return ""
        return f"{4 * self.parameters / 1e3:.1f} GB"

    @property
    def license(self) -> str:
        """The licence of CLIP's weights; "" if it is not certain."""
        prefixes = [tag for tag in LICENSES if self.clip_pretrained.startswith(tag)]
        return LICENSES[max(prefixes, key=len)] if prefixes else ""

    @property
    def data_cfg(self) -> Values:
        """The preprocessing in timm's terms."""
        return {
            "input_size": (3, self.image_size, self.image_size),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
            "mean": tuple(self.mean),
            "std": tuple(self.std),
        }


TABLE: dict[str, Values] = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())
LICENSES = TABLE[".licenses"]
SIZES: dict[str, str] = TABLE[".sizes"]
TABLE["dcp_mini"] |= {name: MINI_CFG[name] for name in ("image_size", "mean", "std")}
MODELS = {name: ModelSpec(name, **row) for name, row in TABLE.items() if not name.startswith(".")}
DEFAULT_HEAD = MODELS["dcp_mini"].default_head
MINIATURE_NOTE = "dcp_mini is a miniature for trying things out. For real use: train --model small; see dcp-zoo list."


def get_spec(model: str) -> ModelSpec:
    """The row of `MODELS`, by name or size, or one made for "open_clip:ARCH/TAG"; ZooError with the nearest
    names if it is unknown."""
    if model.startswith(OPEN_CLIP):
        return open_clip_spec(model)
    model = SIZES.get(model, model)
    if model not in MODELS:
        hint = open_clip_hint(model) or nearest_hint(model, MODELS)
        raise ZooError(f"Unknown model {model!r}.{hint} All: `dcp-zoo list` or dcp_zoo.list_models().")
    return MODELS[model]


def open_clip_hint(name: str) -> str:
    """The part of an error message that says how to write a name of open_clip's, ARCH or ARCH/TAG; "" for
    others."""
    import open_clip  # slow to import

    clip, _, tag = name.partition("/")
    if clip not in open_clip.list_models():
        return ""
    return f" open_clip's {clip} is {OPEN_CLIP}{clip}/{tag or 'TAG'}, with a tag of open_clip.list_pretrained()."


def described(clip: str, tag: str) -> tuple[Values, Values]:
    """open_clip's two configurations of a CLIP: of the weights (where they are, their preprocessing), and of
    the model (the sizes of both towers)."""
    if clip.startswith((CLIP_REPO, CLIP_FOLDER)):
        from dcp_zoo.hub import clip_config

        return clip_config(clip)
    import open_clip

    return open_clip.get_pretrained_cfg(clip, tag), open_clip.get_model_config(clip)


def open_clip_spec(name: str) -> ModelSpec:
    """A row for "open_clip:ARCH/TAG", "open_clip:hf-hub:ORG/REPO", or "open_clip:local-dir:FOLDER", made
    absolute."""
    place = name.removeprefix(OPEN_CLIP)
    if place.startswith(CLIP_FOLDER):
        clip = f"{CLIP_FOLDER}{Path(place.removeprefix(CLIP_FOLDER)).absolute()}"
        tag = "local"
        name = f"{OPEN_CLIP}{clip}"
    elif place.startswith(CLIP_REPO):
        clip = place
        tag = "hub"
    else:
        import open_clip

        pairs = ["/".join(pair) for pair in open_clip.list_pretrained()]
        if place not in pairs:
            raise ZooError(
                f"open_clip has no model {place!r}.{nearest_hint(place, pairs)} All: open_clip.list_pretrained(); "
                "names are open_clip:ARCH/TAG, open_clip:hf-hub:ORG/REPO, or open_clip:local-dir:FOLDER."
            )
        clip, _, tag = place.partition("/")
    weights, model = described(clip, tag)
    known = {name: weights[name] for name in ("mean", "std", "interpolation") if name in weights}
    return ModelSpec(
        name,
        clip,
        tag,
        clip_repo=weights.get("hf_hub", "").rstrip("/") or None,
        image_size=model["vision_cfg"].get("image_size", 224),
        crop_mode="squash" if weights.get("resize_mode") == "squash" else "center",
        **known,
    )
