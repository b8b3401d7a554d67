"""The table of models: one row each, plain values that need no torch. Any other open_clip model has a row made for it.

Parameters and GFLOPs (two per multiply-add) are those of open_clip 3.3's modules, without prompts.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dcp_zoo.errors import ZooError, nearest
from dcp_zoo.model.config import MINI_CFG

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = "open_clip:"  # before the name of an open_clip model: "ARCH/TAG" or "hf-hub:ORG/REPO"
CLIP_REPO = "hf-hub:"  # before the Hub repo that describes an architecture

# Licences of weights by the beginning of open_clip's tag, as the authors state them or timm 1.0.31 does for the same
# weights; those that are not certain are left out.
LICENSES = {
    "bundled": "apache-2.0",
    "openai": "mit",
    "laion2b": "mit",
    "merged2b": "mit",
    "webli": "apache-2.0",
    "meta": "apache-2.0",
    "metaclip": "cc-by-nc-4.0",
    "dfndr2b": "apple-amlr",
}


@dataclass(frozen=True)
class ModelSpec:
    """One model of the zoo.

    Attributes:
        name: its name here and in timm's registry.
        clip: open_clip architecture, None for the bundled miniature.
        clip_pretrained: open_clip tag of CLIP's weights.
        clip_repo: Hub repo from which open_clip loads those weights.
        image_size: height and width in pixels.
        interpolation, crop_mode: of the test images, in timm's terms: "center" resizes the short side and crops,
            "squash" resizes both sides.
        parameters: of both towers, in millions.
        gflops: of the image tower, for one image, as torch's `FlopCounterMode` counts them.
        head_mb: megabytes of a head of DCP by the default recipe, without a classifier stage: float16.
        default_tag: the head that `pretrained=True` loads.
        recipe: changes to the release's training recipe, see `dcp_zoo.training.Recipe`.
        baseline_recipes: changes to the recipes of other methods, by name, where published values do not suit.
    """

    name: str
    clip: str | None
    clip_pretrained: str
    clip_repo: str | None
    image_size: int = 224
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    parameters: int | None = None
    gflops: float | None = None
    head_mb: float = 0
    default_tag: str = "imagenet-16shot"
    recipe: dict[str, Any] = field(default_factory=dict)
    baseline_recipes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def license(self) -> str:
        """Of CLIP's weights; "" if it is not certain."""
        known = [tag for tag in LICENSES if self.clip_pretrained.startswith(tag)]
        return LICENSES[max(known, key=len)] if known else ""

    @property
    def data_cfg(self) -> dict[str, Any]:
        """Its preprocessing in timm's terms."""
        return {
            "input_size": (3, self.image_size, self.image_size),
            "fixed_input_size": True,
            "interpolation": self.interpolation,
            "crop_pct": 1.0,
            "crop_mode": self.crop_mode,
            "mean": self.mean,
            "std": self.std,
        }


def _clip(
    name: str, clip: str, repo: str, parameters: int, gflops: float, head_mb: float, size: int = 224, **other: Any
) -> ModelSpec:
    """A row; `clip` is open_clip's "ARCH/TAG"."""
    architecture, tag = clip.split("/")
    sizes: dict[str, Any] = {"parameters": parameters, "gflops": gflops, "head_mb": head_mb}
    return ModelSpec(f"dcp_{name}", architecture, tag, repo, size, **sizes, **other)


HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
SIGLIP: dict[str, Any] = {**HALF, "crop_mode": "squash"}
PE: dict[str, Any] = {**SIGLIP, "interpolation": "bilinear"}
APPLE: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
TIMM, EVA = "timm/vit_{}_clip_224.{}", "timm/eva02_{}_clip_224.merged2b_s{}b_b131k"
META2, LAION = TIMM.format("huge_patch14", "metaclip2_worldwide"), "laion/CLIP-ViT-"

ROWS = [
    _clip("vitb32", "ViT-B-32/openai", TIMM.format("base_patch32", "openai"), 151, 8.8, 22.3),
    _clip("vitb16", "ViT-B-16/openai", TIMM.format("base_patch16", "openai"), 150, 35.1, 22.3),
    _clip("vitl14", "ViT-L-14/openai", TIMM.format("large_patch14", "openai"), 428, 162.0, 42.9),
    _clip("vitl14_336", "ViT-L-14-336/openai", "timm/vit_large_patch14_clip_336.openai", 428, 381.9, 42.9, 336),
    _clip("siglip2_b16", "ViT-B-16-SigLIP2/webli", "timm/ViT-B-16-SigLIP2", 375, 35.4, 31.0, **SIGLIP),
    _clip("siglip2_l16", "ViT-L-16-SigLIP2-256/webli", "timm/ViT-L-16-SigLIP2-256", 882, 162.6, 54.9, 256, **SIGLIP),
    _clip("siglip2_so400m", "ViT-SO400M-14-SigLIP2/webli", "timm/ViT-SO400M-14-SigLIP2", 1135, 220.4, 69.5, **SIGLIP),
    _clip("pe_b16", "PE-Core-B-16/meta", "timm/PE-Core-B-16", 448, 35.6, 42.8, **PE),
    _clip("pe_l14_336", "PE-Core-L-14-336/meta", "timm/PE-Core-L-14-336", 671, 384.4, 54.9, 336, **PE),
    _clip("eva02_b16", "EVA02-B-16/merged2b_s8b_b131k", EVA.format("base_patch16", 8), 150, 35.1, 22.3),
    _clip("eva02_l14", "EVA02-L-14/merged2b_s4b_b131k", EVA.format("large_patch14", 4), 428, 162.0, 42.9),
    _clip("mobileclip2_b", "MobileCLIP2-B/dfndr2b", "timm/MobileCLIP2-B-OpenCLIP", 150, 35.4, 22.3, **APPLE),
    _clip("mobileclip2_l14", "MobileCLIP2-L-14/dfndr2b", "timm/MobileCLIP2-L-14-OpenCLIP", 428, 162.0, 42.9),
    _clip("dfn_b16", "ViT-B-16/dfn2b", "apple/DFN2B-CLIP-ViT-B-16", 150, 35.1, 22.3),
    _clip("dfn_l14", "ViT-L-14/dfn2b_s39b", "apple/DFN2B-CLIP-ViT-L-14-39B", 428, 162.0, 42.9),
    _clip("dfn_h14", "ViT-H-14/dfn5b", "apple/DFN5B-CLIP-ViT-H-14", 986, 334.6, 70.2, crop_mode="squash"),
    _clip("metaclip_b16", "ViT-B-16/metaclip_fullcc", TIMM.format("base_patch16", "metaclip_2pt5b"), 150, 35.1, 22.3),
    _clip("metaclip_l14", "ViT-L-14/metaclip_fullcc", TIMM.format("large_patch14", "metaclip_2pt5b"), 428, 162.0, 42.9),
    _clip("metaclip2_h14", "ViT-H-14-worldwide/metaclip2_worldwide", META2, 1859, 334.6, 70.2),
    _clip("laion_b32", "ViT-B-32/laion2b_s34b_b79k", LAION + "B-32-laion2B-s34B-b79K", 151, 8.8, 22.3),
    _clip("laion_b16", "ViT-B-16/laion2b_s34b_b88k", LAION + "B-16-laion2B-s34B-b88K", 150, 35.1, 22.3),
    _clip("laion_l14", "ViT-L-14/laion2b_s32b_b82k", LAION + "L-14-laion2B-s32B-b82K", 428, 162.0, 42.9, **HALF),
    _clip("laion_h14", "ViT-H-14/laion2b_s32b_b79k", LAION + "H-14-laion2B-s32B-b79K", 986, 334.6, 70.2),
    _clip("laion_bigg14", "ViT-bigG-14/laion2b_s39b_b160k", LAION + "bigG-14-laion2B-39B-b160k", 2540, 967.5, 115.0),
    ModelSpec(
        name="dcp_mini",
        clip=None,
        clip_pretrained="bundled",
        clip_repo=None,
        image_size=MINI_CFG["image_size"],
        mean=MINI_CFG["mean"],
        std=MINI_CFG["std"],
        parameters=20,
        gflops=1.1,
        head_mb=2.7,
        default_tag="caltech101-16shot",
        recipe={"optimizer": "adamw", "lr": 2e-3, "batch_size": 32, "augment": "flip"},
        baseline_recipes={"prolip": {"lr": 1e-3}}
        | {method: {"lr": 4e-3} for method in ("coop", "vpt-deep", "maple", "promptsrc", "clip-lora")},
    ),
]
MODELS = {spec.name: spec for spec in ROWS}


def get_spec(model: str, cache_dir: str | Path | None = None) -> ModelSpec:
    """The row of `MODELS`, or one made for "open_clip:ARCH/TAG"; ZooError with the nearest names if it is unknown."""
    if model.startswith(OPEN_CLIP):
        return open_clip_spec(model, cache_dir)
    if model not in MODELS:
        close = nearest(model, MODELS) or list(MODELS)
        raise ZooError(
            f"Unknown model {model!r}. Nearest: {', '.join(close)}. All: `dcp-zoo list` or dcp_zoo.list_models()."
        )
    return MODELS[model]


def open_clip_spec(name: str, cache_dir: str | Path | None = None) -> ModelSpec:
    """A row for "open_clip:ARCH/TAG" or "open_clip:hf-hub:ORG/REPO", from open_clip's own configs.

    Raises:
        ZooError: an unknown architecture or tag, or a repo that cannot be read.
    """
    place = name.removeprefix(OPEN_CLIP)
    clip, _, tag = place.partition("/")
    if place.startswith(CLIP_REPO):
        from dcp_zoo.zoo.hub import clip_repo_config

        repo: str | None = place.removeprefix(CLIP_REPO)
        clip, tag, described = place, "hub", clip_repo_config(str(repo), cache_dir)
        model, preprocess = described["model_cfg"], described["preprocess_cfg"]
    else:
        import open_clip

        pairs = open_clip.list_pretrained()
        if (clip, tag) not in pairs:
            close = nearest(place, [f"{arch}/{known}" for arch, known in pairs]) or ["ViT-B-16/openai"]
            raise ZooError(
                f"open_clip has no model {place!r}. Nearest: {', '.join(close)}. All: open_clip.list_pretrained(); "
                f"names are {OPEN_CLIP}ARCH/TAG, or {OPEN_CLIP}{CLIP_REPO}ORG/REPO for a repo on the Hub."
            )
        model, preprocess = open_clip.get_model_config(clip), open_clip.get_pretrained_cfg(clip, tag)
        repo = preprocess.get("hf_hub", "").rstrip("/") or None
    return ModelSpec(
        name,
        clip,
        tag,
        repo,
        model["vision_cfg"].get("image_size", 224),
        tuple(preprocess.get("mean", OPENAI_MEAN)),
        tuple(preprocess.get("std", OPENAI_STD)),
        preprocess.get("interpolation", "bicubic"),
        "squash" if preprocess.get("resize_mode") == "squash" else "center",
    )


def weights_spec(spec: ModelSpec, tag: str) -> ModelSpec:
    """The row that has the preprocessing of these weights: the model's own, or for other weights open_clip's."""
    if tag == spec.clip_pretrained:
        return spec
    return replace(open_clip_spec(f"{OPEN_CLIP}{spec.clip}/{tag}"), name=spec.name, image_size=spec.image_size)
